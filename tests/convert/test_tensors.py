"""What a conversion stores: from every kind of file the same bits, counted and signed."""

import hashlib
import json
import os
import pathlib
import pickle
import weakref

import ml_dtypes
import numpy as np
import pytest

from convert.__main__ import main
from llama_jax.errors import InputError
from llama_jax.weights import checkpoint
from llama_jax.weights.checkpoint import Tensor, load_checkpoint, save_checkpoint
from llama_jax.weights.manifest import read_manifest
from tests.helpers.sources import (
    GQA,
    flat,
    random_weights,
    read_hf,
    write_bin,
    write_hf,
)

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def converted(source: pathlib.Path, out: pathlib.Path, *arguments: str, layout: str = "hf") -> dict:
    """Convert a source; return the manifest."""
    assert main([layout, str(source), str(out), *arguments]) == 0
    return read_manifest(out)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# Kinds of file.


@pytest.mark.parity
def test_our_own_bug_is_not_called_corruption(tmp_path, weights, monkeypatch):
    import torch

    def bug(*args, **kwargs):
        raise TypeError("a bug")

    folder = write_bin(tmp_path / "hf", weights)
    monkeypatch.setattr(torch, "load", bug)
    with pytest.raises(TypeError, match="a bug"):
        read_hf(folder)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_file_gives_the_same_root(tmp_path, dtype):
    from tests.helpers.meta_sources import meta_shards, write_meta

    weights = random_weights(GQA, DTYPES[dtype])
    ranks = meta_shards(weights, GQA, 2)
    folders = {
        "hf": [
            write_hf(tmp_path / "one", weights),
            write_hf(tmp_path / "several", weights, 3),
            write_bin(tmp_path / "one_bin", weights),
            write_bin(tmp_path / "several_bin", weights, 3),
        ],
        "meta": [write_meta(tmp_path / "meta", ranks)],
    }
    manifests = [
        converted(folder, tmp_path / f"{folder.name}_out", layout=layout)
        for layout, of_layout in folders.items()
        for folder in of_layout
    ]
    assert {(values["dtype"], values["root"]) for values in manifests} == {
        (dtype, manifests[0]["root"])
    }


@pytest.mark.parity
@pytest.mark.parametrize("shards", [1, 2])
def test_safetensors_are_preferred_to_pickles(tmp_path, weights, shards):
    """As transformers does: old pickles lie beside them in many a repository."""
    write_bin(tmp_path / "bin", weights, shards)
    weights["embed"] = -weights["embed"]
    folder = write_hf(tmp_path / "hf", weights, shards)
    for file in (tmp_path / "bin").glob("pytorch_model*"):
        file.rename(folder / file.name)
    np.testing.assert_array_equal(read_hf(folder)[1]["embed"], weights["embed"])


def test_links_of_the_hubs_cache_are_followed(tmp_path, weights, tokenizer):
    folder = write_hf(tmp_path / "hf", weights, 2)
    tokenizer.rename(folder / "tokenizer.model")
    expected = converted(folder, tmp_path / "expected")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        name = digest(file.read_bytes())
        file.rename(blobs / name)
        (snapshot / file.name).symlink_to(f"../../blobs/{name}")
    values = converted(snapshot, tmp_path / "out")
    assert values["tensors"] == expected["tensors"]
    assert values["files"]["tokenizer.model"] == expected["files"]["tokenizer.model"]
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_symlink()]


@pytest.mark.parity
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, weights, zipped, shards):
    import torch

    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    folder = write_bin(tmp_path / "hf", weights, shards)
    file = max(folder.glob("*.bin"))
    if zipped:
        torch.save({"model.norm.weight": Evil()}, file)
    else:
        file.write_bytes(pickle.dumps({"model.norm.weight": Evil()}))
    with pytest.raises(InputError, match=rf"{file.name} .*download it again"):
        read_hf(folder)
    assert not marker.exists()


# Rounding.

LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
ROUNDED = {  # source-target: what is given, what is stored of it, and the counts
    "float32-float16": (
        [
            (0.0, 0.0),
            (-0.0, -0.0),
            (-65504.0, -65504.0),
            (1 + 2**-11, 1.0),  # rounded
            (-1 - 3 * 2**-11, -1 - 2**-9),  # rounded
            (65519.0, 65504.0),  # rounded, and not beyond
            (-(2**-15), -(2**-15)),  # subnormal, exact
            (1.75 * 2**-24, 2**-23),  # subnormal, rounded
            (2**-25, 0.0),  # to zero
            (-(2**-26), -0.0),  # to zero
            (65520.0, 65504.0),  # the first that is beyond
            (-3e38, -65504.0),
        ],
        {"rounded": 8, "subnormal": 2, "to zero": 2, "beyond the largest": 2},
    ),
    "float32-bfloat16": (
        [
            (1e6, 999424.0),  # rounded
            (2**-8 - 1.0, 2**-8 - 1.0),
            (-1 - 2**-8, -1.0),  # rounded
            (2**-127, 2**-127),  # subnormal, exact
            (-1.75 * 2**-133, -(2**-132)),  # subnormal, rounded
            (-(2**-140), -0.0),  # to zero
            (3.4e38, LARGEST),
        ],
        {"rounded": 5, "subnormal": 2, "to zero": 1, "beyond the largest": 1},
    ),
    "bfloat16-float16": (
        [
            (1 + 2**-7, 1 + 2**-7),
            (2**-16, 2**-16),  # subnormal, exact
            (2**-30, 0.0),  # to zero
            (-65536.0, -65504.0),
        ],
        {"rounded": 2, "subnormal": 1, "to zero": 1, "beyond the largest": 1},
    ),
    "float16-bfloat16": (
        [(1 + 2**-10, 1.0), (65504.0, 65536.0), (-(2**-24), -(2**-24))],
        {"rounded": 2},
    ),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_rounding_is_counted(tmp_path, capsys, case):
    source, target = case.split("-")
    values, counts = ROUNDED[case]
    weights = random_weights(GQA, DTYPES[source])
    given = weights["layer_1/ffn_norm"]
    given[: len(values)] = [value for value, _ in values]
    expected = np.zeros_like(given, DTYPES[target])
    expected[: len(values)] = [stored for _, stored in values]
    expected[len(values) :] = given[len(values) :]
    folder, out = write_hf(tmp_path / "hf", weights), tmp_path / "out"

    if "beyond the largest" in counts:
        assert main(["hf", str(folder), str(out), f"--dtype={target}"]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"layers.1.post_attention_layernorm.weight does not fit {target}" in said
        assert "--saturate" in said
        assert not out.exists()

    rows = converted(folder, out, f"--dtype={target}", "--saturate")["tensors"]
    assert {path: row["rounding"] for path, row in rows.items() if "rounding" in row} == {
        "layer_1/ffn_norm": counts
    }
    assert rows["layer_1/ffn_norm"]["sha256"] == digest(expected.tobytes())
    stored = flat(load_checkpoint(out).params)["layer_1/ffn_norm"]
    assert np.asarray(stored).tobytes() == expected.tobytes()

    total = sum(array.size for array in weights.values())
    kinds = ("rounded", "subnormal", "to zero", "beyond the largest")
    listed = ", ".join(f"{counts.get(kind, 0)} {kind}" for kind in kinds)
    summary = capsys.readouterr().out.splitlines()[1:]
    assert summary == [f"in {target}, of {total:,} values: {listed}; by tensor in manifest.json"]


# The manifest.


def raw_rows(file: pathlib.Path) -> dict[str, dict]:
    """Describe a safetensors file's tensors by its own header and bytes."""
    content = file.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    header.pop("__metadata__", None)
    dtypes = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    data = content[size:]
    return {
        name: {
            "file": file.name,
            "name": name,
            "shape": row["shape"],
            "dtype": dtypes[row["dtype"]],
            "sha256": digest(data[slice(*row["data_offsets"])]),
        }
        for name, row in header.items()
    }


def test_rows_say_where_each_tensor_came_from(tmp_path):
    folder = write_hf(tmp_path / "hf", random_weights(GQA, ml_dtypes.bfloat16), 2)
    expected = {}
    for file in folder.glob("*.safetensors"):
        expected |= raw_rows(file)
    values = converted(folder, tmp_path / "out", "--dtype=float32")
    assert values["origin"] == {"format": "hf", "folder": "hf"}
    listed = [row["sources"] for row in values["tensors"].values()]
    assert all(len(sources) == 1 for sources in listed)
    assert {sources[0]["name"]: sources[0] for sources in listed} == expected


@pytest.mark.parity
def test_rows_name_every_shard_of_metas(tmp_path, weights):
    from tests.helpers.meta_sources import meta_shards, write_meta
    from tests.helpers.sources import meta_name

    ranks = meta_shards(weights, GQA, 2)
    folder = write_meta(tmp_path / "meta", ranks)
    values = converted(folder, tmp_path / "out", layout="meta")
    for path, row in values["tensors"].items():
        name = meta_name(path)
        assert row["sources"] == [
            {
                "file": f"consolidated.{i:02}.pth",
                "name": name,
                "shape": list(rank[name].shape),
                "dtype": "float32",
                "sha256": digest(rank[name].numpy().tobytes()),
            }
            for i, rank in enumerate(ranks)
        ], path


def test_the_root_is_by_its_definition(tmp_path, weights, hf):
    """Recomputed from the arrays alone: by path, dtype, shape and SHA-256 of the bytes."""
    listed = [
        [path, "float32", list(array.shape), digest(array.tobytes())]
        for path, array in sorted(weights.items())
    ]
    expected = digest(json.dumps(listed, separators=(",", ":")).encode())
    assert converted(hf, tmp_path / "out")["root"] == expected


def test_saving_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    weights = random_weights(GQA)
    size = weights["layer_0/feed_forward/gate"].nbytes
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", size)
    alive: dict[int, int] = {}
    held = []

    def read():
        for i, (path, array) in enumerate(weights.items()):
            array = array.copy()
            alive[i] = array.nbytes
            weakref.finalize(array, alive.pop, i)
            held.append(sum(alive.values()))
            yield Tensor(path, array)
            del array

    save_checkpoint(tmp_path / "out", read(), GQA)
    assert len(list((tmp_path / "out" / "params").iterdir())) > 5
    largest = max(array.nbytes for array in weights.values())
    assert max(held) < size + largest  # a shard is full once it has `size`
