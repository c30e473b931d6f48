"""Fingerprint: a short name for everything, except the request, that decides the tokens."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib

import jax

from llama_jax.decode.executor import Executor
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


def fingerprint(checkpoint: Checkpoint, executor: Executor) -> str:
    """Return `fp_` and 16 hexadecimal digits: of weights, program, versions and kind of device.

    The sizes of batch and cache, and the numbers of devices and replicas, are part of it where the
    bits of a logit can depend on them. It begins with `fp_fast_` where strict determinism would
    compute otherwise.
    """
    plan = executor.plan
    # Of a GPU or TPU it is promised, and not measured yet.
    is_known = plan.slots_invariant and executor.device.platform == "cpu"
    parts = {
        "weights": checkpoint.root,
        "tokenizer": checkpoint.tokenizer_digest,
        "config": dataclasses.asdict(checkpoint.config),
        "dtype": checkpoint.dtype,
        "plan": plan._asdict(),
        "sizes": None if is_known else (executor.sizes.slots_each, executor.sizes.capacity),
        "mesh": None if plan.batch_invariant else dict(executor.mesh.shape),
        "instructions": instruction_set() if plan.batch_invariant else None,
        "device": executor.device.device_kind,
        "sampler": SAMPLER_VERSION,
        "code": code_digest(PACKAGE),
        "compiler": {name: compiler_flags(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        "settings": {name: str(jax.config.values.get(name)) for name in IN_FINGERPRINT},
        "versions": {
            "llama_jax": __version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        },
    }
    text = json.dumps(parts, sort_keys=True)
    prefix = "fp_" if plan.slots_invariant else "fp_fast_"
    return prefix + hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def code_digest(package: pathlib.Path) -> str:
    """Return the SHA-256 of the sources that decide tokens, those of the CPU kernels included."""
    found = (file for folder in _FOLDERS for file in (package / folder).iterdir())
    files = sorted(file for file in found if file.suffix in (".py", ".cc"))
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
