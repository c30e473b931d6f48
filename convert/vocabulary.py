"""The tokenizer of a source: tokenizer.model or tokenizer.json, and the tokens added to it."""

import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sentencepiece import sentencepiece_model_pb2

from llama_jax.errors import InputError
from llama_jax.regular_file import read_regular
from llama_jax.strict_json import read_json
from llama_jax.text.tokenizer import Tokenizer, check_vocabulary, is_text, unnamed_piece

FILES = ("tokenizer.model", "tokenizer.json")
"""In the order that they are looked for."""

BESIDE = ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
"""What else is read beside them: added tokens."""

proto: Any = sentencepiece_model_pb2  # its classes are made at run time
_Kind = proto.ModelProto.SentencePiece.Type
_SPACE = "▁"
_LONGEST = 512  # letters of a piece, of which every split is looked up


class Vocabulary(NamedTuple):
    """A tokenizer for a checkpoint."""

    model: bytes
    """The content of its tokenizer.model."""
    file: pathlib.Path
    """Where it was read from."""
    added: dict[int, str]
    """Tokens behind the pieces of the file, by id."""
    left_out: dict[int, str]
    """Tokens that the source names, and that the model has no embedding for."""

    def describe(self) -> dict[str, Any]:
        """Return the file, its digest and the added tokens, for a manifest."""
        return {
            "file": self.file.name,
            "sha256": hashlib.sha256(read_regular(self.file)).hexdigest(),
            "added": {str(token): text for token, text in self.added.items()},
        }


class _Added(NamedTuple):
    text: str
    special: bool


def read_vocabulary(file: pathlib.Path, rows: int, pad_token: int | None = None) -> Vocabulary:
    """Read a tokenizer, and the added tokens that the files beside it name.

    The result is one SentencePiece model. A special token becomes a control piece, which decodes to
    nothing; another added token is a piece that is matched first. tokenizer.json is taken if its
    merges are exactly those of a SentencePiece model, as those of Llama 2's are.

    Args:
        file: a tokenizer.model or tokenizer.json.
        rows: those of the model's embedding.
        pad_token: the id that the model's config has for it; it is special.

    Raises:
        InputError: it is no Llama 2 tokenizer, or another model's; tokens contradict each other.
    """
    if file.suffix == ".json":
        model = _from_json(file)
    else:
        Tokenizer(file)  # checks it
        model = proto.ModelProto.FromString(read_regular(file))
    pieces = len(model.pieces)
    added = _read_added(file.parent, pad_token)
    for token, (text, _) in added.items():
        if token < pieces and model.pieces[token].piece != text:
            raise InputError(
                f"{file}: the id {token} is {model.pieces[token].piece!r}, and {text!r} by the "
                "files beside it; give the right tokenizer with --tokenizer"
            )
    used = {token: added[token] for token in sorted(added) if pieces <= token < rows}
    _append(model, used, file)
    serialized = read_regular(file) if not used and file.suffix != ".json" else None
    vocabulary = Vocabulary(
        model=serialized or model.SerializeToString(),
        file=file,
        added={token: text for token, (text, _) in used.items()},
        left_out={token: text for token, (text, _) in added.items() if token >= rows},
    )
    check_vocabulary(Tokenizer(vocabulary.model).vocab_size, rows, str(file))
    return vocabulary


def _append(model: Any, added: dict[int, _Added], file: pathlib.Path) -> None:
    """Append added tokens to the pieces; ids between them without a name become control pieces."""
    known = {piece.piece for piece in model.pieces}
    for token in range(len(model.pieces), max(added, default=-1) + 1):
        text, special = added.get(token, (unnamed_piece(token), True))
        if text in known or not text:
            raise InputError(
                f"{file}: the added token {token} is {text!r}, which is empty or another token's "
                "text; correct added_tokens.json"
            )
        known.add(text)
        kind = _Kind.CONTROL if special else _Kind.USER_DEFINED
        model.pieces.add(piece=text, score=0.0, type=kind)


def _read_added(folder: pathlib.Path, pad_token: int | None) -> dict[int, _Added]:
    """Return the tokens that Hugging Face's files name beside a tokenizer, by id."""
    found: dict[int, _Added] = {}
    for name, entries in (
        ("added_tokens.json", _entries_of_added),
        ("tokenizer_config.json", _entries_of_config),
        ("tokenizer.json", _entries_of_fast),
    ):
        path = folder / name
        if not os.path.lexists(path):
            continue
        for token, text, special in entries(read_json(path)):
            if not _is_id(token) or not isinstance(text, str) or not is_text(text):
                raise InputError(
                    f"{path}: {token!r:.40} is {text!r:.40}, expected an id and a text"
                )
            old = found.get(token)
            if old and old.text != text:
                raise InputError(
                    f"{path}: the id {token} is {text!r}, and {old.text!r} by another file; "
                    "correct one of them"
                )
            found[token] = _Added(text, special or bool(old and old.special))
    special_texts = _special_texts(folder / "special_tokens_map.json")
    return {
        token: _Added(text, special or token == pad_token or text in special_texts)
        for token, (text, special) in found.items()
    }


