"""What a generation returns: pieces of text as they come, then a Result."""

import dataclasses
from typing import Any, Literal

from llama_jax.engine.parameters import Parameters
from llama_jax.engine.record import Record

FinishReason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability under the model alone.

    Penalties, temperature, top-k and top-p do not enter.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely tokens with theirs, in falling order; as many as were requested."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some text, ending where a character ends, and the tokens that it took."""

    text: str
    """May be empty: of tokens held back, or with no tokenizer."""
    tokens: list[int]
    logprobs: list[TokenLogprob]
    """One for each of `tokens` if requested, else none."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    """Without the EOS that ended them."""
    total_tokens: int
    cached_tokens: int
    """Of the prompt: served from the prefix cache."""


@dataclasses.dataclass(frozen=True)
class Timings:
    """Where the time went: seconds, and tokens per second."""

    load_s: float
    """Loading the checkpoint."""
    compile_s: float
    """Compiling while the request was in the engine."""
    queue_s: float
    """Waiting for a slot."""
    prefill_s: float
    """From the slot to the first token."""
    decode_s: float
    """From the first token to the last."""
    prefill_tokens_per_s: float | None
    """None: no token was generated."""
    decode_tokens_per_s: float | None
    """None: nothing was decoded."""


@dataclasses.dataclass(frozen=True)
class Speculated:
    """What drafts saved; see docs/performance.md. It depends on time, and decides no token."""

    drafted: int
    """Draft tokens that were verified."""
    accepted: int
    """Of those, the ones that equal the token drawn."""
    passes: int
    """Passes of the model over the last token and its drafts; a step without drafts is one."""
    tokens_per_pass: float
    """Tokens drawn in a pass, 1 without any accepted draft."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished generation; its fields are those of the command line's JSON."""

    response: str | None
    """The text; None if the checkpoint has no tokenizer."""
    tokens: list[int]
    """Ids generated, without the EOS that ended them."""
    prompt_tokens: list[int]
    """Ids the model was fed."""
    finish_reason: FinishReason
    """`stop`: the model generated EOS or a stop string; `length`: max_tokens were generated;
    `cancelled`: the reader gave up."""
    usage: Usage
    seed: int
    fingerprint: str
    """Of weights and configuration: where it and the request are equal, so are the tokens (on a GPU
    or TPU as far as docs/design.md says, Exactness)."""
    parameters: Parameters
    """With every default and the drawn seed: together with `prompt_tokens` they repeat the run."""
    timings: Timings
    warnings: list[str] = dataclasses.field(default_factory=list)
    """What the user may not expect, such as `<s>` in a raw prompt, which is plain text."""
    logprobs: list[TokenLogprob] | None = None
    """One for each of `tokens`, if requested."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One for each of `prompt_tokens`, if requested; the first is None."""
    speculation: Speculated | None = None
    """None: the model does not speculate, or drew one token at most."""
    quantization: str | None = None
    """INT8_LABEL if the weights are quantized."""
    record: Record | None = dataclasses.field(default=None, repr=False, compare=False)
    """What a receipt is made of beside this; see `receipt`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the command line's JSON: all but `record`."""
        values = dataclasses.asdict(dataclasses.replace(self, record=None))
        del values["record"]
        values["timings"] = {
            name: value if value is None else round(value, 6)  # microseconds
            for name, value in values["timings"].items()
        }
        return values

    def receipt(self, *, private: bool = False) -> dict[str, Any]:
        """Return a receipt, by which another can repeat the run; see docs/receipts.md.

        Args:
            private: leave out prompt and text, and have their digests alone.

        Raises:
            InputError: the weights were not read from a checkpoint, so they have no digest.
        """
        from llama_jax.provenance.statement import make_statement  # it knows results

        return make_statement(self, private=private)
