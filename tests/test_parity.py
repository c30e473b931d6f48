"""The same weights in transformers' Llama: logits, greedy tokens, half precision, sampling filters.

Random small models are saved by transformers, converted by `python -m convert hf` and loaded.
"""

import copy
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main
from llama_jax import Llama
from llama_jax.decode import sampling
from llama_jax.decode.filters import apply_filters
from tests.helpers.stories import BOS, PUBLISHED

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("one_torch_thread")]


BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_theta": 100.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "eps": {"rms_norm_eps": 0.1},
    "odd": {  # head_dim 6
        "vocab_size": 131,
        "hidden_size": 18,
        "intermediate_size": 37,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "deep": {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6},
}
SOME = [
    pytest.param(case, marks=[] if case in ("gqa", "mqa", "deep") else pytest.mark.exhaustive)
    for case in CASES
]
SEED = 35  # one whose greedy choices are all clear and whose texts do not fall into a loop
TOLERANCE = 2e-4  # absolute, of float32 logits whose spread is over 1; measured: 7.3e-5
MARGIN = 1e-3  # of the best logit over the second, so that TOLERANCE cannot turn the choice


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model in both programs."""

    theirs: Any
    checkpoint: pathlib.Path

    @functools.cached_property
    def ours(self) -> Llama:
        return Llama.load(self.checkpoint)

    def their_logits(self, tokens: list[int]) -> np.ndarray:
        import torch

        with torch.no_grad():
            return self.theirs(torch.tensor([tokens])).logits[0].numpy()

    def our_greedy(self, prompt: list[int], count: int) -> list[int]:
        return self.ours.generate(
            prompt_tokens=prompt, max_tokens=count, temperature=0, ignore_eos=True
        ).tokens

    def their_greedy(self, prompt: list[int], count: int) -> list[int]:
        """Return the tokens, having checked that every choice was a clear one."""
        import torch

        inputs = torch.tensor([prompt])
        out = self.theirs.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.cat(out.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > MARGIN
        tokens = out.sequences[0, len(prompt) :].tolist()
        assert len(tokens) == count
        assert len(set(tokens)) > count // 5  # no loop of a few tokens, which would test little
        return tokens


def random_theirs(**changes: Any) -> Any:
    """Return transformers' Llama whose weights depend on SEED alone, not on its version."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**(BASE | changes), attn_implementation="eager")).eval()
    rng = np.random.default_rng(SEED)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            is_norm = parameter.ndim == 1  # not all ones, so that leaving one out shows
            shape = tuple(parameter.shape)
            drawn = rng.uniform(0.5, 1.5, shape) if is_norm else rng.normal(0, 0.3, shape)
            parameter.copy_(torch.from_numpy(drawn))
    return model


def converted(theirs: Any, folder: pathlib.Path) -> Pair:
    theirs.save_pretrained(folder / "hf")
    assert main(["hf", str(folder / "hf"), str(folder / "jax")]) == 0
    return Pair(theirs, folder / "jax")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A function from a case's name to its pair, so that nothing is imported before the skip."""

    @functools.cache
    def make(name: str) -> Pair:
        return converted(random_theirs(**CASES[name]), tmp_path_factory.mktemp(name))

    return make


def random_tokens(count: int, vocab_size: int = BASE["vocab_size"]) -> list[int]:
    return [BOS, *np.random.default_rng(0).integers(0, vocab_size, count - 1).tolist()]


@pytest.mark.parametrize(
    ("case", "length"),
    [*((case, 40) for case in CASES), ("gqa", 300)],  # 300: several chunks
)
def test_logits(pairs, case, length):
    pair = pairs(case)
    tokens = random_tokens(length, pair.ours.config.vocab_size)
    theirs, ours = pair.their_logits(tokens), pair.ours.logits(tokens)
    assert theirs.std() > 1
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", SOME)
def test_greedy_tokens(pairs, case):
    pair = pairs(case)
    prompt = random_tokens(7, pair.ours.config.vocab_size)
    assert pair.our_greedy(prompt, 64) == pair.their_greedy(prompt, 64)


# Half precision. Errors are root mean squares, in standard deviations of the float32 logits.


