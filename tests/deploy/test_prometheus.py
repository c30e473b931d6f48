"""deploy/prometheus: Prometheus' own checks pass, and every metric is one of the server's."""

import re
import subprocess

import pytest
import yaml

from llama_jax.server import errors
from llama_jax.server.auth import OPEN_PATHS
from tests.helpers import ROOT
from tests.helpers.manifests import DEPLOY, container_of, documents
from tests.helpers.promql import PROMETHEUS, check_expression, exported_metrics, grouping_labels

FOLDER = DEPLOY / "prometheus"
CONFIG = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
GROUPS = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}


def known_metrics():
    """Return all that a rule may read: what is exported, and what is recorded of it."""
    recorded = {
        rule["record"]: grouping_labels(rule["expr"]) - {"le"} for rule in RULES if "record" in rule
    }
    return PROMETHEUS | exported_metrics() | recorded


@pytest.mark.deploy
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_parses_and_reads_metrics_that_are_there(rule):
    check_expression(rule["expr"], known_metrics())


@pytest.mark.deploy
@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("llama_jax_num_requests_queued > 0", "no metric llama_jax_num_requests_queued"),
        ('llama_jax_errors_total{status="500"}', "llama_jax_errors_total has no label status"),
        ("sum by (status) (llama_jax_num_slots)", "no label status to group by"),
        ("vector(1)", "no metric at all"),
    ],
)
def test_a_wrong_name_is_found(expression, problem):
    with pytest.raises(AssertionError, match=problem):
        check_expression(expression, known_metrics())


def test_the_values_of_labels_are_the_server_s():
    kinds = [each for each in vars(errors).values() if isinstance(each, errors.Kind)]
    text = " ".join(rule["expr"] for rule in RULES)
    (reasons,) = re.findall(r'reason=~"([^"]+)"', text)
    assert {*reasons.split("|")} <= {kind.rejection for kind in kinds}
    codes = set(re.findall(r'code="(\d+)"', text))
    assert codes == {str(errors.INTERNAL.code)}


def test_an_alert_names_what_it_is_of():
    docs = (ROOT / "docs/deploy.md").read_text()
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert re.search(r"\{\{ \$labels\.(instance|job) \}\}", rule["annotations"]["summary"])
        assert f"| `{name}` |" in docs


def test_each_alert_fires_in_the_test_of_the_rules():
    text = (FOLDER / "rules_test.yml").read_text()
    assert {*re.findall(r'alertname="(\w+)"', text)} == {*ALERTS}


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules_and_every_alert_fires(promtool):
    run(promtool, "check", "rules", FOLDER / "rules.yml")
    run(promtool, "test", "rules", FOLDER / "rules_test.yml")


def test_promtool_accepts_the_configuration(promtool, tmp_path):
    """Debian's promtool is built without Kubernetes: targets take the place of pods."""
    token = tmp_path / "token"
    token.write_text("x")
    text = (FOLDER / "prometheus.yml").read_text()
    for before, after in (
        ("/etc/prometheus/llama_jax-token", str(token)),
        ("kubernetes_sd_configs:\n      - role: pod", "static_configs:\n      - targets: [a]"),
    ):
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "prometheus.yml").write_text(text)
    (tmp_path / "rules.yml").write_bytes((FOLDER / "rules.yml").read_bytes())
    run(promtool, "check", "config", tmp_path / "prometheus.yml")


def test_what_is_scraped_wants_a_token():
    """/metrics is the default path of a job."""
    assert "/metrics" not in OPEN_PATHS
    for job in CONFIG["scrape_configs"]:
        assert "metrics_path" not in job
        assert job["authorization"].keys() == {"credentials_file"}
        assert re.fullmatch("llama_jax.*", job["job_name"])  # LlamaJaxDown's


def pods_with_http():
    """Yield the label `app`, name of a port and index of each pod, and whether it has HTTP."""
    deployment = documents("kubernetes.yaml")["Deployment"]["spec"]["template"]
    yield deployment, "", True
    (jobs,) = documents("jobset-tpu.yaml")["JobSet"]["spec"]["replicatedJobs"]
    yield jobs["template"]["spec"]["template"], "0", True
    yield jobs["template"]["spec"]["template"], "1", False
    group = documents("leaderworkerset-gpu.yaml")["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    yield group["leaderTemplate"], "", True
    yield group["workerTemplate"], "", False
    yield documents("job-batch.yaml")["Job"]["spec"]["template"], "0", False


def test_the_pods_that_have_http_are_scraped_by_one_port_each():
    (job,) = [each for each in CONFIG["scrape_configs"] if "kubernetes_sd_configs" in each]
    keep = job["relabel_configs"][0]
    assert keep["action"] == "keep"
    for template, index, has_http in pods_with_http():
        # Prometheus finds a target for each port, and one for a container without any.
        ports = [port["name"] for port in container_of(template).get("ports", [])] or [""]
        app = template["metadata"]["labels"]["app"]
        kept = [name for name in ports if re.fullmatch(keep["regex"], f"{app};{name};{index}")]
        assert kept == (["http"] if has_http else [])
