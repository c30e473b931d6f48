"""The manifests of deploy/: their flags are the program's, and their counts agree.

No cluster runs them here. What is held is what a reader of the files could get wrong.
"""

import math
import os
import re
import shlex
import subprocess

import pytest
import yaml

from llama_jax.cli.flags import FLAGS
from llama_jax.cli.verbs import VERBS
from llama_jax.server.auth import OPEN_PATHS
from tests.helpers import ROOT

pytestmark = pytest.mark.usefixtures("_flags")

DEPLOY = ROOT / "deploy"
SLURM = DEPLOY / "slurm.sh"
DIRECTIVES = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SLURM.read_text(), re.MULTILINE))
CONFIG = f"--config={ROOT / 'configs/llama-2-70b.json'}"


def load(name, kind):
    """Return the documents of a manifest: the one of a kind, and its Service."""
    documents = {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / name).read_text())}
    assert set(documents) == {kind, "Service"}
    return documents[kind], documents["Service"]


@pytest.fixture(scope="module")
def jobset():
    document, service = load("jobset-tpu.yaml", "JobSet")
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    (replicated,) = document["spec"]["replicatedJobs"]
    return document["spec"], replicated, service


@pytest.fixture(scope="module")
def lws():
    document, service = load("leaderworkerset-gpu.yaml", "LeaderWorkerSet")
    assert document["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    return document["spec"], document["spec"]["leaderWorkerTemplate"], service


def container_of(template):
    (container,) = template["spec"]["containers"]
    return container


def parsed(command, environment=()):
    """Check a command line against the program's flags; return its verb and values."""
    program, verb, *arguments = command
    assert program == "llama-jax"
    values = {}
    for argument in arguments:
        for name, value in dict(environment).items():
            argument = argument.replace(f"$({name})", value)
        name, _, value = argument.removeprefix("--").partition("=")
        values[name] = value
        assert name in VERBS[verb].takes, argument
        FLAGS[name].parser.parse(value or "true")
        assert "$" not in value
    assert len(values) == len(arguments), "a flag is given twice"
    return verb, values


def check_fits(cli, chip, values):
    """Check that 70B fits that many of these chips, with the manifest's slots."""
    names = ("dtype", "devices", "slots")
    flags = [f"--{name}={values[name]}" for name in names if name in values]
    status, out, err = cli("serve", "--estimate", CONFIG, f"--chip={chip}", *flags)
    assert (status, err) == (0, "")
    assert "fits; " in out.splitlines()[-1]
    assert f"on each of {values['devices']} devices" in out


@pytest.mark.parametrize("path", sorted(DEPLOY.iterdir()), ids=lambda path: path.name)
def test_a_manifest_says_that_it_was_not_run(path):
    text = path.read_text()
    first, second = [line for line in text.splitlines() if line != "#!/usr/bin/env bash"][:2]
    assert first.startswith("# NOT RUN ON A CLUSTER. ")
    assert second.startswith("#")
    assert path.name in (ROOT / "docs/scaling.md").read_text()


def test_the_jobset_has_a_process_a_host_and_all_chips(cli, jobset):
    _, replicated, _ = jobset
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    container = container_of(job["template"])
    assert replicated["replicas"] == 1
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    selector = pod["nodeSelector"]
    topology = selector["cloud.google.com/gke-tpu-topology"]
    assert math.prod(map(int, topology.split("x"))) == chips
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    verb, values = parsed([*container["command"], *container["args"]])
    assert (verb, values["devices"], values["dtype"]) == ("serve", str(chips), "bfloat16")
    check_fits(cli, "v5e", values)


def test_the_jobset_restarts_as_a_whole(jobset):
    spec, replicated, _ = jobset
    job = replicated["template"]["spec"]
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["failurePolicy"]["maxRestarts"] > 0
    # Hosts look for each other before any is ready.
    assert spec["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}


def test_the_jobset_s_service_is_process_0(jobset):
    _, replicated, service = jobset
    template = replicated["template"]["spec"]["template"]
    labels = template["metadata"]["labels"] | {"batch.kubernetes.io/job-completion-index": "0"}
    assert service["spec"]["selector"] == labels
    check_ports(service, container_of(template))


@pytest.mark.parametrize("index", ["0", "3"])
def test_only_process_0_of_the_jobset_is_asked_whether_it_is_ready(jobset, index, tmp_path):
    """Nothing listens here: process 0 is not ready, the others are."""
    container = container_of(jobset[1]["template"]["spec"]["template"])
    program, option, script = container["readinessProbe"]["exec"]["command"]
    assert "/readyz" in script
    port = next(port["containerPort"] for port in container["ports"] if port["name"] == "http")
    assert f"127.0.0.1:{port}/" in script
    script = script.replace(f":{port}/", ":1/")
    environment = {**os.environ, "JOB_COMPLETION_INDEX": index}
    done = subprocess.run(
        [program, option, script], env=environment, capture_output=True, text=True
    )
    assert (done.returncode == 0) == (index != "0")
    assert ("Connection refused" in done.stderr) == (index == "0")


def test_the_leaderworkerset_has_a_process_a_host_and_all_gpus(cli, lws):
    _, group, _ = lws
    commands = []
    for index, name in enumerate(("leaderTemplate", "workerTemplate")):
        container = container_of(group[name])
        # As the controller sets it in each container.
        environment = {
            "LWS_LEADER_ADDRESS": "llama-70b-0.llama-70b.default",
            "LWS_GROUP_SIZE": str(group["size"]),
            "LWS_WORKER_INDEX": str(index),
        }
        command = [*container["command"], *container["args"]]
        verb, values = parsed(command, environment)
        assert verb == "serve"
        assert values["num_processes"] == str(group["size"])
        assert values["process_id"] == str(index)
        _, _, port = values["coordinator_address"].partition(":")
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert values["devices"] == str(group["size"] * gpus)
        commands.append(command)
    assert commands[0] == commands[1]
    ports = {
        each["name"]: each["containerPort"]
        for each in container_of(group["leaderTemplate"])["ports"]
    }
    assert ports["coordinator"] == int(port)
    check_fits(cli, "a100-40", values)


def test_the_leaderworkerset_restarts_as_a_whole(lws):
    spec, group, _ = lws
    assert group["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert spec["startupPolicy"] == "LeaderCreated"  # a leader waits for its workers to get ready


def test_only_the_leader_has_the_service_and_probes(lws):
    _, group, service = lws
    leader, worker = (container_of(group[f"{name}Template"]) for name in ("leader", "worker"))
    assert service["spec"]["selector"] == group["leaderTemplate"]["metadata"]["labels"]
    assert service["spec"]["selector"] != group["workerTemplate"]["metadata"]["labels"]
    check_ports(service, leader)
    probes = {name: each["httpGet"] for name, each in leader.items() if name.endswith("Probe")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/healthz",
        "livenessProbe": "/healthz",
        "readinessProbe": "/readyz",
    }
    assert {probe["path"] for probe in probes.values()} <= OPEN_PATHS  # probes send no token
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert not any(name.endswith("Probe") for name in worker)
    # As long as processes wait for each other, and then some minutes to load the model.
    startup, values = leader["startupProbe"], dict(a[2:].split("=", 1) for a in leader["args"])
    patience = startup["periodSeconds"] * startup["failureThreshold"]
    assert patience > 2 * int(values["initialization_timeout_s"])


def check_ports(service, container):
    """Check that the Service leads to the port that the server listens on."""
    (port,) = service["spec"]["ports"]
    named = {each["name"]: each["containerPort"] for each in container["ports"]}
    arguments = [argument for argument in container["args"] if argument.startswith("--port=")]
    assert arguments == [f"--port={named[port['targetPort']]}"]
    assert "--host=0.0.0.0" in container["args"]
    assert "LLAMA_JAX_API_TOKEN" in [each["name"] for each in container["env"]]


def test_the_slurm_script_starts_a_process_a_node_with_all_gpus(cli, tmp_path):
    nodes, gpus = int(DIRECTIVES["nodes"]), int(DIRECTIVES["gpus-per-node"])
    assert DIRECTIVES["ntasks-per-node"] == "1"
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$JAX_LOCAL_DEVICE_IDS" "${https_proxy-none}" "$@"\n')
    srun.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "https_proxy": "http://proxy",
        # As SLURM sets them in a batch script.
        "SLURM_NNODES": str(nodes),
        "SLURM_GPUS_ON_NODE": str(gpus),
        "SLURM_CPUS_PER_TASK": DIRECTIVES["cpus-per-task"],
    }
    for example in re.findall(
        r"^#.* sbatch deploy/slurm\.sh (.+)$", SLURM.read_text(), re.MULTILINE
    ):
        arguments = shlex.split(example)
        done = run_script(environment, *arguments)
        assert done.returncode == 0, done.stderr
        ids, proxy, *options = done.stdout.split()
        assert ids == ",".join(map(str, range(gpus)))
        assert proxy == "none"
        assert "--kill-on-bad-exit=1" in options
        command = options[options.index("llama-jax") :]
        assert command[1:-1] == arguments
        verb, values = parsed(command)
        assert verb == arguments[0]
        assert values["devices"] == str(nodes * gpus)
        check_fits(cli, "a100-40", values)
    done = run_script(environment)
    assert done.returncode == 1
    assert "arguments of llama-jax, such as serve" in done.stderr


def run_script(environment, *arguments):
    return subprocess.run(
        ["bash", str(SLURM), *arguments], env=environment, capture_output=True, text=True
    )
