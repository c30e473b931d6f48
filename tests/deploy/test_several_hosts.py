"""The manifests for several hosts: their flags are the program's, and their counts agree.

No cluster runs them here. What is held is what a reader of the files could get wrong.
"""

import math
import os
import re
import shlex
import subprocess

import pytest

from llama_jax.server.auth import OPEN_PATHS
from tests.helpers.manifests import DEPLOY, check_ports, container_of, documents, read_command

pytestmark = pytest.mark.usefixtures("_flags")

SLURM = DEPLOY / "slurm.sh"
DIRECTIVES = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SLURM.read_text(), re.MULTILINE))


def load(name, kind):
    """Return the documents of a manifest: the one of a kind, and its Service."""
    found = documents(name)
    assert set(found) == {kind, "Service"}
    return found[kind], found["Service"]


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


def test_the_jobset_has_a_process_a_host_and_all_chips(check_fits, jobset):
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
    verb, values = read_command([*container["command"], *container["args"]])
    assert (verb, values["devices"], values["dtype"]) == ("serve", str(chips), "bfloat16")
    check_fits("70b", "v5e", values)


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


def test_the_leaderworkerset_has_a_process_a_host_and_all_gpus(check_fits, lws):
    _, group, _ = lws
    leader = container_of(group["leaderTemplate"])
    ports = {each["name"]: each["containerPort"] for each in leader["ports"]}
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
        verb, values = read_command(command, environment)
        assert verb == "serve"
        assert values["num_processes"] == str(group["size"])
        assert values["process_id"] == str(index)
        assert values["coordinator_address"].endswith(f":{ports['coordinator']}")
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert values["devices"] == str(group["size"] * gpus)
        check_fits("70b", "a100-40", values)
        commands.append(command)
    assert commands[0] == commands[1]


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


def test_the_slurm_script_starts_a_process_a_node_with_all_gpus(check_fits, tmp_path):
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
        verb, values = read_command(command)
        assert verb == arguments[0]
        assert values["devices"] == str(nodes * gpus)
        check_fits("70b", "a100-40", values)
    done = run_script(environment)
    assert done.returncode == 1
    assert "arguments of llama-jax, such as serve" in done.stderr


def run_script(environment, *arguments):
    return subprocess.run(
        ["bash", str(SLURM), *arguments], env=environment, capture_output=True, text=True
    )
