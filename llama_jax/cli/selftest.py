"""The verb selftest: whether this installation draws what was recorded elsewhere."""

import importlib.metadata
import sys
import time

from llama_jax.cli.console import note
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.model import load_model
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.errors import printable
from llama_jax.llama import Llama
from llama_jax.progress import progress_bar
from llama_jax.replay.selftest import num_runs
from llama_jax.replay.selftest import selftest as run_parts


def selftest() -> None:
    """Print a line for each way to repeat the recorded runs, then PASS or FAIL; exit 0 or 1."""
    began = time.perf_counter()
    failures = []
    with progress_bar(total=num_runs(), unit="run", leave=False) as bar:

        def load(slots: int) -> Llama:
            llm = load_model(slots, checkpoint=DEMO_CHECKPOINT, verify=True)
            if slots > 1:
                bar.clear()
                print(_describe(llm), flush=True)
            return llm

        for part in run_parts(load, bar.update):
            bar.clear()
            print(part, flush=True)
            failures += part.failures
    for verdict in failures[:5]:
        print(printable(verdict))
    seconds = f"{time.perf_counter() - began:.0f} s"
    print("FAIL" if failures else "PASS")
    note(f"selftest took {seconds}")
    if failures:
        sys.exit(1)


def _describe(llm: Llama) -> str:
    """Return what is tested: platform, devices, versions."""
    parts, sizes = llm.engine.environment.parts, llm.engine.environment.sizes
    kernels = parts["instructions"] or "XLA's own products"
    jax = importlib.metadata.version("jax")
    return (
        f"{parts['device']}, {kernels}, devices {sizes['devices']}, {FLAGS.determinism} | jax {jax}"
        f" | {llm.engine.fingerprint}"
    )
