"""Train the embedded demo model from tools/corpus: `python -m tools.train_demo`.

A model of about a million parameters memorises a corpus of questions, dialogues and tales in
Llama 2's chat format. It proves the pipeline on a machine without real weights; it knows nothing
else. Needs the `dev` extra (optax); takes about 20 minutes on two CPU cores.
"""

import io
import itertools
import pathlib
import random
import shutil
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
import tqdm
from absl import app, flags, logging

from llama_jax.config import ModelConfig
from llama_jax.nn import cache as kv
from llama_jax.nn.transformer import Transformer, forward, init_params
from llama_jax.text.chat import Message, encode_dialog
from llama_jax.text.tokenizer import BOS_ID, EOS_ID, Tokenizer
from llama_jax.weights.checkpoint import save_checkpoint
from llama_jax.weights.shards import tensors
from tools.demo_corpus import Corpus, read_corpus

ROOT = pathlib.Path(__file__).resolve().parent.parent

_OUT = flags.DEFINE_string("out", str(ROOT / "llama_jax" / "demo" / "checkpoint"), "Goal folder.")
_STEPS = flags.DEFINE_integer("steps", 2400, "Optimiser steps.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 16, "Rows a step.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens a row.", lower_bound=128)
_RATE = flags.DEFINE_float("learning_rate", 4e-3, "Peak learning rate.")
_CHECK = flags.DEFINE_bool("check", True, "Save only if every answer is right.")
_SEED = flags.DEFINE_integer("seed", 0, "Decides the initial weights and the order of the data.")

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


class Examples:
    """Rows of token ids, and which of them are the model's to say."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self.corpus, self.tokenizer = corpus, tokenizer
        self.pairs = [(q, answer) for phrasings, answer in corpus.questions for q in phrasings]
        self.dialogues = [
            dialogue[: i + 1]
            for dialogue in corpus.dialogues
            for i, message in enumerate(dialogue)
            if message["role"] == "assistant"
        ]

    def answer(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Return (prompt ids, answer ids) of a dialogue that ends with the assistant."""
        prompt = encode_dialog(messages[:-1], self.tokenizer)
        return prompt, [*self.tokenizer.encode(messages[-1]["content"]), EOS_ID]

    def rows(self, rng: random.Random, length: int) -> Iterator[tuple[list[int], list[bool]]]:
        """Yield rows for ever: conversations of random questions, dialogues, and bare tales."""
        while True:
            ids, said = [], []
            kind = rng.random()
            if kind < 0.05:
                ids = [BOS_ID, *self.tokenizer.encode(rng.choice(self.corpus.tales)), EOS_ID]
                said = [False] + [True] * (len(ids) - 1)
            elif kind < 0.25:
                prompt, target = self.answer(rng.choice(self.dialogues))
                ids, said = prompt + target, [False] * len(prompt) + [True] * len(target)
            while len(ids) < length:
                question, answer = rng.choice(self.pairs)
                turn = [Message(role="user", content=question)]
                prompt, target = self.answer([*turn, Message(role="assistant", content=answer)])
                ids, said = ids + prompt, said + [False] * len(prompt)
                learnt = [True] * len(target)
                if rng.random() < 0.5:  # as a chat's history has it: a space before EOS, not learnt
                    target = [*self.tokenizer.encode(f"{answer} "), EOS_ID]
                    learnt = [True] * (len(target) - 2) + [False] * 2
                ids, said = ids + target, said + learnt
            yield ids[:length], said[:length]


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


def train(examples: Examples, steps: int):
    """Return trained parameters."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, _RATE.value, min(100, steps // 10), steps + 1
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )
    params = init_params(CONFIG, jax.random.key(_SEED.value))
    params["embed"] = params["embed"] * 0.05
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, tokens, said):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, said)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    rows = examples.rows(random.Random(_SEED.value), _LENGTH.value + 1)
    bar = tqdm.trange(steps, desc="train", unit="step", mininterval=5)
    for i in bar:
        tokens, said = zip(*itertools.islice(rows, _BATCH.value), strict=True)
        params, state, loss = step(
            params, state, np.array(tokens, np.int32), np.array(said, np.float32)
        )
        if i % 50 == 0:
            bar.set_postfix(loss=f"{float(loss):.4f}")
    return params


def count_right(params, examples: Examples) -> tuple[int, int]:
    """Return how many answers come out word for word at temperature 0, and of how many."""
    cases = [
        examples.answer([{"role": "user", "content": q}, {"role": "assistant", "content": a}])
        for q, a in examples.pairs
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
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "tokenizer.model"
        tokenizer = train_tokenizer(corpus, path)
        examples = Examples(corpus, tokenizer)
        params = train(examples, _STEPS.value)
        right, total = count_right(params, examples)
        print(f"answers right word for word: {right} of {total}")
        if right < total and _CHECK.value:
            raise app.Error("not every answer is right: nothing is saved; train for more steps")
        shutil.rmtree(out, ignore_errors=True)
        params = jax.tree.map(np.asarray, params)
        origin = {"source": "tools/train_demo.py", "answers_right": f"{right} of {total}"}
        save_checkpoint(out, tensors(params), CONFIG, tokenizer=path.read_bytes(), origin=origin)


if __name__ == "__main__":
    app.run(main)
