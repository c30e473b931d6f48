"""Files with hostile fields, one after the other: `python -m tests.helpers.hostile_cases COUNT`.

A process of its own, since its memory is limited and the files that it opens are recorded.
"""

import contextlib
import copy
import json
import pathlib
import resource
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert import huggingface, source
from llama_jax.errors import InputError
from llama_jax.weights import checkpoint, manifest
from llama_jax.weights.shards import by_path, tensors
from tests.helpers.models import SMALL, random_params
from tests.helpers.sources import GQA, random_weights, write_hf

SECONDS = 5
BYTES = 10**9

VALUES = [
    *(None, True, False, -1, 0, 1, 2, 2**31, 2**62, 2**64, 10**900, -(2**63), 0.5, 1e300, 1e-300),
    *(float("nan"), float("inf"), "", "x", "0" * 64, "..", "../../secret", "/etc/passwd", "a\0b"),
    *("00000", "float16", "F16", "I64", "\ud800", "x" * 9999),
    *([], [1], [-1, 2], [2**62, 2**62], [[]], [None], {}, {"a": 1}, {"shape": [1]}, {"type": []}),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container in a tree of JSON with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, child in items:
        found.append((value, key))
        if isinstance(child, dict | list):
            found += places(child)
    return found


@st.composite
def changed(draw: st.DrawFn, text: str) -> Any:
    """Return a tree of JSON in which a few values are missing, replaced or added."""
    tree = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        if not (found := places(tree)):
            break
        # Half of them near the root: most of a manifest is rows of tensors.
        last = draw(st.sampled_from([len(found) - 1, min(12, len(found) - 1)]))
        holder, key = found[draw(st.integers(0, last))]
        action = draw(st.sampled_from(["remove", "replace", "replace", "add"]))
        if action == "remove":
            del holder[key]
        elif action == "replace" or isinstance(holder, list):
            holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        else:
            name = draw(st.sampled_from([v for v in VALUES if isinstance(v, str)]))
            holder[name] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return tree


@contextlib.contextmanager
def kept(*paths: pathlib.Path) -> Iterator[None]:
    """Give files their content back."""
    before = [path.read_bytes() for path in paths]
    try:
        yield
    finally:
        for path, content in zip(paths, before, strict=True):
            path.write_bytes(content)


class Watch:
    """Records the files that Python code opens; those of TensorStore's own code it cannot see."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.on = str(folder), False
        self.outside: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open" and isinstance(arguments[0], str):
            code = arguments[0].endswith((".py", ".pyc", ".so"))
            if not code and not arguments[0].startswith(self.folder):
                self.outside.append(arguments[0])

    def refuses_or_reads(self, read: Callable[[], object]) -> None:
        """Hold a read to what is promised: in time, one line or a right result, no other file."""
        signal.alarm(SECONDS)
        self.on = True
        try:
            read()
        except InputError as error:
            if "\n" in str(error):
                raise AssertionError("several lines") from error
        finally:
            self.on = False
            signal.alarm(0)
        assert not self.outside, self.outside


def seal(folder: pathlib.Path, values: Any) -> None:
    """Write a manifest whose digests are right, as far as its form allows."""
    if isinstance(values, dict):
        values.pop("sha256", None)
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            values["root"] = manifest.root_digest(values["tensors"], values["dtype"])
        text = manifest._text(values)
    else:
        text = json.dumps(values)
    (folder / manifest.NAME).write_text(text)


def cases(folder: pathlib.Path, watch: Watch) -> dict[str, tuple[str, Callable[[Any], None]]]:
    """Write good files; return for each kind its text, and what to do with a changed one."""
    saved, params = folder / "saved", jax.tree.map(np.asarray, random_params(SMALL))
    checkpoint.save_checkpoint(saved, tensors(params), SMALL)
    hf = write_hf(folder / "hf", random_weights(GQA))
    several = write_hf(folder / "several", random_weights(GQA), shards=2)
    index, weights = several / "model.safetensors.index.json", hf / "model.safetensors"
    (length,) = struct.unpack("<Q", weights.read_bytes()[:8])
    data = weights.read_bytes()[8 + length :]

    def load() -> None:
        found = checkpoint.load_checkpoint(saved)
        for name, array in by_path(found.params).items():
            np.testing.assert_array_equal(array, by_path(params)[name].astype(array.dtype))

    def convert(path: pathlib.Path) -> Callable[[], None]:
        def read() -> None:
            opened = huggingface.open_source(path)
            source.check_tensors(opened)
            for tensor in source.read_params(opened, source.target_dtype(opened, "source")):
                assert tensor.array.shape

        return read

    def with_manifest(values: Any) -> None:
        with kept(saved / manifest.NAME):
            seal(saved, values)
            watch.refuses_or_reads(load)

    def with_config(values: Any) -> None:
        path = saved / "config.json"
        with kept(path, saved / manifest.NAME):
            path.write_text(json.dumps(values))
            sealed = json.loads((saved / manifest.NAME).read_text())
            row = {"bytes": path.stat().st_size, "sha256": manifest.file_digest(path)}
            sealed["files"]["config.json"] = row
            seal(saved, sealed)
            watch.refuses_or_reads(load)

    def with_file(path: pathlib.Path) -> Callable[[Any], None]:
        def use(values: Any) -> None:
            with kept(path):
                path.write_text(json.dumps(values))
                watch.refuses_or_reads(convert(path.parent))

        return use

    def with_header(values: Any) -> None:
        with kept(weights):
            header = json.dumps(values).encode()
            weights.write_bytes(struct.pack("<Q", len(header)) + header + data)
            watch.refuses_or_reads(convert(hf))

    load()
    convert(hf)()
    return {
        "manifest": ((saved / manifest.NAME).read_text(), with_manifest),
        "config": ((saved / "config.json").read_text(), with_config),
        "published config": ((hf / "config.json").read_text(), with_file(hf / "config.json")),
        "index": (index.read_text(), with_file(index)),
        "header": (weights.read_bytes()[8 : 8 + length].decode(), with_header),
    }


def limit_memory() -> None:
    """Let this process have BYTES more than it has."""
    now = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, now + BYTES))


def hang(*_: object) -> None:
    """End a case that takes too long."""
    raise TimeoutError(f"over {SECONDS} s")


def main(count: int) -> None:
    """Run `count` cases, of each kind as many."""
    signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name).resolve()
        watch = Watch(folder)
        kinds = cases(folder, watch)
        limit_memory()
        for kind, (text, use) in kinds.items():
            test = given(changed(text))(use)
            options = settings(
                max_examples=count // len(kinds),
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            options(test)()
            print(f"{kind}: held", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
