"""What a folder or file is that the converter for Hugging Face's layout cannot read."""

import fnmatch
import pathlib
from collections.abc import Iterable

from convert.hf_files import is_weights
from llama_jax.errors import InputError
from llama_jax.strict_json import read_json
from llama_jax.weights.manifest import NAME as MANIFEST

_KINDS = (
    # What identifies it, what it is, what to do.
    (MANIFEST, "a checkpoint of llama_jax already", "run it with --checkpoint"),
    (
        "adapter_config.json",
        "a LoRA adapter, not a whole model",
        "convert its base model, with --adapter naming this folder",
    ),
    ("consolidated.*.pth", "Meta's release", "run `python -m convert meta` on it"),
    ("*.gguf", "a GGUF file of llama.cpp", "convert the model that it was made from"),
    ("*.distcp", "a sharded checkpoint of PyTorch's FSDP", "gather it with "
     "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch`"),
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed ZeRO", "run the zero_to_fp32.py in it first"),
    ("*.nemo", "an archive of NVIDIA NeMo", "export it to Hugging Face's layout with NeMo"),
    ("*.onnx", "an ONNX export", "convert the model that it was made from"),
    ("flax_model*.msgpack", "Flax weights of transformers", "save them with PyTorch first: "
     "AutoModelForCausalLM.from_pretrained(SRC, from_flax=True).save_pretrained(DST)"),
    ("tf_model*.h5", "TensorFlow weights", "convert the model that they were made from"),
    ("*.mlpackage", "a Core ML package", "convert the model that it was made from"),
)  # fmt: skip
_FILES = {
    b"GGUF": "a GGUF file of llama.cpp; convert the model that it was made from",
    b"PK\x03\x04": "an archive or a PyTorch file; name the folder that holds it",
    b"\x1f\x8b": "a compressed archive; unpack it and name the folder",
}


def refuse_other_kinds(source: pathlib.Path) -> None:
    """Refuse a source that is something else than a Hugging Face Llama, and say what it is.

    Raises:
        InputError: with what it is, and what to do.
    """
    if source.is_file():
        with source.open("rb") as file:
            start = file.read(4)
        what = next((text for magic, text in _FILES.items() if start.startswith(magic)), None)
        if what:
            raise InputError(f"{source} is {what}")
        return
    names = [path.name for path in source.iterdir()] if source.is_dir() else []
    if any(map(is_weights, names)):
        _refuse_quantized(source / "config.json")
    else:
        refuse_names(names, str(source))


def refuse_names(names: Iterable[str], source: str) -> None:
    """Refuse a folder or repository by the names of its files, if they are those of another kind.

    Raises:
        InputError: with what it is, and what to do.
    """
    names = list(names)
    for pattern, what, remedy in _KINDS:
        if fnmatch.filter(names, pattern):
            raise InputError(f"{source} is {what}; {remedy}")


def _refuse_quantized(config: pathlib.Path) -> None:
    """Refuse quantized weights and other architectures by their names."""
    if not config.is_file():
        return
    values = read_json(config)
    quantized = values.get("quantization_config")
    if isinstance(quantized, dict):
        method = quantized.get("quant_method", "an unknown method")
        raise InputError(
            f"{config.parent} is quantized ({method}), expected 16 or 32 bits; convert the model "
            "that it was made from"
        )
    kind = values.get("model_type")
    if isinstance(kind, str) and kind != "llama":
        raise InputError(
            f"{config.parent} is a {kind} model, expected a Llama 2 (model_type llama); this "
            "program runs no other architecture"
        )
