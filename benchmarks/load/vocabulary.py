"""A vocabulary for weights that have none: every token is one character.

So that text of a known length has as many tokens for every server, and a piece of an answer shows
how many tokens it is. Past the three special tokens they are those of CJK Extension B: enough for
Llama 2's vocabulary in one run, none of which combines with another.
"""

import io
import json
import pathlib
from collections.abc import Sequence

import sentencepiece

FIRST = 0x20000
SPECIAL = ("<unk>", "<s>", "</s>")


def text_of(tokens: Sequence[int]) -> str:
    """Return the text of ids, none of them special."""
    return "".join(chr(FIRST + token) for token in tokens)


def pieces(vocab_size: int) -> list[str]:
    """Return the text of each id."""
    return [*SPECIAL, *text_of(range(len(SPECIAL), vocab_size))]


def write_sentencepiece(path: pathlib.Path, vocab_size: int) -> None:
    """Write a tokenizer.model; its ids are in an order of its own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(pieces(vocab_size)[len(SPECIAL) :]),
        model_writer=model,
        model_type="char",
        vocab_size=vocab_size,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    path.write_bytes(model.getvalue())


def write_huggingface(folder: pathlib.Path, vocab_size: int) -> None:
    """Write what transformers loads a tokenizer from."""
    ids = {piece: token for token, piece in enumerate(pieces(vocab_size))}
    special = [
        {"id": token, "content": piece, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token, piece in enumerate(SPECIAL)
    ]
    model = {"type": "BPE", "vocab": ids, "merges": [], "unk_token": SPECIAL[0]}
    tokenizer = {"version": "1.0", "added_tokens": special, "model": model}
    tokenizer |= {"decoder": {"type": "Fuse"}}
    tokenizer |= dict.fromkeys(("truncation", "padding", "normalizer"))
    tokenizer |= dict.fromkeys(("pre_tokenizer", "post_processor"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
