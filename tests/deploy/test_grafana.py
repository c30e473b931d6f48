"""deploy/grafana.json: Grafana's own types know every field, and its queries read real metrics."""

import itertools
import json
import re

import pytest

from tests.helpers import ROOT
from tests.helpers.manifests import DEPLOY, holds
from tests.helpers.promql import PROMETHEUS, check_expression, exported_metrics

DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
PANELS = DASHBOARD["panels"]
VARIABLES = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
QUERIES = [
    pytest.param(target, id=f"{panel['title']}: {target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]
KINDS = {"stat", "timeseries"}


@pytest.fixture(scope="module")
def through_types():
    """Return what is left of a dashboard after its way through Grafana's types."""
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    return lambda dashboard: json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))


@pytest.mark.deploy
def test_grafana_knows_every_field(through_types):
    """A field that the types do not know is lost on the way through them."""
    assert holds(through_types(DASHBOARD), DASHBOARD)


@pytest.mark.deploy
@pytest.mark.parametrize(
    "path", [("titel",), ("panels", 0, "gridPosition"), ("panels", 6, "options", "legends")]
)
def test_a_field_that_grafana_does_not_know_is_found(through_types, path):
    wrong = json.loads(json.dumps(DASHBOARD))
    *parents, name = path
    place = wrong
    for step in parents:
        place = place[step]
    place[name] = {"x": 1}
    assert not holds(through_types(wrong), wrong)


@pytest.mark.deploy
@pytest.mark.parametrize("target", QUERIES)
def test_a_query_parses_and_reads_metrics_that_are_there(target):
    text = target["expr"].replace("$__rate_interval", "5m")
    known = PROMETHEUS | exported_metrics()
    check_expression(text, known)
    labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    assert labels <= set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]+)\)", text))))


@pytest.mark.parametrize("target", QUERIES)
def test_a_query_is_of_the_chosen_source_job_and_server(target):
    selectors = re.findall(r"\{([^}{]*)\}", target["expr"])
    assert selectors
    assert all(text.startswith('job=~"$job", instance=~"$instance"') for text in selectors)
    assert set(re.findall(r"\$(?!__rate_interval)(\w+)", target["expr"])) <= set(VARIABLES)


def test_the_data_source_is_a_variable():
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == "prometheus"
    sources = [panel["datasource"] for panel in PANELS]
    sources += [target["datasource"] for panel in PANELS for target in panel["targets"]]
    sources += [each["datasource"] for each in VARIABLES.values() if each["type"] == "query"]
    assert all(each == {"type": "prometheus", "uid": "${datasource}"} for each in sources)


def test_the_variables_list_what_is_scraped():
    for name in ("job", "instance"):
        query = VARIABLES[name]["query"]
        metric, label = re.findall(r"^label_values\((\w+).*, (\w+)\)$", query)[0]
        assert metric in exported_metrics()
        assert label == name


def test_panels_have_their_place_and_title():
    assert {panel["type"] for panel in PANELS} == KINDS
    for name in ("id", "title"):
        assert len({panel[name] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["description"].endswith(".")
    for one, other in itertools.combinations([panel["gridPos"] for panel in PANELS], 2):
        apart = (
            one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"],
            one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"],
        )
        assert any(apart), (one, other)


def test_what_the_docs_list_is_shown():
    shown = json.dumps(PANELS)
    for metric in (
        *("http_requests_total", "time_to_first_token_seconds_bucket"),
        *("time_per_output_token_seconds_bucket", "generation_tokens_total"),
        *("num_requests_running", "num_requests_waiting", "num_slots"),
        *("prefix_reused_tokens_total", "rejections_total", "errors_total"),
        *("num_connections", "request_body_bytes", "compile_seconds_total"),
    ):
        assert f"llama_jax_{metric}" in shown
    assert "[grafana.json](../deploy/grafana.json)" in (ROOT / "docs/deploy.md").read_text()
