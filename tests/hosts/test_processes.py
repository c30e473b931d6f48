"""Several processes run one model: the same bits as one, and none is left when one is lost."""

import contextlib
import http.client
import json
import re
import signal
import socket

import pytest

from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.llama import Llama
from tests.helpers import batches
from tests.helpers.commands import PARIS, PARIS_ANSWER, run_py
from tests.helpers.processes import ends, free_port, launch, started
from tests.helpers.serving import COMPLETIONS, MODEL, RUN, wait_until

LONG = " ".join(["Once there was a king."] * 20)
SAMPLED = {"seed": 2**63, "max_tokens": 8}
REQUESTS = [
    {"prompt": "What is the capital of France?", "seed": 0, "temperature": 0, "logprobs": 3},
    *({"prompt": "Tell me a story.", "seed": seed, "max_tokens": 8} for seed in range(1, 5)),
    {
        "prompt": LONG,
        "seed": 5,
        "max_tokens": 20,
        "temperature": 2,
        "top_p": 0.9,
        "top_k": 40,
        "logprobs": 2,
    },
    {"prompt": LONG + " So", "seed": 0, "max_tokens": 0, "prompt_logprobs": True},
    {
        "prompt": "The king",
        "raw": True,
        "seed": 2**63,
        "repetition_penalty": 1.3,
        "max_tokens": 20,
        "stop": ["the"],
    },
    {"prompt": "x", "seed": 1, "temperature": 0, "allowed_tokens": [345, 346], "max_tokens": 40},
    {"prompt": "x", "max_tokens": 100_000},
]
"""The last but one repeats itself, and the last does not fit."""


def without_times(rows):
    for row in rows:
        for name in ("timings", "speculation"):
            row.get("result", {}).pop(name, None)
    return rows


@pytest.mark.parametrize(
    ("devices", "speculate"),
    [
        pytest.param(1, "ngram", marks=pytest.mark.slow),
        pytest.param(1, "off", marks=pytest.mark.exhaustive),
        pytest.param(2, "off", marks=pytest.mark.exhaustive),
    ],
)
def test_a_batch_gives_what_one_process_gives(tmp_path, devices, speculate):
    """Tokens, log-probabilities of answers and prompts, errors, and the fingerprint."""
    given = tmp_path / "in.jsonl"
    given.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    _, _, expected = batches.run((given, alone), Llama.load(slots=2))
    assert [row["line"] for row in expected if "error" in row] == [len(REQUESTS)]
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    files = ("--slots=2", f"--speculate={speculate}", f"--input={given}", f"--output={together}")
    with started("batch", *files, environments=[flags, flags]) as running:
        (first, _, said), second = ends(running)
    assert (first, second) == (2, (2, "", ""))  # one request has an error
    assert f"1 of {len(REQUESTS)} requests have an `error`" in said
    rows = [json.loads(line) for line in together.read_text().splitlines()]
    drafted = sum(
        row["result"]["speculation"]["drafted"]
        for row in rows
        if row.get("result", {}).get("speculation")
    )
    assert (drafted > 0) == (speculate == "ngram")
    assert without_times(rows) == without_times(expected)


@contextlib.contextmanager
def served(**options):
    """Serve by two processes, which must not outlive the block."""
    with (
        started("serve", "--port=0", "--slots=1", **options) as running,
        contextlib.ExitStack() as stack,
    ):
        yield Served(running, stack)


