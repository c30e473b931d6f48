"""The parameters of OpenAI's routes: those that the engine takes, refused ones, ignored ones."""

from typing import Any

from llama_jax.engine.parameters import SCHEMAS, parameter_problem
from llama_jax.server.errors import BAD_INPUT, UNSUPPORTED, ApiError

REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Parameters that would change the response, each with the values that would not."""

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Parameters of OpenAI's that have no effect on the text, here."""

_OTHERWISE_NAMED = ("logprobs", "prompt_logprobs", "allowed_tokens")

PARAMETERS = {name: name for name in SCHEMAS if name not in _OTHERWISE_NAMED} | {
    "allowed_token_ids": "allowed_tokens"
}
"""The parameters of generation that both routes take, with the engine's names for them.

They are OpenAI's, and vLLM's where OpenAI has none.
"""


def take_parameters(fields: dict[str, Any]) -> dict[str, Any]:
    """Take the parameters of generation out of a request; return them by the engine's names.

    Raises:
        ApiError: a value that the engine does not take, by the name that was sent.
    """
    given = {name: fields.pop(name) for name in list(fields) if name in PARAMETERS}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    for name, value in given.items():
        if problem := parameter_problem(name, value, SCHEMAS[PARAMETERS[name]]):
            raise ApiError(BAD_INPUT, problem, param=name)
    return {PARAMETERS[name]: value for name, value in given.items()}


def refuse_unsupported(fields: dict[str, Any]) -> None:
    """Take the unsupported parameters out of a request; refuse one that has an effect."""
    for name, harmless in REFUSED.items():
        if name in fields and not _is_one_of(fields.pop(name), harmless):
            raise ApiError(UNSUPPORTED, f"{name} is not supported, leave it out", param=name)


def _is_one_of(value: Any, others: tuple[Any, ...]) -> bool:
    """Compare as JSON does, where false is not 0."""
    return any(
        value == other and (type(value) is bool) == (type(other) is bool) for other in others
    )
