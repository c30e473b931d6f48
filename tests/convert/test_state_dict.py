"""The same weights as training, compiling, resizing and merging tools leave them in files."""

import collections
import dataclasses
import json
import warnings

import numpy as np
import pytest
import safetensors.numpy

from convert import huggingface, meta
from convert.state_dict import plain_names
from llama_jax.errors import InputError
from tests.helpers.sources import (
    GQA,
    TIED,
    as_torch,
    assert_same,
    hf_name,
    random_weights,
    read_all,
    read_hf,
    write_hf,
)

COMPILED = "model.layers.0.self_attn.q_proj.weight"


def renamed(weights, rename):
    return {rename(hf_name(path)): array for path, array in weights.items()}


def wrapped_inside(name):
    """FSDP and torch.compile wrap layers, activation checkpointing the layers within."""
    return name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.")


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",  # torch.compile
        lambda name: f"module.{name}",  # DistributedDataParallel
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"base_model.model.{name}",  # peft, merged but not unwrapped
        lambda name: f"model.{name}",  # Lightning
        lambda name: f"_forward_module.{name}",  # Lightning's Fabric
        wrapped_inside,
        lambda name: name.replace("self_attn.", "self_attn._orig_mod."),
    ],
    ids=["compile", "ddp", "ddp+compile", "peft", "lightning", "fabric", "fsdp", "compiled-layers"],
)
def test_names_that_tools_leave_around_the_weights_are_removed(tmp_path, weights, rename):
    config, got = read_hf(write_hf(tmp_path / "hf", renamed(weights, rename)))
    assert config == GQA
    assert_same(got, weights)


def test_a_bare_llama_model_is_read_where_the_embedding_is_the_output_layer(tmp_path):
    """As LlamaModel saves itself: without the `model.` of LlamaForCausalLM."""
    weights = random_weights(TIED)
    bare = renamed(weights, lambda name: name.removeprefix("model."))
    config, got = read_hf(write_hf(tmp_path / "hf", bare, tie_word_embeddings=True))
    assert config == TIED
    assert_same(got, weights)


def test_an_embedding_padded_beyond_the_configs_vocab_size_counts(tmp_path):
    """As resize_token_embeddings(pad_to_multiple_of=...) of transformers 4.32 left it."""
    padded = dataclasses.replace(GQA, vocab_size=320)
    weights = random_weights(padded)
    config, got = read_hf(write_hf(tmp_path / "hf", weights, vocab_size=301))
    assert config == padded
    assert_same(got, weights)
    with pytest.raises(
        InputError, match=r"embed_tokens.weight is \[320, 64\], expected \[200, 64\]"
    ):
        read_hf(write_hf(tmp_path / "other", weights, vocab_size=200))


@pytest.mark.parity
def test_metas_names_lose_what_tools_leave_too(tmp_path, weights):
    import torch

    from tests.helpers.meta_sources import meta_shards, write_meta  # it needs torch too

    folder = write_meta(tmp_path / "meta", meta_shards(weights, GQA, 2))
    for file in folder.glob("*.pth"):
        tensors = torch.load(file)
        tensors |= {"freqs_cos": torch.ones(4)}
        torch.save({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, file)
    config, got = read_all(meta.open_source(folder, 64))
    assert config == GQA
    assert_same(got, weights)


def test_buffers_are_left_out(tmp_path, weights):
    table = np.ones(4, np.float32)
    buffers = {
        "model.rotary_emb.inv_freq": table,
        "model.layers.0.self_attn.rotary_emb.inv_freq": table,
        "model.layers.0.self_attn.rotary_emb.cos_cached": table,
        "model.layers.0.mlp.gate_proj._extra_state": table.view(np.uint8),
    }
    assert_same(read_hf(write_hf(tmp_path / "hf", weights | buffers))[1], weights)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["model.embed_tokens.weight", "_orig_mod.model.embed_tokens.weight"], "two tensors for"),
        (["a.base_layer.weight", "a.lora_A.default.weight"], "adapter that is not merged"),
        (["model.embed_tokens.modules_to_save.default.weight"], "adapter that is not merged"),
        (["model.layers.0.mlp.up_proj.SCB"], "quantized"),
        (["model.layers.0.mlp.up_proj.weight.absmax"], "quantized"),
        (["model.layers.0.mlp.up_proj.qweight"], "quantized"),
    ],
)
def test_ambiguous_names_are_refused(names, reason):
    with pytest.raises(InputError, match=f"here .*{reason}"):
        plain_names(names, "here")