class Served:
    """A server of several processes."""

    def __init__(self, running, stack):
        self.running, self._stack = running, stack
        self.lines = []
        wait_until(self._is_ready, 120)
        self.port = int(re.search(r"serving .* open http://[^:]*:(\d+)", self.lines[-1])[1])

    def _is_ready(self):
        self.lines.append(line := self.running[0].stderr.readline())
        assert line, self.lines
        return "serving" in line

    def post(self, path, body):
        """Send a request; the connection is open until the server's end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        self._stack.enter_context(contextlib.closing(connection))
        connection.request("POST", path, json.dumps(body))
        return self._stack.enter_context(connection.getresponse())

    def begin(self):
        """Return a stream whose first token is there: no program is left to be compiled."""
        body = {"model": MODEL, "prompt": "x", "max_tokens": 60, "ignore_eos": True}
        stream = self.post(COMPLETIONS, body | {"stream": True})
        while not (line := stream.readline()).startswith(b"data:"):
            assert line
        return stream


@pytest.mark.parametrize(
    "victim",
    [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.exhaustive)],
)
def test_a_lost_process_ends_all_by_one_line(victim):
    """In the midst of an answer."""
    with served() as server:
        question = {"prompt": "What is the capital of France?", "temperature": 0}
        answer = json.loads(server.post(RUN, question).read())
        assert answer["result"]["response"] == PARIS_ANSWER.strip()
        server.begin()
        server.running[victim].kill()
        ended = ends(server.running)
    other = 1 - victim
    assert ended[victim][0] == -signal.SIGKILL
    status, _, said = ended[other]
    if other == 0:
        assert status == 1
        [line] = [line for line in said.splitlines() if "error:" in line]
        assert line == "error: process 1 at 127.0.0.1: it has ended; so all end"
    else:  # JAX's own client may notice it first, and abort
        assert status in (1, -signal.SIGABRT)
        assert "error: process 0 at 127.0.0.1 is lost; so this process ends" in said or status < 0


@pytest.mark.slow
def test_a_launcher_s_signal_drains():
    """It comes to all processes: answers in flight are ended, then all end well."""
    with served() as server:
        stream = server.begin()
        for process in server.running:
            process.send_signal(signal.SIGTERM)
        assert stream.read().endswith(b"data: [DONE]\n\n")
        (first, _, said), second = ends(server.running)
    assert (first, second) == (0, (0, "", ""))
    assert "error:" not in said


@pytest.mark.slow
def test_a_launcher_is_recognised():
    """SLURM's variables; the others of its kind are JAX's to test."""
    port = free_port()
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(port),
    }
    ranks = [slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    with started(PARIS, "--temperature=0", environments=ranks, by_flags=False) as running:
        (first, answer, _), second = ends(running)
    assert (first, answer, second) == (0, PARIS_ANSWER, (0, "", ""))


@pytest.mark.slow
def test_a_process_with_other_settings_is_named():
    """Its bits could be others."""
    other = {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}
    with started(PARIS, environments=[{}, other]) as running:
        (first, answer, said), (second, *_) = ends(running)
    assert (first, second, answer) == (1, 2, "")
    [line] = [line for line in said.splitlines() if "error" in line]
    assert line.startswith("error: process 1 at 127.0.0.1: its model's fingerprint is fp_")
    assert line.endswith("versions, kernels, processors and XLA flags; so all end")


@pytest.mark.slow
def test_what_another_process_lacks_is_told_by_the_first(tmp_path):
    """Each one's own folder stands for its host's disk."""
    hosts = [tmp_path / "first", tmp_path / "second"]
    for host in hosts:
        host.mkdir()
    (hosts[0] / "demo").symlink_to(DEMO_CHECKPOINT)
    with started(PARIS, "--checkpoint=/proc/self/cwd/demo", folders=hosts) as running:
        (first, _, said), (second, *others) = ends(running)
    reason = "checkpoint /proc/self/cwd/demo does not exist; check the path"
    assert (first, said) == (1, f"error: process 1 at 127.0.0.1: {reason}; so all end\n")
    assert (second, others) == (2, ["", ""])


@pytest.mark.slow
def test_a_draft_model_is_refused():
    flags = ("--prompt=x", f"--speculate={DEMO_CHECKPOINT}")
    with started(*flags) as running:
        (first, _, said), _ = ends(running)
    assert first == 2
    assert "a model of several processes cannot have a draft model; choose ngram or off" in said


def test_a_mistake_ends_all_by_one_line():
    with started(PARIS, "--checkpoint=/nowhere") as running:
        (first, _, said), (second, *others) = ends(running)
    assert (first, said) == (2, "error: checkpoint /nowhere does not exist; check the path\n")
    assert (second, others) == (2, ["", ""])


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_who_finds_nobody_says_so_in_time(process):
    timeout = "--initialization_timeout_s=1"
    done = run_py(PARIS, timeout, *launch(process, 2, free_port()))
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: the processes did not find each other at 127\.0\.0\.1:\d+ within 1 s; start them "
        "all, with the address of process 0, which the others must be able to reach\n",
        done.stderr,
    )


@pytest.mark.slow
def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        done = run_py(PARIS, *launch(0, 2, port))
    assert done.returncode == 2
    assert re.fullmatch(
        rf"error: .* port {port}, on which .* \(.*\); choose another\n", done.stderr
    )
