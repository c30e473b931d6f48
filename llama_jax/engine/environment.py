"""Environment: everything, except the request, that decides the tokens. Its name: fingerprint."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from llama_jax.config import INT8_LABEL
from llama_jax.decode.executor import Executor
from llama_jax.decode.host import vector_instructions
from llama_jax.decode.plan import Plan
from llama_jax.decode.sampling import SAMPLER_VERSION
from llama_jax.jax_settings import IN_FINGERPRINT
from llama_jax.nn.cpu_kernels import instruction_set
from llama_jax.version import __version__
from llama_jax.weights.checkpoint import Checkpoint

PACKAGE = pathlib.Path(__file__).parent.parent

_FOLDERS = ("", "text", "nn", "weights", "decode", "engine")
"""Where the sources lie that decide tokens. The dialog's template is in text/chat.py."""

_HARMLESS = ("--xla_dump_", "--xla_force_host_platform_device_count", "--xla_hlo_profile")
"""Beginnings of XLA's flags that change no bit."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """What a run depends on beside its request; see `describe`."""

    parts: Mapping[str, Any]
    """By name, as JSON has it: each can decide a token."""
    verified: bool = False
    """The weights were compared with their digests when they were loaded."""
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Slots, context, devices and replicas: they decide a token only where `parts` has them."""
    checkpoint: str | None = None
    """The name of the checkpoint's folder, for people; no part of a fingerprint or a receipt."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """`fp_` and 16 hexadecimal digits, of all parts.

        It begins with `fp_fast_` where strict determinism would compute otherwise.
        """
        text = json.dumps(self.parts, sort_keys=True)
        prefix = "fp_fast_" if self.parts.get("invariance") == "none" else "fp_"
        return prefix + hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def label(self) -> str | None:
        """What is to be said of the weights; None: nothing. See `ModelConfig.label`."""
        is_quantized = self.parts.get("config", {}).get("quantization") == "int8"
        return INT8_LABEL if is_quantized else None


UNKNOWN = Environment({})
"""Of an engine that was given none."""


def describe(checkpoint: Checkpoint, executor: Executor) -> Environment:
    """Return the environment: weights, program, versions and kind of device.

    The sizes of batch and cache, and the numbers of devices and replicas, are part of it where the
    bits of a logit can depend on them.
    """
    plan, mesh = executor.plan, dict(executor.mesh.shape)
    on_cpu = executor.device.platform == "cpu"
    # Of a GPU or TPU it is promised, and not measured yet.
    is_known = plan.slots_invariant and on_cpu
    # XLA compiles for the CPU that it finds, whose kind is "cpu", whatever it is.
    is_xla_on_cpu = on_cpu and not plan.batch_invariant
    parts = {
        "weights": checkpoint.root,
        "tokenizer": checkpoint.tokenizer_digest,
        "config": checkpoint.config.to_dict(),
        "dtype": checkpoint.dtype,
        "plan": _parts_of(plan),
        "invariance": _invariance(executor),
        "sizes": None if is_known else (executor.sizes.slots_each, executor.sizes.capacity),
        "mesh": None if plan.batch_invariant else mesh,
        "instructions": instruction_set() if plan.batch_invariant else None,
        "device": executor.device.device_kind,
        "vectors": vector_instructions() if is_xla_on_cpu else None,
        "sampler": SAMPLER_VERSION,
        "code": code_digest(PACKAGE),
        "compiler": {name: compiler_flags(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        "settings": {name: str(jax.config.values.get(name)) for name in IN_FINGERPRINT},
        "versions": {
            "llama_jax": __version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        },
    }
    sizes = {"slots": executor.batch, "context": executor.context, "devices": executor.mesh.size}
    sizes["replicas"] = executor.sizes.replicas
    values = json.loads(json.dumps(parts))
    return Environment(values, checkpoint.verified, sizes, checkpoint.folder)


def _parts_of(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON has it, without what changes no bit."""
    parts = plan._asdict() | {"kernels": plan.kernels._asdict()}
    if plan.batch_invariant:
        del parts["draft_tokens"]
    return parts


def _invariance(executor: Executor) -> str:
    """Return what a logit's bits do not depend on; see `Plan`."""
    if executor.plan.batch_invariant:
        return "batch"
    return "slots" if executor.plan.slots_invariant else "none"


@functools.cache
def code_digest(package: pathlib.Path) -> str:
    """Return the SHA-256 of the sources that decide tokens, those of the CPU kernels included."""
    found = (file for folder in _FOLDERS for file in (package / folder).iterdir())
    files = sorted(file for file in found if file.suffix in (".py", ".cc", ".h"))
    digests = [
        (file.relative_to(package).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest())
        for file in files
    ]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def compiler_flags(variable: str) -> dict[str, str]:
    """Return the flags in an environment variable of XLA that can change bits; the last holds."""
    flags = os.environ.get(variable, "").strip()
    if flags and not flags.startswith("-"):  # XLA reads them from the file of that name
        flags = pathlib.Path(flags).read_text(encoding="utf-8")
    parts = (flag.partition("=") for flag in flags.split() if not flag.startswith(_HARMLESS))
    return {name: value for name, _, value in parts}
