"""The manifests for Kubernetes: they are what its schemas say, and they agree with the program."""

import copy
import json
import re
import subprocess
import sys

import pytest
import yaml

from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.server.auth import OPEN_PATHS
from llama_jax.source import CHECKPOINT_VARIABLE
from tests.helpers import ROOT
from tests.helpers.dockerfile import environment, values
from tests.helpers.manifests import (
    DEPLOY,
    DRAIN_S,
    check_ports,
    container_of,
    documents,
    holds,
    read_command,
)
from tests.helpers.promql import exported_metrics

OLDEST = "1.31"
"""The first version of Kubernetes that has all that the manifests use."""

MANIFESTS = sorted({path.name for path in DEPLOY.glob("*.yaml")} - {"ray-serve.yaml"})
HTTP = documents("kubernetes.yaml")
BATCH = documents("job-batch.yaml")["Job"]
TEMPLATE = HTTP["Deployment"]["spec"]["template"]
SERVER = container_of(TEMPLATE)
WORKER = container_of(BATCH["spec"]["template"])
PARTS = BATCH["spec"]["completions"]


def templates(document):
    """Yield a custom resource's pod templates and jobs as documents of Kubernetes' own kinds."""
    spec = document["spec"]
    for job in spec.get("replicatedJobs", ()):
        yield {"apiVersion": "batch/v1", "kind": "Job", **job["template"]}
    group = spec.get("leaderWorkerTemplate", {})
    for name in ("leaderTemplate", "workerTemplate"):
        if name in group:
            yield {"apiVersion": "v1", "kind": "PodTemplate", "template": group[name]}


def plain_documents(name):
    """Return a manifest's documents; of custom resources what Kubernetes' schemas know of them."""
    found = list(documents(name).values())
    custom = [each for each in found if "x-k8s.io" in each["apiVersion"]]
    return [
        *(each for each in found if each not in custom),
        *(part for each in custom for part in templates(each)),
    ]


@pytest.mark.deploy
@pytest.mark.parametrize("version", [OLDEST, "latest"])
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_what_the_schemas_say(name, version):
    import kubernetes_validate

    version = kubernetes_validate.latest_version() if version == "latest" else version
    found = plain_documents(name)
    assert found
    for document in found:
        used = kubernetes_validate.validate(document, version, strict=True)
        assert version.startswith(used)  # not an older one for want of this


@pytest.mark.deploy
def test_the_schemas_refuse_what_they_do_not_know():
    import kubernetes_validate

    wrong = copy.deepcopy(HTTP["Deployment"])
    container_of(wrong["spec"]["template"])["startupProbe"]["httpget"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="httpget"):
        kubernetes_validate.validate(wrong, OLDEST, strict=True)


@pytest.mark.deploy
def test_the_jobset_is_what_its_own_types_say():
    """A field that the types do not know is lost on the way through them."""
    from kubeflow_trainer_api.models import jobset_v1alpha2_job_set as jobset

    document = documents("jobset-tpu.yaml")["JobSet"]

    def through_types(document):
        parsed = jobset.JobsetV1alpha2JobSet.from_dict(document)
        return parsed.to_dict() if parsed else {}

    assert holds(through_types(document), document)
    wrong = copy.deepcopy(document)
    wrong["spec"]["failurePolicy"]["maxRestart"] = 3
    assert not holds(through_types(wrong), wrong)


