"""The flags of speculation, and what each means."""

from absl import flags

from llama_jax.drafters import DEFAULT_TOKENS, MAX_TOKENS, OFF


def define() -> None:
    """Define them in absl's global set."""
    flags.DEFINE_string(
        "speculate",
        OFF,
        "Draft tokens and verify several in one pass of the model; the answer is the same. ngram: "
        "what followed the last tokens before, in prompt or answer. A checkpoint of the same "
        "vocabulary: what that smaller model draws.",
    )
    flags.DEFINE_integer(
        "speculate_tokens",
        DEFAULT_TOKENS,
        f"Tokens to draft for a pass at most, 1 to {MAX_TOKENS}; fewer where they are rejected.",
    )
