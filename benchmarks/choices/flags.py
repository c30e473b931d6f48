"""How XLA is set: the decode program in fresh processes, each with other XLA_FLAGS."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks.choices.setting import Setting
from benchmarks.choices.trial import CannotRunError, Trial
from benchmarks.model_cost import decode_cost
from benchmarks.worker import ROOT, jax_settings
from llama_jax.decode.plan import choose_plan

ON_GPU = (
    "",
    "--xla_gpu_enable_cublaslt=true",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_enable_command_buffer=",
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE",
    "--xla_gpu_enable_dynamic_slice_fusion=true",
    "--xla_gpu_exhaustive_tiling_search=true",
)
"""Settings of interest; the last compiles long."""
LONGEST = 180
"""Seconds that one process may take."""


def flags(setting: Setting) -> Iterator[Trial]:
    """Time the plan's decoding at batch 1 under each setting of XLA_FLAGS."""
    settings = setting.xla_flags
    if settings is None:
        settings = list(ON_GPU) if setting.on_gpu else []
    if not settings:
        yield Trial({}, "flags", _none_here)
    dtype, size = setting.dtypes[0], setting.size
    for text in settings:
        yield Trial(
            {"dtype": dtype},
            text or "none",
            functools.partial(_time_in_process, setting, dtype, text),
            decode_cost(
                setting.config, dtype, batch=1, context=size.context, new_tokens=size.new_tokens
            ),
            dtype,
            tokens=size.new_tokens,
        )


def _none_here() -> float:
    raise CannotRunError("settings of interest are known for GPUs only; give --xla_flags")


def _time_in_process(setting: Setting, dtype: str, text: str) -> float:
    """Run a sweep of one way under these flags and return its seconds."""
    setting.release()  # the device's memory, for the process
    with tempfile.TemporaryDirectory(prefix="benchmarks_flags_") as folder:
        limits = pathlib.Path(folder) / "limits.json"
        limits.write_text(json.dumps(dataclasses.asdict(setting.limits)), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.sweep", "--only=steps", "--name=flags"]
        command += [f"--shape={setting.shape}", f"--size={setting.size_name}", f"--dtype={dtype}"]
        command += [f"--decode_steps={choose_plan(setting.config, dtype).decode_steps}"]
        command += [f"--limits={limits}", f"--output={folder}"]
        xla_flags = f"{os.environ.get('XLA_FLAGS', '')} {text}".strip()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | jax_settings() | {"XLA_FLAGS": xla_flags},
                capture_output=True,
                text=True,
                timeout=min(LONGEST, max(1, setting.left())),
            )
        except subprocess.TimeoutExpired as error:
            raise CannotRunError(f"not done after {error.timeout:.0f} s") from None
        path = pathlib.Path(folder) / "sweep-flags.json"
        rows = []
        if path.exists():
            rows = json.loads(path.read_text("utf-8"))["choices"]["steps"]["rows"]
    if not rows or rows[0]["seconds"] is None:
        reason = rows[0]["failed"] if rows else _last_words(done.stderr)
        raise CannotRunError(f"ended with status {done.returncode}: {reason}")
    return rows[0]["seconds"]


def _last_words(stderr: str) -> str:
    """Return the line that says most of why a process ended."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "flag" in line.lower() or "error" in line.lower()]
    return (telling or lines or ["it said nothing"])[-1][-300:]