def _is_id(token: Any) -> bool:
    return type(token) is int and 0 <= token < 2**31


_Entries = Iterator[tuple[Any, Any, bool]]


def _entries_of_added(values: dict[str, Any]) -> _Entries:
    for text, token in values.items():
        yield token, text, False


def _entries_of_config(values: dict[str, Any]) -> _Entries:
    entries = values.get("added_tokens_decoder")
    for token, entry in (entries if isinstance(entries, dict) else {}).items():
        # An id has few digits; int() refuses thousands of them.
        yield int(token) if token.isdecimal() and len(token) < 20 else token, *_text(entry)


def _entries_of_fast(values: dict[str, Any]) -> _Entries:
    entries = values.get("added_tokens")
    for entry in entries if isinstance(entries, list) else []:
        yield entry.get("id") if isinstance(entry, dict) else None, *_text(entry)


def _text(entry: Any) -> tuple[Any, bool]:
    if isinstance(entry, dict):
        return entry.get("content"), entry.get("special") is True
    return entry, False


def _special_texts(path: pathlib.Path) -> set[str]:
    """Return the tokens of special_tokens_map.json; it may be missing."""
    texts: set[str] = set()
    for value in (read_json(path) if os.path.lexists(path) else {}).values():
        for entry in value if isinstance(value, list) else [value]:
            text, _ = _text(entry)
            if isinstance(text, str):
                texts.add(text)
    return texts


def _from_json(path: pathlib.Path) -> Any:
    """Return the SentencePiece model that a tokenizer.json was made from.

    A piece's score is the rank of its first merge: the order in which pieces are merged is all that
    the scores decide.
    """
    values = read_json(path)
    model: dict[str, Any] = values["model"] if isinstance(values.get("model"), dict) else {}
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise _not_llama(path, "it is not BPE with byte fallback")
    if not all(map(_is_id, vocab.values())) or {*vocab.values()} != {*range(len(vocab))}:
        raise _not_llama(path, "its ids are not consecutive from 0")
    if not all(0 < len(piece) <= _LONGEST and is_text(piece) for piece in vocab):
        raise _not_llama(path, f"a piece is empty, longer than {_LONGEST} or no Unicode")
    if not _marks_spaces(values):
        raise _not_llama(path, f"it does not replace spaces by {_SPACE}")
    pieces = sorted(vocab, key=vocab.__getitem__)
    merges = _merges(path, model.get("merges") or [])
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    if set(merges) != set(_splits(pieces[3:], vocab)) or len(set(merges)) != len(merges):
        raise _not_llama(path, "its merges are not all that its pieces allow")
    built = proto.ModelProto()
    for piece in pieces:
        score = -float(ranks.get(piece, len(merges)))
        built.pieces.add(piece=piece, score=score, type=_kind(piece, vocab[piece]))
    built.trainer_spec.model_type = proto.TrainerSpec.BPE
    built.trainer_spec.byte_fallback = True
    built.normalizer_spec.name = "identity"
    built.normalizer_spec.add_dummy_prefix = True
    built.normalizer_spec.remove_extra_whitespaces = False
    try:
        Tokenizer(built.SerializeToString())
    except InputError as error:
        raise _not_llama(path, str(error)) from None
    return built


def _merges(path: pathlib.Path, merges: Any) -> list[tuple[str, ...]]:
    """Return the pairs of pieces, which are written as two strings or as one with a space."""
    if isinstance(merges, list):
        pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
        if all(isinstance(pair, list) and all(isinstance(p, str) for p in pair) for pair in pairs):
            return [tuple(pair) for pair in pairs]
    raise _not_llama(path, "its merges are no pairs of pieces")


def _kind(piece: str, token: int) -> int:
    if token < 3:
        return (_Kind.UNKNOWN, _Kind.CONTROL, _Kind.CONTROL)[token]
    is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
    return _Kind.BYTE if is_byte else _Kind.NORMAL


def _splits(pieces: Sequence[str], vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield every way to make a piece of two others."""
    for piece in pieces:
        for i in range(1, len(piece)):
            if piece[:i] in vocab and piece[i:] in vocab:
                yield piece[:i], piece[i:]


def _marks_spaces(values: dict[str, Any]) -> bool:
    """Whether a space, and the beginning of a text, becomes Llama's mark."""
    normalizer, before = values.get("normalizer") or {}, values.get("pre_tokenizer") or {}
    if not isinstance(normalizer, dict) or not isinstance(before, dict):
        return False
    steps = normalizer.get("normalizers") or [normalizer]
    if not isinstance(steps, list):
        return False
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE} in steps
    prepended = {"type": "Prepend", "prepend": _SPACE} in steps
    if before.get("type") == "Metaspace":
        return before.get("replacement") == _SPACE and before.get("prepend_scheme") != "never"
    return replaced and prepended and not before


def _not_llama(path: pathlib.Path, reason: str) -> InputError:
    return InputError(
        f"{path} is no Llama 2 tokenizer: {reason}; give the tokenizer.model with --tokenizer, or "
        "--tokenizer=none for token ids only"
    )
