"""One of several processes that load checkpoints together: run by tests/weights/test_processes.py.

Arguments: the coordinator's port, how many processes, which this is, and, in JSON, the loads: of
each the folder, the dtype or null, whether to verify, and the file of the arrays to find. It prints
a line of JSON for each, among lines of Gloo's.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from llama_jax.errors import InputError
from llama_jax.nn.sharding import Shards, make_mesh
from llama_jax.weights.checkpoint import load_checkpoint
from llama_jax.weights.shards import by_path


def bytes_read() -> int:
    """Return how many bytes this process has read, from the page cache too."""
    fields = dict(
        line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines()
    )
    return int(fields["rchar"])


def load(folder, dtype, verify, expected):
    """Return what a load did."""
    mesh = make_mesh(Shards(jax.device_count()), jax.devices())
    before = bytes_read()
    try:
        loaded = load_checkpoint(folder, dtype, mesh=mesh, verify=verify, progress=True)
    except InputError as error:
        return {"error": str(error)}
    read = bytes_read() - before
    arrays, parts, different = np.load(expected), 0, []
    found = by_path(loaded.params)
    for path, array in found.items():
        for part in array.addressable_shards:
            parts += part.data.nbytes
            if not np.array_equal(np.asarray(part.data), arrays[path][part.index]):
                different.append(path)
    return {"read": read, "parts": parts, "arrays": len(found), "different": different}


def main() -> None:
    """Load one after another."""
    port, count, index, loads = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    for arguments in json.loads(loads):
        print(json.dumps(load(*arguments)), flush=True)


if __name__ == "__main__":
    main()