@pytest.mark.parametrize(
    "names", [["model.norm.weight"], ["e.embed_tokens.weight", "f.embed_tokens.weight"]]
)
def test_names_without_one_root_stay_as_they_are(names):
    assert plain_names(names, "here") == {name: name for name in names}


# Files.


@pytest.mark.parametrize("kind", ["safetensors", pytest.param("bin", marks=pytest.mark.parity)])
def test_shards_are_read_without_their_index(tmp_path, weights, kind):
    folder = write_hf(tmp_path / "hf", weights, shards=3)
    (folder / "model.safetensors.index.json").unlink()
    if kind == "bin":
        import torch

        for file in folder.glob("*.safetensors"):
            arrays = safetensors.numpy.load_file(file)
            named = {name: as_torch(array) for name, array in arrays.items()}
            torch.save(named, folder / f"pytorch_{file.stem}.bin")
            file.unlink()
    assert_same(read_hf(folder)[1], weights)


def test_an_incomplete_set_of_shards_is_named(tmp_path, weights):
    folder = write_hf(tmp_path / "hf", weights, shards=3)
    (folder / "model.safetensors.index.json").unlink()
    first = folder / "model-00001-of-00003.safetensors"
    first.rename(folder / "model-00001-of-00009.safetensors")
    with pytest.raises(InputError, match=r"unexpected model-00002-of.*missing model-00002-of"):
        read_hf(folder)
    (folder / "model-00001-of-00009.safetensors").unlink()
    with pytest.raises(InputError, match=r"missing model-00001-of-00003.safetensors; download"):
        read_hf(folder)
    first.write_bytes((folder / "model-00002-of-00003.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"both hold .*; download model.safetensors.index.json"):
        read_hf(folder)


def save_torch(folder, content, **options):
    import torch

    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin", **options)
    return folder


@pytest.mark.parity
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict", "module"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_a_training_programs_pickle_is_read(tmp_path, weights, key, zipped):
    """Beside the weights it may hold an optimizer, and be of PyTorch's format before 1.6."""
    folder = write_hf(tmp_path / "hf", weights)
    named = collections.OrderedDict((hf_name(p), as_torch(a)) for p, a in weights.items())
    optimizer = {"state": {0: {"exp_avg": as_torch(weights["final_norm"])}}, "step": 3}
    content = named if key is None else {key: named, "optimizer": optimizer, "epoch": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of its old storages
        save_torch(folder, content, _use_new_zipfile_serialization=zipped)
        assert_same(read_hf(folder)[1], weights)


@pytest.mark.parity
def test_a_pickle_of_several_models_is_refused(tmp_path, weights):
    folder = write_hf(tmp_path / "hf", weights)
    named = {hf_name(path): as_torch(array) for path, array in weights.items()}
    save_torch(folder, {"model": named, "ema": named})
    with pytest.raises(InputError, match="holds several models \\('model', 'ema'\\)"):
        read_hf(folder)


@pytest.mark.parity
def test_a_pickled_object_is_named_and_not_made(tmp_path, weights):
    import argparse

    folder = write_hf(tmp_path / "hf", weights)
    save_torch(folder, {"args": argparse.Namespace(lr=1)})
    with pytest.raises(InputError, match=r"objects other than tensors \(argparse.Namespace\)"):
        read_hf(folder)


def test_a_config_beside_the_weights_may_hold_more(tmp_path, weights):
    more = {"_name_or_path": "x", "use_cache": False, "torch_dtype": "float16", "pad_token_id": -1}
    folder = write_hf(tmp_path / "hf", weights, **more)
    assert huggingface.read_config(folder / "config.json") == GQA
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == -1
