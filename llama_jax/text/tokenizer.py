"""SentencePiece, and streaming decoding that keeps every byte and space."""

import codecs
import functools
import itertools
import pathlib
import re
from typing import Any

import sentencepiece

from llama_jax.errors import InputError
from llama_jax.regular_file import read_regular

BOS_ID = 1
EOS_ID = 2
BOS_PIECE = "<s>"
EOS_PIECE = "</s>"


class Tokenizer:
    """Llama 2's tokenizer: SentencePiece BPE with byte fallback, BOS 1 and EOS 2.

    Args:
        source: a `tokenizer.model` file, or its content.

    Raises:
        InputError: the file is missing, is not a SentencePiece model, or has other special ids.
    """

    def __init__(self, source: str | pathlib.Path | bytes):
        if isinstance(source, bytes):
            path, model = "tokenizer.model", source
        else:
            path = pathlib.Path(source)
            try:
                model = read_regular(path)
            except (OSError, ValueError) as error:  # ValueError: a NUL in the path
                reason = getattr(error, "strerror", None) or error
                raise InputError(f"{path}: cannot read the tokenizer ({reason})") from None
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(model) and self._sp.LoadFromSerializedProto(model)
        except RuntimeError:
            loaded = False
        if not loaded:
            raise InputError(
                f"{path}: not a SentencePiece model ({len(model):,} bytes, starts with "
                f"{model[:16]!r}); copy tokenizer.model again"
            )
        if (self._sp.bos_id(), self._sp.eos_id()) != (BOS_ID, EOS_ID):
            raise InputError(
                f"{path}: BOS and EOS are {self._sp.bos_id()} and {self._sp.eos_id()}, expected "
                f"{BOS_ID} and {EOS_ID}; this is not a Llama 2 tokenizer"
            )

    @property
    def vocab_size(self) -> int:
        """Number of pieces, special ones included."""
        return self._sp.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS; special tokens in it are plain text.

        Raises:
            InputError: the text holds a lone surrogate, which UTF-8 cannot encode.
        """
        if not is_text(text):
            raise InputError("text is not valid Unicode: lone surrogate; send whole characters")
        return self._sp.EncodeAsIds(text)

    @functools.cached_property
    def control_pieces(self) -> dict[str, int]:
        """The texts of the control tokens and their ids: `<s>`, `</s>`, and those added to them."""
        ids = range(self.vocab_size)
        named = {self.piece(token): token for token in ids if self._sp.IsControl(token)}
        return {text: token for text, token in named.items() if text != unnamed_piece(token)}

    def encode_with_control(self, text: str) -> list[int]:
        """Return the ids of a text in which each of `control_pieces` is its token.

        Of two that begin at one letter the longer is taken. The text between them is encoded part
        by part, each as a beginning of its own: as Meta's dialog format does.

        Raises:
            InputError: see `encode`.
        """
        known = self.control_pieces
        longest_first = sorted(known, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        encoded = [[known[part]] if part in known else self.encode(part) for part in parts]
        return [token for ids in encoded for token in ids]

    def decode_with_control(self, ids: list[int]) -> str:
        """Return the text of ids, that of control tokens too: what `encode_with_control` reads."""
        texts = {token: piece for piece, token in self.control_pieces.items()}
        parts = itertools.groupby(ids, key=texts.get)
        return "".join(
            piece * len(list(run)) if piece else self.decode(list(run)) for piece, run in parts
        )

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; invalid UTF-8 becomes U+FFFD.

        BOS and EOS have no text, nor have ids beyond the pieces, which a prompt may hold.
        """
        pieces = self.vocab_size
        return self._sp.DecodeIds([token for token in ids if token < pieces])

    def piece(self, token: int) -> str:
        """Return the vocabulary's piece of one id, such as `▁the` or `<0x0A>`."""
        if token >= self.vocab_size:
            return unnamed_piece(token)
        return self._sp.IdToPiece(token)

    def byte(self, token: int) -> int | None:
        """Return the value of a byte-fallback token; None for another token."""
        if token >= self.vocab_size or not self._sp.IsByte(token):
            return None
        return int(self.piece(token)[3:5], 16)

    def num_bytes(self, token: int) -> int:
        """Return the bytes of UTF-8 that a token stands for, its leading space included."""
        if self.is_control(token):
            return 0
        return 1 if self._sp.IsByte(token) else len(self.piece(token).replace("▁", " ").encode())

    def is_control(self, token: int) -> bool:
        """Return whether an id decodes to nothing: BOS, EOS, and ids beyond the pieces."""
        return token >= self.vocab_size or self._sp.IsControl(token)


def transformers_config(context: int) -> dict[str, Any]:
    """Return a tokenizer's properties by the names of transformers' tokenizer_config.json.

    Args:
        context: tokens that the model holds.
    """
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": BOS_PIECE,
        "eos_token": EOS_PIECE,
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": context,
    }


def unnamed_piece(token: int) -> str:
    """Return what stands for the piece of an id that no tokenizer names."""
    return f"<unused_{token}>"


def most_unnamed(pieces: int) -> int:
    """Return how many rows an embedding may have beyond its tokenizer's pieces."""
    return max(64, pieces // 8)


def check_vocabulary(pieces: int, rows: int, source: str) -> None:
    """Refuse a tokenizer of another model than one whose embedding has so many rows.

    Fine-tunes add rows to an embedding, and round their number up. So there may be more rows than
    pieces (`most_unnamed`); those have no text and are never sampled.

    Args:
        pieces: the tokenizer's.
        rows: the model's vocab_size.
        source: the tokenizer's name, for the error.
    """
    if not pieces <= rows <= pieces + most_unnamed(pieces):
        raise InputError(
            f"{source} has {pieces:,} pieces, the model's vocab_size is {rows:,}; give the "
            "tokenizer that belongs to these weights"
        )


def is_text(text: str) -> bool:
    """Return whether a string has an encoding in UTF-8: it has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class StreamDecoder:
    """Decode a stream of tokens; the pieces concatenate to `decode` of all tokens at once.

    A character whose UTF-8 bytes are spread over tokens is held back until it is complete. The
    space before a word is kept, except at the start of the text, where SentencePiece drops it.

    Args:
        tokenizer: the tokens'.
        continues: the text continues another, so its first word keeps its space too.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False):
        self._tokenizer = tokenizer
        # The last visible token, and the last control token after it; all, if none was visible.
        # Which visible token it is makes no difference to the text after it.
        self._context: list[int] = tokenizer.encode("x")[-1:] if continues else []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Take the next token; return the text it completes, possibly none."""
        self._pending.append(token)
        return "" if self._ends_inside_character() else self.finish()

    def finish(self) -> str:
        """Return what is held back; bytes of an incomplete character become U+FFFD."""
        # SentencePiece keeps a word's leading space only after a visible token.
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._pending)[len(before) :]
        tokens = self._context + self._pending
        visible = [i for i, token in enumerate(tokens) if not self._tokenizer.is_control(token)]
        if visible:
            tokens = [tokens[visible[-1]], *tokens[visible[-1] + 1 :][-1:]]
        self._context, self._pending = tokens, []
        return text

    def _ends_inside_character(self) -> bool:
        values = [self._tokenizer.byte(token) for token in self._pending]
        tail: list[int] = []
        for value in reversed(values):
            if value is None:
                break
            tail.insert(0, value)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(bytes(tail))
        return bool(decoder.getstate()[0])
