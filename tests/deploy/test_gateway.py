"""deploy/gateway/endpoint-picker.yaml: what a gateway reads of the server is there."""

import yaml

from llama_jax.server.auth import OPEN_PATHS
from tests.helpers import ROOT
from tests.helpers.demo import load_demo
from tests.helpers.manifests import DEPLOY
from tests.helpers.promql import exported_metrics
from tests.helpers.serving import serving

CONFIG = yaml.safe_load((DEPLOY / "gateway" / "endpoint-picker.yaml").read_text())
PLUGINS = {plugin["type"]: plugin.get("parameters", {}) for plugin in CONFIG["plugins"]}


def test_the_gateway_reads_gauges_that_are_there():
    (engine,) = PLUGINS["core-metrics-extractor"]["engineConfigs"]
    assert PLUGINS["core-metrics-extractor"]["defaultEngine"] == engine["name"]
    names = [engine[f"{what}Spec"] for what in ("queuedRequests", "runningRequests", "kvUsage")]
    assert {*names} <= exported_metrics().keys()
    docs = (ROOT / "docs/deploy.md").read_text()
    with serving(load_demo()) as client:
        text = client.get(PLUGINS["metrics-data-source"]["path"]).text
    for name in names:
        assert f"# TYPE {name} gauge\n" in text
        assert f"`{name}`" in docs


def test_profiles_name_plugins_that_are_there():
    (profile,) = CONFIG["schedulingProfiles"]
    assert {plugin["pluginRef"] for plugin in profile["plugins"]} <= PLUGINS.keys()


def test_the_metrics_need_the_token_as_the_page_says():
    assert PLUGINS["metrics-data-source"]["path"] not in OPEN_PATHS
