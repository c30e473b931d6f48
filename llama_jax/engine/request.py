"""GenerationRequest: a prompt and the parameters, checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.engine.draw import Draw
from llama_jax.engine.parameters import Parameters, make_parameters, parameter_problems
from llama_jax.errors import InputError, one_line
from llama_jax.text.chat import Message, check_dialog, encode_dialog
from llama_jax.text.tokenizer import BOS_ID, BOS_PIECE, Tokenizer

_PROMPTS = ("prompt", "messages", "prompt_tokens", "system", "raw")
_OPTIONS = ("allow_control_tags", "parse_control")


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One generation: one of three kinds of prompt, and the parameters; see `make_request`."""

    messages: tuple[Message, ...] | None
    raw_prompt: str | None
    """Text that is used as it is, after BOS."""
    prompt_tokens: tuple[int, ...] | None
    parameters: Parameters
    allow_control_tags: bool = False
    parse_control: bool = False
    add_bos: bool = False
    """Put BOS before a raw prompt, or before ids, that do not begin with it."""
    continues_prompt: bool = False
    """The text continues the prompt's, so its first word keeps its space."""
    resumed: tuple[Draw, ...] = ()
    """The first draws of another run, which this one continues."""

    def warnings(self, tokenizer: Tokenizer | None) -> list[str]:
        """Return what the user may not expect of this request."""
        if self.prompt_tokens is not None and self.adds_bos:
            return [
                f"the token ids did not begin with BOS ({BOS_ID}), which was put before them; "
                "add_special_tokens false leaves them as they are"
            ]
        if self.raw_prompt is None or self.parse_control or tokenizer is None:
            return []
        return [
            f"the prompt contains {piece}, which is plain text here, not the control token; "
            "parse_control (OpenAI's completions, Python, run.py) makes it the token"
            for piece in tokenizer.control_pieces
            if piece in self.raw_prompt
        ]

    @property
    def adds_bos(self) -> bool:
        """Whether `encode` puts BOS before what was given."""
        if self.prompt_tokens is not None:
            return self.add_bos and self.prompt_tokens[0] != BOS_ID
        if self.raw_prompt is not None:
            has_bos = self.parse_control and self.raw_prompt.startswith(BOS_PIECE)
            return self.add_bos and not has_bos
        return False

    def encode(self, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
        """Return the prompt's token ids: Meta's dialog format, or BOS and the raw text.

        Raises:
            InputError: text without a tokenizer, or ids outside the vocabulary.
        """
        if self.resumed:
            check_tokens([draw.token for draw in self.resumed], vocab_size, "the resumed draws")
        bos = [BOS_ID] if self.adds_bos else []
        if self.prompt_tokens is not None:
            return bos + check_tokens(self.prompt_tokens, vocab_size)
        if tokenizer is None:
            raise InputError(
                "the checkpoint has no tokenizer.model, so text cannot be encoded; give "
                "prompt_tokens, or convert again from a folder that holds tokenizer.model"
            )
        if self.messages is not None:
            return encode_dialog(
                self.messages, tokenizer, allow_control_tags=self.allow_control_tags
            )
        assert self.raw_prompt is not None
        if self.parse_control:
            return bos + tokenizer.encode_with_control(self.raw_prompt)
        return bos + tokenizer.encode(self.raw_prompt)


Request = Mapping[str, Any] | GenerationRequest
"""The arguments of `Llama.generate`, or what `make_request` makes of them."""


def make_request(
    *,
    prompt: str | None = None,
    messages: Sequence[Message] | None = None,
    prompt_tokens: Sequence[int] | None = None,
    system: str | None = None,
    raw: bool = False,
    allow_control_tags: bool = False,
    parse_control: bool = False,
    **parameters: Any,
) -> GenerationRequest:
    """Check a request and fill in its defaults.

    Args:
        prompt: one user turn. Exactly one of prompt, messages, prompt_tokens is given.
        messages: a dialog; see `chat.encode_dialog`.
        prompt_tokens: ids used as they are (no BOS is added).
        system: a system prompt, with `prompt` alone.
        raw: use the prompt as it is, behind BOS, without the chat template.
        allow_control_tags: accept tags such as `[INST]` in system and user turns, as plain text.
        parse_control: with raw: read control tokens such as `<s>` as tokens; BOS is not doubled.
        **parameters: the fields of `Parameters`; None stands for the default. A seed is drawn if
            none is given. `stop` may be one string, and the ids in `logit_bias` may be strings.

    Raises:
        InputError: naming everything that is wrong, the messages' order included.
    """
    prompt_tokens = _plain(prompt_tokens)
    if isinstance(parameters.get("stop"), str):
        parameters["stop"] = [parameters["stop"]]
    values = {name: _plain(value) for name, value in parameters.items() if value is not None}
    problems = _prompt_problems(prompt, messages, prompt_tokens, system, raw)
    problems += _option_problems(raw, allow_control_tags, parse_control)
    problems += parameter_problems(values, (*_PROMPTS, *_OPTIONS))
    if problems:
        raise InputError(one_line(problems))
    if prompt is not None and not raw:
        messages = [] if system is None else [Message(role="system", content=system)]
        messages = [*messages, Message(role="user", content=prompt)]
    if messages is not None:
        check_dialog(messages, allow_control_tags=allow_control_tags)
    return GenerationRequest(
        raw_prompt=prompt if raw else None,
        messages=None if messages is None else tuple(messages),
        prompt_tokens=None if prompt_tokens is None else tuple(prompt_tokens),
        parameters=make_parameters(values),
        allow_control_tags=allow_control_tags,
        parse_control=parse_control,
        add_bos=raw,
    )


def check_tokens(tokens: Any, vocab_size: int, name: str = "prompt_tokens") -> list[int]:
    """Return token ids as a list of int; refuse none at all, and ids outside the vocabulary."""
    tokens = _plain(tokens)
    if not len(tokens):
        raise InputError(f"{name} is empty, expected at least 1 token id")
    for i, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InputError(
                f"{name}[{i}] is {token!r}, expected a token id from 0 to {vocab_size - 1}"
            )
    return list(tokens)


def _plain(value: Any) -> Any:
    """Turn NumPy's and JAX's arrays and scalars into Python's lists and numbers."""
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def _prompt_problems(prompt: Any, messages: Any, tokens: Any, system: Any, raw: Any) -> list[str]:
    kinds = {"prompt": prompt, "messages": messages, "prompt_tokens": tokens}
    given = [name for name, value in kinds.items() if value is not None]
    problems = []
    if not given:
        problems.append("no prompt given, expected one of prompt, messages and prompt_tokens")
    if len(given) > 1:
        problems.append(
            f"{', '.join(given)} are given together, expected one of them; drop the others"
        )
    if prompt is not None and not isinstance(prompt, str):
        problems.append(f"prompt is {prompt!r:.40}, expected a string")
    elif prompt is not None and not prompt:
        problems.append("prompt is empty, expected at least 1 character")
    for name in ("messages", "prompt_tokens"):
        value = kinds[name]
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
            problems.append(f"{name} is {value!r:.40}, expected a list")
        elif name == "prompt_tokens" and value is not None and not len(value):
            problems.append("prompt_tokens is empty, expected at least 1 token id")
    if system is not None and not isinstance(system, str):
        problems.append(f"system is {system!r:.40}, expected a string")
    if system is not None and (prompt is None or raw):
        other = "raw" if raw else given[0] if given else "no prompt"
        problems.append(
            f"system is given with {other}, expected it with a prompt in the chat format; "
            "put it into the messages or the raw text"
        )
    if not isinstance(raw, bool):
        problems.append(f"raw is {raw!r:.40}, expected true or false")
    elif raw and prompt is None and given:
        problems.append(f"raw is given with {given[0]}, expected it with prompt; leave it out")
    return problems


def _option_problems(raw: Any, allow_control_tags: Any, parse_control: Any) -> list[str]:
    options = {"allow_control_tags": allow_control_tags, "parse_control": parse_control}
    problems = [
        f"{name} is {value!r:.40}, expected true or false"
        for name, value in options.items()
        if not isinstance(value, bool)
    ]
    if parse_control is True and raw is not True:
        problems.append(
            "parse_control is given without raw, expected both; add raw or leave it out"
        )
    return problems
