"""Train the embedded demo model from tools/corpus: `python -m tools.train_demo`.

A model of about a million parameters memorises a corpus of questions, dialogues and tales in
Llama 2's chat format, and learns to refuse other questions. It proves the pipeline on a machine
without real weights. Needs the `dev` extra (optax); takes some 28 minutes on two CPU cores.
"""

import io
import itertools
import pathlib
import random
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import sentencepiece
import tqdm
from absl import app, flags, logging

from llama_jax.config import ModelConfig
from llama_jax.nn import cache as kv
from llama_jax.nn.transformer import Transformer, forward, init_params
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.checkpoint import save_checkpoint
from llama_jax.weights.shards import tensors
from tools.demo_corpus import REFUSAL, Corpus, read_corpus, read_held_back
from tools.demo_rows import Examples

ROOT = pathlib.Path(__file__).resolve().parent.parent

_OUT = flags.DEFINE_string("out", str(ROOT / "llama_jax" / "demo" / "checkpoint"), "Goal folder.")
_STEPS = flags.DEFINE_integer("steps", 2300, "Optimiser steps.", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch", 16, "Rows a step.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens a row.", lower_bound=128)
_CHECK = flags.DEFINE_bool("check", True, "Save only if nearly all answers are right.")
_SEED = flags.DEFINE_integer("seed", 0, "Decides the initial weights and the order of the data.")

MUON_RATE, ADAM_RATE = 2e-2, 4e-3
"""Peak learning rates of the layers' matrices, and of embeddings, norms and the output layer."""
WARM_UP_STEPS = 50
FINAL_RATE = 0.2
"""The learning rate of the last steps, as a share of the peak."""
FINAL_STEPS = 0.3
"""Their share of all steps. The parameters are averaged over them."""
MEAN_STEPS = 250
"""About how many steps the average has in the end."""
REFUSED = 0.35
"""Share of the questions that have no answer."""
LEAST_RIGHT = 0.98
"""Share of the corpus that must come out word for word."""

CONFIG = ModelConfig(
    vocab_size=1024,
    dim=128,
    ffn_dim=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_seq_len=512,
)


def train_tokenizer(corpus: Corpus, path: pathlib.Path) -> Tokenizer:
    """Train a SentencePiece BPE model with Llama 2's settings; rare characters become bytes."""
    texts = [text for phrasings, answer in corpus.questions for text in (*phrasings, answer)]
    texts += [message["content"] for dialogue in corpus.dialogues for message in dialogue]
    texts += corpus.names * 3 + [REFUSAL] * 20
    texts += [frame for frames in corpus.frames for frame in frames.texts]
    texts += ["[INST] <<SYS>>", "<</SYS>> [/INST]"] * 50
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([text for text in texts if text.isascii()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=CONFIG.vocab_size,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def logits_of(params, tokens):
    """Return the logits of whole rows: a cache of just their length, filled at once."""
    batch, length = tokens.shape
    cache = kv.init_cache(CONFIG, batch, length, jnp.float32)
    starts = jnp.zeros((batch,), jnp.int32)
    model = Transformer(CONFIG, jnp.float32)
    return forward(model, params, tokens, starts, cache, attend_len=length)[0]


def loss_fn(params, tokens, said):
    """Return the mean cross-entropy of the tokens that are the model's to say."""
    logits = logits_of(params, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses * said[:, 1:]) / jnp.maximum(jnp.sum(said[:, 1:]), 1)


def make_optimizer(constant_from: int) -> optax.GradientTransformation:
    """Return Muon for the layers' matrices and Adam for the rest.

    Muon needs half the steps of Adam alone for the same loss here.

    Args:
        constant_from: the step from which the learning rate stays as it is.
    """
    warm_up = min(WARM_UP_STEPS, constant_from // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm_up, constant_from, FINAL_RATE)

    def dimensions(params: Any) -> Any:
        muon = optax.contrib.MuonDimensionNumbers()
        return {
            name: jax.tree.map(
                lambda leaf, name=name: (
                    muon if name.startswith("layer") and leaf.ndim == 2 else None
                ),
                part,
            )
            for name, part in params.items()
        }

    muon = optax.contrib.muon(
        lambda step: MUON_RATE * rate(step),
        weight_decay=0.1,
        adam_b2=0.98,
        adam_learning_rate=lambda step: ADAM_RATE * rate(step),
        muon_weight_dimension_numbers=dimensions,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def train(examples: Examples, steps: int):
    """Return the mean of the parameters of the last steps."""
    mean_from = steps - max(1, round(FINAL_STEPS * steps))
    optimizer = make_optimizer(mean_from)
    params = init_params(CONFIG, jax.random.key(_SEED.value))
    params["embed"] = params["embed"] * 0.05
    state, mean = optimizer.init(params), params

    @jax.jit
    def step(params, state, mean, i, tokens, said):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, said)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        weight = 1 / jnp.clip(i - mean_from + 1, 1, MEAN_STEPS)
        mean = jax.tree.map(lambda m, p: m + weight * (p - m), mean, params)
        return params, state, mean, loss

    rows = examples.rows(random.Random(_SEED.value), _LENGTH.value + 1, REFUSED)
    bar = tqdm.trange(steps, desc="train", unit="step", mininterval=5)
    for i in bar:
        tokens, said = zip(*itertools.islice(rows, _BATCH.value), strict=True)
        params, state, mean, loss = step(
            params, state, mean, i, np.array(tokens, np.int32), np.array(said, np.float32)
        )
        if i % 50 == 0:
            bar.set_postfix(loss=f"{float(loss):.4f}")
    return mean


def count_right(params, examples: Examples) -> tuple[int, int]:
    """Return how many answers come out word for word at temperature 0, and of how many."""
    cases = [
        examples.answer([{"role": "user", "content": q}, {"role": "assistant", "content": a}])
        for phrasings, a in examples.corpus.questions
        for q in phrasings
    ]
    cases += [examples.answer(dialogue) for dialogue in examples.dialogues]
    predict = jax.jit(lambda params, tokens: jnp.argmax(logits_of(params, tokens), axis=-1))
    right = 0
    for start in range(0, len(cases), 32):
        batch = cases[start : start + 32]
        tokens = np.zeros((32, 256), np.int32)
        for row, (prompt, answer) in zip(tokens, batch, strict=False):
            row[: len(prompt) + len(answer)] = prompt + answer
        predicted = np.asarray(predict(params, tokens))
        # Every token right given the right ones before it: greedy decoding says just this.
        right += sum(
            predicted[i, len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist() == answer
            for i, (prompt, answer) in enumerate(batch)
        )
    return right, len(cases)


def main(_: list[str]) -> None:
    """Train, count the right answers, save."""
    logging.set_verbosity(logging.WARNING)
    out = pathlib.Path(_OUT.value)
    if out.exists() and not (out / "manifest.json").exists():
        raise app.UsageError(f"{out} is no checkpoint, so it is not written over; name another")
    corpus = read_corpus()
    paraphrases, unknown = read_held_back()
    held_back = [question for question, _ in paraphrases] + unknown
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "tokenizer.model"
        tokenizer = train_tokenizer(corpus, path)
        examples = Examples(corpus, tokenizer, held_back)
        params = train(examples, _STEPS.value)
        right, total = count_right(params, examples)
        print(f"answers right word for word: {right} of {total}")
        if right < LEAST_RIGHT * total and _CHECK.value:
            raise app.Error("too few answers are right: nothing is saved; train for more steps")
        shutil.rmtree(out, ignore_errors=True)
        params = jax.tree.map(np.asarray, params)
        origin = {"source": "tools/train_demo.py", "answers_right": f"{right} of {total}"}
        save_checkpoint(out, tensors(params), CONFIG, tokenizer=path.read_bytes(), origin=origin)


if __name__ == "__main__":
    app.run(main)