def half_precision_error(pair: Pair, dtype: str) -> float:
    tokens = random_tokens(40)
    exact = pair.their_logits(tokens)
    ours = Llama.load(pair.checkpoint, dtype=dtype).logits(tokens)
    assert ours.dtype == np.float32
    assert np.isfinite(ours).all()
    return rms(ours - exact) / rms(exact - exact.mean())


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 0.009), ("bfloat16", 0.075)])
@pytest.mark.parametrize("case", ["gqa", "tied", "deep"])
def test_half_precision(pairs, case, dtype, bound):
    """Bounds: twice what was measured of the worst case (float16 0.0045, bfloat16 0.037)."""
    assert half_precision_error(pairs(case), dtype) < bound


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_no_worse_than_theirs(pairs, dtype):
    """Measured: 0.64 (float16) and 0.78 of the error of transformers' model in the same dtype."""
    import torch

    pair, tokens = pairs("gqa"), random_tokens(40)
    exact = pair.their_logits(tokens)
    half = copy.deepcopy(pair.theirs).to(getattr(torch, dtype))
    with torch.no_grad():
        theirs = half(torch.tensor([tokens])).logits[0].float().numpy()
    assert half_precision_error(pair, dtype) < rms(theirs - exact) / rms(exact - exact.mean())


# Sampling: transformers' processors, in the order in which its generate applies them.

FILTERS = [
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.1},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.99},
    {"top_k": 10, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.95, "temperature": 0.7},
    {"top_k": 5, "top_p": 0.3, "temperature": 1.7},
    {"min_p": 0.3},
    {"min_p": 0.01, "temperature": 1.7},
    {"top_k": 30, "top_p": 0.7, "min_p": 0.05, "temperature": 2.5},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    {"repetition_penalty": 2.0, "temperature": 0.6, "top_k": 20, "top_p": 0.9},
]


def their_filtered(logits: np.ndarray, seen: list[int], chosen: dict[str, Any]) -> np.ndarray:
    import torch
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    steps = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    scores = torch.tensor(logits[None])
    for name, step in steps.items():
        if name in chosen:
            scores = step(chosen[name])(torch.tensor([seen]), scores)
    return scores[0].numpy()


def our_filtered(logits: np.ndarray, prompt: list[int], output: list[int]) -> np.ndarray:
    """Return one row for each of FILTERS, all from one call."""
    rows = [sampling.make_params(**({"temperature": 1.0} | chosen)) for chosen in FILTERS]
    params = jax.tree.map(lambda *values: jnp.concatenate(values), *rows)
    in_prompt = np.isin(np.arange(len(logits)), prompt)
    counts = np.bincount(output, minlength=len(logits)).astype(np.int32)
    arrays = (jnp.asarray(np.tile(a, (len(rows), 1))) for a in (logits, in_prompt, counts))
    logits, in_prompt, counts = arrays
    penalised = jax.jit(sampling.apply_penalties)(logits, params, in_prompt, counts)
    scaled = penalised / params.temperature[:, None]
    filters = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
    return np.asarray(jax.jit(apply_filters)(scaled, **filters).logits)


@pytest.mark.parametrize(
    ("vocab_size", "spread"),
    [
        *[(96, 0.5), (32000, 3.0)],
        *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in ((96, 3.0), (32000, 0.5))),
    ],
)
def test_sampling_filters(vocab_size, spread):
    """The same tokens are kept, with the same logits."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, spread, vocab_size).astype(np.float32)
    prompt, output = (rng.integers(0, vocab_size, 40).tolist() for _ in range(2))
    for chosen, ours in zip(FILTERS, our_filtered(logits, prompt, output), strict=True):
        theirs = their_filtered(logits, prompt + output, chosen)
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs), str(chosen))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=str(chosen))


# A trained model.


def test_stories260k(assets, tmp_path):
    """From BOS alone at temperature 0: llama2.c's doc/stories260K.md, and transformers."""
    from transformers import LlamaForCausalLM

    folder = assets / "stories260k" / "hf"
    assert main(["hf", str(folder), str(tmp_path / "jax")]) == 0
    theirs = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    pair = Pair(theirs, tmp_path / "jax")
    result = pair.ours.generate(prompt_tokens=[BOS], max_tokens=256, temperature=0)
    assert result.tokens == pair.their_greedy([BOS], 256)
    assert result.response == PUBLISHED
