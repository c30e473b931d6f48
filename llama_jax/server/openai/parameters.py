"""The parameters of OpenAI's routes: those that the engine takes, refused ones, ignored ones."""

from typing import Any

from llama_jax.engine.parameters import SCHEMAS, parameter_problems
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
    "logit_bias": ({},),
    "min_p": (0,),
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

PARAMETERS = SCHEMAS.keys() - {"logprobs", "prompt_logprobs"}
"""The parameters of generation that both routes take by the engine's names."""


def check_parameters(parameters: dict[str, Any]) -> None:
    """Refuse a value that the engine does not take, by the parameter's name."""
    if isinstance(parameters.get("stop"), str):
        parameters["stop"] = [parameters["stop"]]
    for name, value in parameters.items():
        for problem in parameter_problems({name: value}):
            raise ApiError(BAD_INPUT, problem, param=name)


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
