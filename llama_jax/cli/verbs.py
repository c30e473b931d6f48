"""The verbs, and which flags each takes."""

import dataclasses

HOSTS = (
    *("distributed", "coordinator_address", "num_processes", "process_id"),
    *("initialization_timeout_s", "heartbeat_timeout_s"),
)
MODEL = (
    *("checkpoint", "dtype", "context", "slots", "determinism", "devices", "replicas"),
    *("eos_tokens", "verify", "convert", *HOSTS),
)
SPECULATION = ("speculate", "speculate_tokens")
ESTIMATE = ("estimate", "config", "chip")
PROMPT = (
    *("prompt", "prompt_file", "system", "messages", "prompt_tokens", "request"),
    *("raw", "parse_control", "allow_control_tags"),
)
SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "allowed_tokens",
    "stop",
    "ignore_eos",
)
OUTPUT = ("output", "stream", "logprobs", "print_prompt_tokens")
BATCH = ("input",)
RAY = ("engine", "ray_address", "workers", "gpus_per_worker", "rows_per_call", "allow_mixed")
SCORE = ("continuation", "stride", "token_logprobs")
SERVE = (
    *("host", "port", "api_token", "insecure", "allowed_origins", "log_format"),
    *(
        "served_model_name",
        "max_queue",
        "max_queue_per_client",
        "max_slots_per_client",
        "timeout_s",
    ),
    *("batch_dir", "batch_max_requests", "batch_max_file_mb", "batch_max_stored_mb"),
    *("batch_keep_days", "batch_slots"),
)
RECEIPT = ("receipt", "private", "sign_key")
KEPT_RECEIPTS = ("receipts", "private", "sign_key")
VERIFY = ("key",)
REPLAY = ("prefill",)
RESUME = ("resume", "at")
SWEEP = ("seeds",)
COMPARE = ("plot",)
GENERAL = ("debug",)

PARAMETERS = (*SAMPLING, "logprobs")
"""The flags that are generation parameters of the same name."""


@dataclasses.dataclass(frozen=True)
class Verb:
    """What the command line does, and the flags for it."""

    name: str
    """As typed; empty for the answer to one prompt."""
    arguments: str
    """What follows in the line of usage; what is in capitals is given without a flag."""
    summary: str
    takes: tuple[str, ...]
    refuses_others: str = ""
    """The reason, in the error; flags that one other verb alone takes need none."""
    takes_at_default: tuple[str, ...] = ()
    """Flags with one value that works here, their default."""
    runs_model: bool = True
    """False: one process does it, without a device."""

    @property
    def operands(self) -> list[str]:
        """What is given without a flag, in order."""
        return [word for word in self.arguments.split() if word.isupper()]


VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            name="",
            arguments="--prompt=TEXT [flags]",
            summary="Answer one prompt.",
            takes=(
                *(*MODEL, *SPECULATION, *ESTIMATE, *PROMPT, *SAMPLING, *OUTPUT),
                *(*RECEIPT, *RESUME, *VERIFY, *GENERAL),
            ),
        ),
        Verb(
            name="chat",
            arguments="[flags]",
            summary="Chat in the terminal.",
            takes=(*MODEL, *SPECULATION, "system", "allow_control_tags", *SAMPLING, *GENERAL),
            refuses_others="which reads turns from stdin and streams text in the chat format",
            takes_at_default=("raw", "output", "stream"),
        ),
        Verb(
            name="batch",
            arguments="--input=FILE --output=FILE",
            summary="Answer a file of requests.",
            takes=(
                *MODEL,
                *SPECULATION,
                *ESTIMATE,
                *BATCH,
                "output",
                "seed",
                *RAY,
                *RECEIPT,
                *GENERAL,
            ),
            refuses_others="whose requests are in --input",
        ),
        Verb(
            name="score",
            arguments="--prompt_file=FILE [flags]",
            summary="Compute the perplexity of text.",
            takes=(
                *(name for name in MODEL if name not in ("eos_tokens", "determinism")),
                *("prompt", "prompt_file", "prompt_tokens", "parse_control"),
                *(*BATCH, *SCORE, "output", *GENERAL),
            ),
            refuses_others="which generates nothing",
        ),
        Verb(
            name="sweep",
            arguments="--seeds=0:64 --prompt=TEXT [flags]",
            summary="Answer one prompt by many seeds.",
            takes=(
                *(*MODEL, *SPECULATION, *PROMPT, *SWEEP, *RECEIPT, *GENERAL),
                *(name for name in SAMPLING if name != "seed"),
            ),
            refuses_others="which prints a line of JSON for each of --seeds",
        ),
        Verb(
            name="replay",
            arguments="FILE [flags]",
            summary="Run again what receipts say, and compare.",
            takes=(
                *(n for n in MODEL if n not in ("dtype", "determinism", "eos_tokens")),
                *(*VERIFY, *REPLAY, "output", *GENERAL),
            ),
            refuses_others="which repeats what a receipt says",
        ),
        Verb(
            name="verify_receipt",
            arguments="FILE [flags]",
            summary="Check signatures and digests of receipts.",
            takes=(*VERIFY, "output", *GENERAL),
            refuses_others="which runs no model",
            runs_model=False,
        ),
        Verb(
            name="compare",
            arguments="A B [flags]",
            summary="Compare receipts or models, draw by draw.",
            takes=("context", "slots", "verify", "input", "output", *COMPARE, *VERIFY, *GENERAL),
            refuses_others="whose sides have settings after commas",
        ),
        Verb(
            name="selftest",
            arguments="[flags]",
            summary="Repeat recorded runs of the demo model here.",
            takes=("devices", "replicas", "determinism", *GENERAL),
            refuses_others="which runs the demo model",
        ),
        Verb(
            name="serve",
            arguments="[flags]",
            summary="Serve the HTTP API.",
            takes=(*MODEL, *SPECULATION, *ESTIMATE, *SERVE, *KEPT_RECEIPTS, *GENERAL),
            refuses_others="whose requests come over HTTP",
        ),
    )
}
