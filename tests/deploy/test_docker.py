"""deploy/Dockerfile: a linter finds nothing in it, and it agrees with the program."""

import http.server
import json
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib

import pytest

from llama_jax.server import signals
from llama_jax.server.auth import OPEN_PATHS
from llama_jax.source import CHECKPOINT_VARIABLE
from llama_jax.user_cache import VARIABLE as CACHE_VARIABLE
from tests.helpers import ROOT
from tests.helpers.dockerfile import DOCKERFILE, STEPS, copied, environment, values
from tests.helpers.manifests import DRAIN_S, read_command

TEXT = DOCKERFILE.read_text()
DOCS = (ROOT / "docs/deploy.md").read_text()


def test_hadolint_finds_nothing(hadolint):
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_process_has_a_user_of_its_own():
    assert values("USER") == ["10001:10001"]
    (run,) = values("RUN")
    assert "useradd --uid=10001 --gid=10001" in run


def test_the_compiler_stays_in_the_build_stage():
    assert "apt-get install --yes --no-install-recommends g++" in values("RUN", STEPS)[0]
    (run,) = values("RUN")
    (installs,) = re.findall(r"apt-get install ([^&]+)&&", run)
    assert installs.split() == ["--yes", "--no-install-recommends", "tini"]
    assert values("COPY") == ["--from=build /opt/llama_jax /opt/llama_jax"]


def test_checkpoint_and_cache_are_volumes():
    variables = environment()
    volumes = [variables[CHECKPOINT_VARIABLE], variables[CACHE_VARIABLE]]
    (declared,) = values("VOLUME")
    assert json.loads(declared) == volumes


@pytest.mark.usefixtures("_flags")
def test_the_image_serves_on_the_port_that_it_exposes():
    (entry,), (command,) = values("ENTRYPOINT"), values("CMD")
    *init, program = json.loads(entry)
    assert init == ["tini", "--"]  # as process 1 a loading server would not get its signal
    verb, flags = read_command([program, *json.loads(command)])
    assert (verb, flags["host"]) == ("serve", "0.0.0.0")
    assert [flags["port"]] == values("EXPOSE")


def test_a_stop_begins_a_drain():
    (signal,) = values("STOPSIGNAL")
    assert signal in signals._DRAINING
    patience = re.findall(r"--stop-timeout=(\d+)", TEXT + DOCS)
    assert len(patience) > 1
    assert all(int(seconds) > DRAIN_S for seconds in patience)


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_is_the_status_of_an_open_route(status):
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format, *args):
            pass

    (check,) = values("HEALTHCHECK")
    _, program, option, code = ["", *json.loads(check.partition(" CMD ")[2])]
    (port,) = values("EXPOSE")
    assert (program, option) == ("python", "-c")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        code = code.replace(port, str(server.server_port))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
    assert (done.returncode == 0) == (status == 200), done.stderr
    assert len(paths) == 1
    assert set(paths) <= OPEN_PATHS


def test_the_build_sees_what_it_copies_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    let_in = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    assert let_in == copied()
    assert all((ROOT / name).exists() for name in let_in)
    assert patterns[1 + len(let_in) :] == ["**/__pycache__", "**/*.so"]


def test_the_extras_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"EXTRAS=([\w,]+)", TEXT + DOCS)
    assert {"serve", "serve,cuda", "serve,tpu"} <= set(named)
    for extras in named:
        assert {*extras.split(",")} <= {*project["optional-dependencies"]}


@pytest.mark.slow
def test_the_package_builds_from_what_is_copied(tmp_path, monkeypatch):
    """Without kernels, which take a minute: a compiler that fails leaves them out."""
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("CC", "false")
    source = tmp_path / "source"
    source.mkdir()
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    done = subprocess.run([*command, f"-w{tmp_path}", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True, check=True
    ).stdout
    assert "llama_jax/demo/checkpoint/manifest.json" in names
    assert "convert/configs/llama-2-7b.json" in names


def builder():
    """Return a program that builds and runs images here; None: there is none."""
    for name in ("docker", "podman"):
        if (
            shutil.which(name)
            and not subprocess.run([name, "info"], capture_output=True).returncode
        ):
            return name
    return None


@pytest.mark.slow
def test_the_image_serves_and_drains():
    program = builder()
    if program is None:
        pytest.skip("needs docker or podman, and the registry of the base image")

    def run(*arguments: str | pathlib.Path) -> str:
        command = [program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    image = "llama_jax:test"
    run("build", f"--file={DOCKERFILE}", f"--tag={image}", ROOT)
    demo = ("--env=LLAMA_JAX_CHECKPOINT=", "--env=LLAMA_JAX_API_TOKEN=x")
    name = run("run", "--detach", "--read-only", "--tmpfs=/tmp", *demo, image)
    try:
        check = json.loads(values("HEALTHCHECK")[0].partition(" CMD ")[2])
        deadline = time.monotonic() + 300
        while subprocess.run([program, "exec", name, *check], capture_output=True).returncode:
            assert time.monotonic() < deadline, run("logs", name)
            time.sleep(1)
        assert run("exec", name, "id", "-u") == "10001"
        assert subprocess.run([program, "exec", name, "which", "g++"]).returncode != 0
        run("stop", "--time=45", name)
        assert run("inspect", "--format={{.State.ExitCode}}", name) == "0"
    finally:
        run("rm", "--force", "--volumes", name)
