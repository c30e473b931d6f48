"""Fingerprint: a short name for everything, except the request, that decides the tokens."""

import dataclasses
import hashlib
import importlib.metadata
import json

from llama_jax.decode.executor import Executor
from llama_jax.decode.sampling import SAMPLER_VERSION
from llama_jax.nn.cpu_kernels import instruction_set
from llama_jax.version import __version__
from llama_jax.weights.checkpoint import Checkpoint


def fingerprint(checkpoint: Checkpoint, executor: Executor) -> str:
    """Return `fp_` and 16 hexadecimal digits: of weights, program, versions and kind of device.

    The sizes of batch and cache are part of it where the bits of a logit can depend on them.
    """
    plan = executor.plan
    parts = {
        "weights": checkpoint.root,
        "config": dataclasses.asdict(checkpoint.config),
        "dtype": checkpoint.dtype,
        "plan": plan._asdict(),
        "sizes": None if plan.batch_invariant else (executor.batch, executor.sizes.capacity),
        "instructions": instruction_set() if plan.batch_invariant else None,
        "device": executor.device.device_kind,
        "sampler": SAMPLER_VERSION,
        "versions": {
            "llama_jax": __version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        },
    }
    text = json.dumps(parts, sort_keys=True)
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:16]
