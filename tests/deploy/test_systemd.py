"""deploy/llama-jax.service: systemd knows its directives, and it agrees with the program."""

import re
import shlex
import shutil
import subprocess

import pytest

from llama_jax.server import signals
from llama_jax.source import CHECKPOINT_VARIABLE
from llama_jax.user_cache import VARIABLE as CACHE_VARIABLE
from tests.helpers.manifests import DEPLOY, DRAIN_S, read_command

UNIT = DEPLOY / "llama-jax.service"
BOOLEAN, SECONDS, MODE = r"yes|no", r"\d+(s|min)", r"0[0-7]{3}"
FOLDER, TARGET = r"[a-z_]+", r"[a-z-]+\.target"
DIRECTIVES = {
    "Unit": {
        "Description": r".+",
        "Wants": TARGET,
        "After": TARGET,
        "StartLimitIntervalSec": SECONDS,
        "StartLimitBurst": r"\d+",
    },
    "Service": {
        "Type": r"exec",
        "ExecStart": r"/\S+ .+",
        "Environment": r"\w+=\S+( \w+=\S+)*",
        "EnvironmentFile": r"/\S+",
        **dict.fromkeys(("StateDirectory", "CacheDirectory"), FOLDER),
        **dict.fromkeys(("StateDirectoryMode", "CacheDirectoryMode", "UMask"), MODE),
        "Restart": r"on-failure",
        "RestartPreventExitStatus": r"\d+",
        **dict.fromkeys(("RestartSec", "TimeoutStopSec"), SECONDS),
        "KillSignal": r"SIG[A-Z]+",
        "KillMode": r"mixed",
        "LimitNOFILE": r"\d+",
        **dict.fromkeys(("CapabilityBoundingSet", "AmbientCapabilities"), ""),
        "ProtectSystem": r"strict",
        "ProtectProc": r"invisible",
        "RestrictAddressFamilies": r"AF_\w+( AF_\w+)*",
        "SystemCallArchitectures": r"native",
        "SystemCallFilter": r"~?@[a-z-]+",
        "SystemCallErrorNumber": r"E[A-Z]+",
        **dict.fromkeys(
            (
                *("DynamicUser", "LockPersonality", "NoNewPrivileges", "PrivateDevices"),
                *("PrivateTmp", "PrivateUsers", "ProtectClock", "ProtectControlGroups"),
                *("ProtectHome", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules"),
                *("ProtectKernelTunables", "RemoveIPC", "RestrictNamespaces"),
                *("RestrictRealtime", "RestrictSUIDSGID"),
            ),
            BOOLEAN,
        ),
    },
    "Install": {"WantedBy": TARGET},
}
"""Directives of systemd.unit(5), systemd.service(5), systemd.exec(5) and systemd.kill(5): those
that the unit uses, with the form of each value."""

_MANAGERS = ("/lib/systemd/systemd", "/usr/lib/systemd/systemd")
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze"
)


def read_unit():
    """Return section, directive and value of each line."""
    section, found = "", []
    for line in UNIT.read_text().splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1]
        elif line and not line.startswith("#"):
            name, separator, value = line.partition("=")
            assert separator, line
            found.append((section, name, value))
    return found


LINES = read_unit()
SERVICE = {name: value for section, name, value in LINES if section == "Service"}


def test_every_directive_is_known_and_has_its_form():
    for section, name, value in LINES:
        assert name in DIRECTIVES[section], f"[{section}] has no {name}"
        assert re.fullmatch(DIRECTIVES[section][name], value), f"{name}={value}"
    names = [(section, name) for section, name, _ in LINES if name != "SystemCallFilter"]
    assert len(names) == len(set(names)), "a directive is given twice"


def test_the_manager_that_is_installed_knows_them():
    manager = next(filter(None, map(shutil.which, _MANAGERS)), None)
    if manager is None:
        pytest.skip("needs systemd")
    command = [manager, "--dump-configuration-items"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for names in DIRECTIVES.values():
        for name in names:
            assert re.search(rf"^{name}=", known, re.MULTILINE), name


@pytest.fixture
def installed(tmp_path):
    """The unit, with a program that is on this machine."""
    program = SERVICE["ExecStart"].split()[0]
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace(program, shutil.which("true") or ""))
    return path


@needs_systemd
def test_systemd_has_nothing_to_say_of_it(installed):
    command = ["systemd-analyze", "verify", "--man=no", installed]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_systemd_calls_it_hardened(installed):
    """The exposure is from 0 to 10, in tenths here; what is left is the network and XLA's needs."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", installed]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.usefixtures("_flags")
def test_it_serves_this_machine_by_the_program_s_flags():
    verb, flags = read_command(shlex.split(SERVICE["ExecStart"]))
    assert (verb, flags["host"]) == ("serve", "127.0.0.1")
    assert flags["port"] in (DEPLOY / "prometheus/prometheus.yml").read_text()


def test_its_folders_are_those_that_the_program_reads():
    variables = dict(each.split("=") for each in SERVICE["Environment"].split())
    assert variables == {
        CHECKPOINT_VARIABLE: f"%S/{SERVICE['StateDirectory']}/checkpoint",
        CACHE_VARIABLE: f"%C/{SERVICE['CacheDirectory']}",
    }
    text = UNIT.read_text()
    assert f"cp -r DIR /var/lib/{SERVICE['StateDirectory']}/checkpoint" in text
    assert f"install -m 600 /dev/stdin {SERVICE['EnvironmentFile']}" in text
    assert 'echo "LLAMA_JAX_API_TOKEN=' in text


def test_it_stops_by_a_drain_and_waits_for_its_end():
    assert SERVICE["KillSignal"] in signals._DRAINING
    assert SERVICE["KillMode"] == "mixed"  # one signal: a second one would end the drain
    assert int(SERVICE["TimeoutStopSec"].removesuffix("s")) > DRAIN_S


def test_what_xla_and_the_memory_check_need_is_allowed():
    names = {name for _, name, _ in LINES}
    assert "MemoryDenyWriteExecute" not in names  # XLA compiles into memory, and runs it
    assert "ProcSubset" not in names  # /proc/meminfo
