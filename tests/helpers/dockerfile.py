"""deploy/Dockerfile in tests: its instructions."""

import shlex

from tests.helpers.manifests import DEPLOY

DOCKERFILE = DEPLOY / "Dockerfile"
_LINES = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
_STEPS = [line for line in "\n".join(_LINES).replace("\\\n", " ").split("\n") if line]
STEPS = [(name, rest) for name, rest in (step.split(maxsplit=1) for step in _STEPS)]
"""Each instruction with what follows it."""

LAST_STAGE = STEPS[max(i for i, (name, _) in enumerate(STEPS) if name == "FROM") :]


def values(name: str, steps: list[tuple[str, str]] = LAST_STAGE) -> list[str]:
    """Return what follows each instruction of a name."""
    return [rest for each, rest in steps if each == name]


def environment() -> dict[str, str]:
    """Return the variables of the image."""
    words = [word for rest in values("ENV") for word in shlex.split(rest)]
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def copied() -> list[str]:
    """Return what the image is built from."""
    sources = [rest.split()[:-1] for rest in values("COPY", STEPS) if "--from" not in rest]
    return sorted(name for names in sources for name in names)
