"""The files of deploy/ in tests: their documents, containers and command lines."""

from typing import Any

import yaml

from llama_jax.cli.flags import FLAGS
from llama_jax.cli.verbs import VERBS
from llama_jax.server import serve
from llama_jax.server.settings import Settings
from tests.helpers import ROOT

DEPLOY = ROOT / "deploy"

DRAIN_S = Settings.drain_s + serve._FLUSH_S
"""The longest time from a server's first signal to its end."""


def documents(name: str) -> dict[str, Any]:
    """Return the documents of a manifest by kind; each kind is there once."""
    found = list(yaml.safe_load_all((DEPLOY / name).read_text()))
    by_kind = {each["kind"]: each for each in found}
    assert len(by_kind) == len(found)
    return by_kind


def container_of(template: dict[str, Any]) -> dict[str, Any]:
    """Return the one container of a pod's template."""
    (container,) = template["spec"]["containers"]
    return container


def read_command(command: list[str], environment: dict[str, str] | None = None):
    """Check a command line against the program's flags; return its verb and values.

    Args:
        command: program, verb and flags.
        environment: values that Kubernetes writes in place of `$(NAME)`.
    """
    program, verb, *arguments = command
    assert program.rpartition("/")[2] == "llama-jax"
    values = {}
    for argument in arguments:
        for name, value in (environment or {}).items():
            argument = argument.replace(f"$({name})", value)
        name, _, value = argument.removeprefix("--").partition("=")
        values[name] = value
        assert name in VERBS[verb].takes, argument
        FLAGS[name].parser.parse(value or "true")
        assert "$" not in value
    assert len(values) == len(arguments), "a flag is given twice"
    return verb, values


def check_ports(service: dict[str, Any], container: dict[str, Any]) -> None:
    """Check that the Service leads to the port that the server listens on."""
    (port,) = service["spec"]["ports"]
    named = {each["name"]: each["containerPort"] for each in container["ports"]}
    arguments = [argument for argument in container["args"] if argument.startswith("--port=")]
    assert arguments == [f"--port={named[port['targetPort']]}"]
    assert "--host=0.0.0.0" in container["args"]
    assert "LLAMA_JAX_API_TOKEN" in [each["name"] for each in container["env"]]


def holds(whole: Any, part: Any) -> bool:
    """Return whether a parsed document has all of another's fields and values."""
    if isinstance(part, dict):
        return all(name in whole and holds(whole[name], value) for name, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(holds, whole, part))
    return whole == part
