"""Requests: from flags, from a dialog in JSON, or whole in the model card's JSON."""

import re
from typing import Any

from llama_jax.card import contract
from llama_jax.cli.console import note
from llama_jax.cli.files import read_bytes, read_prompt
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.keys import read_public_key
from llama_jax.cli.refusals import refuse_flags
from llama_jax.cli.verbs import PARAMETERS, PROMPT
from llama_jax.engine.parameters import parameter_problems
from llama_jax.engine.request import GenerationRequest, make_request
from llama_jax.errors import InputError, one_line
from llama_jax.receipt.reading import read_receipts
from llama_jax.strict_json import parse_json


def parameters_from_flags() -> dict[str, Any]:
    """Return the generation parameters, None where a flag is not given and has no default."""
    values = {name: FLAGS[name].value for name in PARAMETERS}
    if FLAGS.logit_bias is not None:
        values["logit_bias"] = _parse_bias(FLAGS.logit_bias)
    if FLAGS.allowed_tokens is not None:
        values["allowed_tokens"] = parse_tokens("allowed_tokens", FLAGS.allowed_tokens)
    return values


def read_request() -> tuple[GenerationRequest, str]:
    """Return the request that the flags describe, checked, and how to pass a seed in it.

    The latter has "{}" for the seed; it is empty if a seed was given.
    """
    if FLAGS.output not in ("text", "json"):
        raise InputError(f"--output is {FLAGS.output!r:.40}, expected text or json")
    if FLAGS.logprobs is not None and FLAGS.output != "json":
        raise InputError("--logprobs is given without --output=json, which has them; add it")
    for name in ("at", "key"):
        if FLAGS[name].value is not None and FLAGS.resume is None:
            raise InputError(f"--{name} is given without --resume; add it")
    if FLAGS.resume is not None:
        return _continuation(FLAGS.resume), ""
    if FLAGS.request is not None:
        return _read_card_request(FLAGS.request)
    request = parameters_from_flags()
    prompt = ("system", "raw", "parse_control", "allow_control_tags")
    request |= {"prompt": read_prompt()} | {name: FLAGS[name].value for name in prompt}
    if FLAGS.messages is not None:
        request["messages"] = _read_messages(FLAGS.messages)
    if FLAGS.prompt_tokens is not None:
        request["prompt_tokens"] = parse_tokens("prompt_tokens", FLAGS.prompt_tokens)
    if not {"messages", "prompt_tokens"} & request.keys() and request["prompt"] is None:
        raise InputError(
            "no prompt given, expected --prompt=TEXT, --prompt_file=FILE, --messages=FILE or "
            "--prompt_tokens=ID,...; or talk to the model with the verb chat; see --help"
        )
    if FLAGS.output == "json" and FLAGS["stream"].present and FLAGS.stream:
        raise InputError("--stream is given with --output=json, which is printed whole; drop one")
    return make_request(**request), "--seed={}" if FLAGS.seed is None else ""


def _read_card_request(source: str) -> tuple[GenerationRequest, str]:
    """Return what `read_request` does, from JSON; warn of fields without effect."""
    others = [name for name in (*PROMPT, *PARAMETERS) if name != "request"]
    refuse_flags("--request", "which holds the whole request", *others)
    card = contract.check_extended(_read_json(source, f"--request={source}"))
    for name in card.ignored:
        note(f"warning: {name} is not a field of the model card here, and is ignored")
    if card.stream and not (FLAGS.stream and FLAGS.output == "text"):
        note("warning: stream is true in the request, but the answer is printed whole")
    return card.request(), "" if "seed" in card.fields else '"seed": {}'


def _continuation(path: str) -> GenerationRequest:
    """Return the request that continues a receipt's run; the seed and the length may be others."""
    changeable = ("seed", "max_tokens")
    others = [name for name in (*PROMPT, *PARAMETERS) if name not in changeable]
    refuse_flags("--resume", "whose run has prompt and parameters", *others)
    receipts = list(read_receipts(path, read_public_key()))
    if len(receipts) != 1:
        raise InputError(f"--resume={path} has {len(receipts):,} receipts, expected one")
    (receipt,) = receipts
    if problems := receipt.problems:
        raise InputError(f"--resume={path} was edited: {one_line(problems)}")
    at = len(receipt.tokens) if FLAGS.at is None else FLAGS.at
    given = {name: FLAGS[name].value for name in changeable if FLAGS[name].value is not None}
    if problems := parameter_problems(given, ()):
        raise InputError(one_line(problems))
    return receipt.continuation(at, **given)


def _read_messages(source: str) -> list:
    name = f"--messages={source}"
    messages = _read_json(source, name)
    if not isinstance(messages, list):
        raise InputError(f"{name} holds {messages!r:.40}, expected a list of messages")
    return messages


def _read_json(source: str, name: str) -> Any:
    """Parse the JSON of a file, or of stdin for "-"."""
    return parse_json(read_bytes(source, name), name)


def _parse_bias(texts: list[str]) -> dict[str, float]:
    """Return the bias of each token id that --logit_bias lists."""
    biases: dict[str, float] = {}
    for text in texts:
        token, _, bias = text.partition(":")
        try:
            value = float(bias)
        except ValueError:
            raise InputError(
                f"--logit_bias has {text!r:.40}, expected a token id and its bias, such as 15043:-5"
            ) from None
        if token in biases:
            raise InputError(f"--logit_bias has {token} more than once, expected each id once")
        biases[token] = value
    return biases


def parse_tokens(flag: str, texts: list[str]) -> list[int]:
    """Return the token ids that a flag lists."""
    for text in texts:
        if not re.fullmatch("-?[0-9]{1,18}", text):
            raise InputError(f"--{flag} has {text!r:.40}, expected integers such as 1,15043")
    return [int(text) for text in texts]
