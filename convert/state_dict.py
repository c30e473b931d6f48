"""The names of a model's tensors, without what training and compiling tools put around them."""

from collections.abc import Iterable

from convert.corruption import abbreviate
from llama_jax.errors import InputError

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Of torch.compile, FSDP and activation checkpointing: modules around a module, at any depth."""

_ROOTS = {"embed_tokens.weight": "model.", "tok_embeddings.weight": ""}
"""The embedding's name, and what transformers and Meta have before it. What else stands there
stands before every name: `module.` of DDP, `base_model.model.` of PEFT, `model.` of Lightning."""

_BUFFERS = ("rotary_emb", "rope", "freqs_cos", "freqs_sin", "freqs_cis", "_extra_state")
"""Tables that every program recomputes, and the empty state of TransformerEngine's layers."""

_QUANTIZED = ("SCB", "absmax", "quant_map", "quant_state", "qweight", "qzeros", "g_idx")
"""The last parts of names that bitsandbytes, GPTQ and AWQ give to quantized weights."""

_ADAPTERS = ("lora_", "base_layer", "modules_to_save", "original_module", "adapter_")


def plain_names(found: Iterable[str], source: str) -> dict[str, str]:
    """Return, for each tensor's name in transformers' or Meta's Llama, its name in the file.

    Names that are nobody's stay as they are. Buffers that hold no weights are left out.

    Args:
        found: names of a file, or of all shards.
        source: the file's or folder's name, for errors.

    Raises:
        InputError: two names stand for one tensor, the weights are quantized, or an adapter was
            saved unmerged.
    """
    names = {name: _unwrapped(name) for name in found if not _is_buffer(name)}
    quantized = sorted(n for n in names if any(part in _QUANTIZED for part in n.split(".")))
    if quantized:
        raise InputError(
            f"{source} is quantized ({abbreviate(quantized)}), expected 16 or 32 bits; convert the "
            "model that it was made from"
        )
    adapters = sorted(name for name in names if any(part in name for part in _ADAPTERS))
    if adapters:
        raise InputError(
            f"{source} holds an adapter that is not merged into its weights: "
            f"{abbreviate(adapters)}; merge it with peft's merge_and_unload() and save the model"
        )
    prefix, added = _prefixes(names.values())
    plain: dict[str, str] = {}
    twice = []
    for name, unwrapped in names.items():
        own = added + unwrapped.removeprefix(prefix)
        if own in plain:
            twice.append(f"{plain[own]} and {name}")
        plain[own] = name
    if twice:
        raise InputError(
            f"{source} has two tensors for one: {abbreviate(twice)}; keep only one of them"
        )
    return plain


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefixes(names: Iterable[str]) -> tuple[str, str]:
    """Return what to take from the front of every name, and what to put there."""
    found = [
        (name.removesuffix(root), own)
        for name in names
        for root, own in _ROOTS.items()
        if name.endswith(root)
    ]
    if len(found) != 1:  # check_tensors describes what is missing or unexpected
        return "", ""
    [(before, own)] = found
    if before.endswith(own):
        return before.removesuffix(own), ""
    return before, own  # saved from LlamaModel, without the output layer around it


def _is_buffer(name: str) -> bool:
    return any(part in _BUFFERS for part in name.split("."))