def test_all_parts_of_the_server_name_the_same_pods():
    labels = TEMPLATE["metadata"]["labels"]
    assert HTTP["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert HTTP["Service"]["spec"]["selector"] == labels
    assert HTTP["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    (spread,) = TEMPLATE["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    target = HTTP["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": HTTP["Deployment"]["apiVersion"],
        "kind": "Deployment",
        "name": HTTP["Deployment"]["metadata"]["name"],
    }
    check_ports(HTTP["Service"], SERVER)


def test_the_probes_are_open_routes_and_wait_for_the_weights():
    probes = {name: each for name, each in SERVER.items() if name.endswith("Probe")}
    assert {name: each["httpGet"]["path"] for name, each in probes.items()} == {
        "startupProbe": "/healthz",
        "readinessProbe": "/readyz",
        "livenessProbe": "/healthz",
    }
    assert {each["httpGet"]["path"] for each in probes.values()} <= OPEN_PATHS
    assert {each["httpGet"]["port"] for each in probes.values()} == {"http"}
    startup = probes["startupProbe"]["periodSeconds"] * probes["startupProbe"]["failureThreshold"]
    assert startup < HTTP["Deployment"]["spec"]["progressDeadlineSeconds"]


def test_a_pod_ends_after_its_drain():
    """First it waits until no Service leads to it, which counts too."""
    program, seconds = SERVER["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    patience = TEMPLATE["spec"]["terminationGracePeriodSeconds"]
    assert patience > int(seconds) + DRAIN_S
    for name in ("jobset-tpu.yaml", "leaderworkerset-gpu.yaml"):
        text = (DEPLOY / name).read_text()
        found = re.findall(r"terminationGracePeriodSeconds: (\d+)", text)
        assert found
        assert all(int(each) > DRAIN_S for each in found)


def test_the_disruption_budget_leaves_a_server():
    budget = HTTP["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    update = HTTP["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    least = HTTP["HorizontalPodAutoscaler"]["spec"]["minReplicas"]
    assert budget < least
    assert update["maxUnavailable"] < least
    assert "replicas" not in HTTP["Deployment"]["spec"]  # the autoscaler's


@pytest.mark.usefixtures("_flags")
def test_the_autoscaler_reads_gauges_that_the_server_exports():
    spec = HTTP["HorizontalPodAutoscaler"]["spec"]
    targets = {
        each["pods"]["metric"]["name"]: int(each["pods"]["target"]["averageValue"])
        for each in spec["metrics"]
    }
    waiting, running = "llama_jax_num_requests_waiting", "llama_jax_num_requests_running"
    assert set(targets) == {waiting, running}
    assert set(targets) <= set(exported_metrics())
    _, flags = read_command(["llama-jax", *SERVER["args"]])
    # A full pod must be beyond the target, and so must one long before its queue is full.
    assert targets[running] < int(flags["slots"])
    assert targets[waiting] < int(flags["max_queue"]) / 4


@pytest.mark.deploy
def test_the_adapter_serves_the_autoscaler_its_gauges():
    import promql_parser

    (rule,) = yaml.safe_load((DEPLOY / "prometheus/adapter.yaml").read_text())["rules"]["custom"]
    series = promql_parser.parse(rule["seriesQuery"])
    assert isinstance(series, promql_parser.VectorSelector)
    matchers = {each.name: each.value for each in series.matchers.matchers}
    scaled = [
        each["pods"]["metric"]["name"]
        for each in HTTP["HorizontalPodAutoscaler"]["spec"]["metrics"]
    ]
    for name in scaled:
        assert re.fullmatch(matchers["__name__"], name)
    # Each label that is a resource is one that prometheus.yml writes.
    written = (DEPLOY / "prometheus/prometheus.yml").read_text()
    assert rule["resources"]["overrides"] == {
        name: {"resource": name} for name in ("namespace", "pod")
    }
    assert all(f"target_label: {name}\n" in written for name in rule["resources"]["overrides"])
    query = rule["metricsQuery"].replace("<<.Series>>", scaled[0]).replace("<<.GroupBy>>", "pod")
    promql_parser.parse(query.replace("<<.LabelMatchers>>", 'namespace="default",pod=~"a|b"'))


@pytest.mark.parametrize("template", [TEMPLATE, BATCH["spec"]["template"]])
def test_a_container_runs_as_the_image_s_user_and_writes_into_volumes_alone(template):
    (user,) = values("USER")
    pod, container = template["spec"]["securityContext"], container_of(template)
    assert f"{pod['runAsUser']}:{pod['runAsGroup']}" == user
    assert pod["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    assert {json.loads(values("VOLUME")[0])[1], "/tmp"} <= set(mounts)
    assert {each["name"] for each in mounts.values()} == {
        each["name"] for each in template["spec"]["volumes"]
    }
    checkpoint = environment()[CHECKPOINT_VARIABLE]
    assert mounts[checkpoint]["readOnly"]
    assert f"--checkpoint={checkpoint}" in container["args"]
    assert "command" not in container  # the image's entry point has tini


@pytest.mark.usefixtures("_flags")
@pytest.mark.parametrize("container", [SERVER, WORKER])
def test_the_model_fits_the_gpu(check_fits, container):
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    _, flags = read_command(["llama-jax", *container["args"]], {"JOB_COMPLETION_INDEX": "0"})
    assert flags["dtype"] == "float16"
    check_fits("7b", "a100-80", flags)


@pytest.mark.usefixtures("_flags")
def test_each_index_of_the_batch_has_files_of_its_own():
    spec = BATCH["spec"]
    assert spec["completionMode"] == "Indexed"
    assert 0 < spec["parallelism"] <= PARTS
    files = set()
    for index in range(PARTS):
        verb, flags = read_command(
            ["llama-jax", *WORKER["args"]], {"JOB_COMPLETION_INDEX": str(index)}
        )
        assert verb == "batch"
        assert flags["input"] == f"/batch/requests-{index}.jsonl"
        files |= {flags["input"], flags["output"]}
    assert len(files) == 2 * PARTS


def test_a_pod_of_the_batch_is_started_anew_unless_its_input_is_wrong():
    """What is run again continues; exit status 2 would come again (`python run.py --help`)."""
    spec = BATCH["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["backoffLimitPerIndex"] > 0
    assert spec["podReplacementPolicy"] == "Failed"  # the first one's lock must be gone
    drained, wrong = spec["podFailurePolicy"]["rules"]
    assert drained["action"] == "Ignore"
    assert wrong["action"] == "FailIndex"
    assert wrong["onExitCodes"]["values"] == [2]
    assert wrong["onExitCodes"]["containerName"] == WORKER["name"]


@pytest.mark.parametrize("total", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("end", ["\n", ""])
def test_the_command_cuts_a_file_into_the_batch_s_parts(total, end, tmp_path):
    text = (DEPLOY / "job-batch.yaml").read_text()
    command = re.sub(r"\n#", "\n", re.findall(r"^#   (awk .+?jsonl\n)", text, re.M | re.S)[0])
    lines = [f'{{"prompt": "{i}"}}' for i in range(total)]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines) + end)
    subprocess.run(["sh", "-euc", command], cwd=tmp_path, check=True)
    parts = {f"requests-{index}.jsonl" for index in range(PARTS)}
    made = {path.name for path in tmp_path.iterdir()} - {"requests.jsonl"}
    assert made <= parts
    assert made == parts or total < PARTS
    read = [line for name in sorted(made) for line in (tmp_path / name).read_text().splitlines()]
    assert read == lines


@pytest.mark.slow
def test_two_indexes_answer_their_parts_and_continue(tmp_path):
    """The containers' own arguments, on the demo model."""
    part = [json.dumps({"custom_id": str(i), "prompt": "Hi", "max_tokens": 2}) for i in range(4)]
    for index in range(2):
        lines = part[2 * index : 2 * index + 2]
        (tmp_path / f"requests-{index}.jsonl").write_text("\n".join(lines))
    for index in (0, 1, 1):
        arguments = [
            argument.replace("/batch/", f"{tmp_path}/")
            .replace("--checkpoint=/checkpoint", f"--checkpoint={DEMO_CHECKPOINT}")
            .replace("$(JOB_COMPLETION_INDEX)", str(index))
            for argument in WORKER["args"]
        ]
        done = subprocess.run(
            [sys.executable, ROOT / "run.py", *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "results-1.jsonl has 2 of 2 results already" in done.stderr
    rows = [
        json.loads(line)
        for index in range(2)
        for line in (tmp_path / f"results-{index}.jsonl").read_text().splitlines()
    ]
    assert [row["custom_id"] for row in rows] == ["0", "1", "2", "3"]
