"""The flags, and what each means."""

from absl import flags

from llama_jax.cli import (
    batch_flags,
    ray_flags,
    receipt_flags,
    serve_flags,
    speculation_flags,
)
from llama_jax.decode.chips import CHIPS
from llama_jax.decode.plan import DETERMINISM
from llama_jax.weights.dtypes import DTYPES

FLAGS = flags.FLAGS


def define() -> None:
    """Define all flags in absl's global set; call it once."""
    _define_model_flags()
    _define_process_flags()
    _define_estimate_flags()
    _define_prompt_flags()
    _define_sampling_flags()
    _define_token_flags()
    _define_output_flags()
    _define_score_flags()
    ray_flags.define()
    speculation_flags.define()
    receipt_flags.define()
    serve_flags.define()
    batch_flags.define()
    flags.DEFINE_string("input", None, "Requests, or texts to score, one JSON object per line.")
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def _define_model_flags() -> None:
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Checkpoint written by `python -m convert`. "
        "Default: $LLAMA_JAX_CHECKPOINT, else the embedded demo model.",
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        DTYPES,
        "Data type of weights and KV cache. Default: as stored.",
    )
    flags.DEFINE_integer(
        "context",
        None,
        "Tokens of prompt plus output that fit, 1 to the model's maximum. Default: the maximum.",
    )
    flags.DEFINE_integer(
        "slots",
        None,
        "Requests in flight at once, 1 to 256. Default: 8 in batch and serve, else 1; of each of "
        "--replicas.",
    )
    flags.DEFINE_enum(
        "determinism",
        "strict",
        DETERMINISM,
        "strict: tokens do not depend on other requests, nor (on a CPU) on --slots. fast: on a GPU "
        "or TPU, or a CPU without the kernels, they may. Elsewhere both are the same.",
    )
    flags.DEFINE_string(
        "devices",
        None,
        "Devices to split the model over, a number or all. Each holds its part of the weights and "
        "caches. Default: 1, with --replicas of each; of several processes all that they have.",
    )
    flags.DEFINE_integer(
        "replicas",
        1,
        "Copies of the model, 1 or more, which share --slots equally: for more answers at once on "
        "several devices. Each takes --devices of them; with all, they share all.",
    )
    flags.DEFINE_list(
        "eos_tokens", None, "Token ids that end an answer: 2,32000. Default: the checkpoint's."
    )
    flags.DEFINE_bool("verify", False, "First check all weights against the checkpoint's digests.")
    flags.DEFINE_bool(
        "convert",
        False,
        "Let --checkpoint be Hugging Face's or Meta's folder, or hf://ORG/NAME. It is converted "
        "once, into $LLAMA_JAX_CACHE (~/.cache/llama_jax).",
    )


def _define_process_flags() -> None:
    flags.DEFINE_bool(
        "distributed",
        None,
        "Run one model on the devices of several processes, each started with the same flags; the "
        "first has the text and the server. Default: true if SLURM, Open MPI, a TPU pod's launcher "
        "or --coordinator_address started several.",
    )
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0. Default: as the launcher says."
    )
    flags.DEFINE_integer(
        "num_processes", None, "How many processes there are. Default: as the launcher says."
    )
    flags.DEFINE_integer(
        "process_id",
        None,
        "The number of this process, from 0. Default: as the launcher says.",
    )
    flags.DEFINE_integer(
        "initialization_timeout_s", 300, "Seconds for which processes wait for each other."
    )
    flags.DEFINE_integer(
        "heartbeat_timeout_s",
        100,
        "Seconds without a sign of life after which a process counts as lost. One that ends is "
        "noticed at once, a host that is gone after 30.",
    )


def _define_estimate_flags() -> None:
    flags.DEFINE_bool(
        "estimate", False, "Print the memory that the model would take and exit; loads no weights."
    )
    flags.DEFINE_string(
        "config", None, "With --estimate: a model's shape in place of a checkpoint; see configs/."
    )
    flags.DEFINE_enum(
        "chip", None, list(CHIPS), "With --estimate: what it would run on. Default: this machine."
    )


def _define_prompt_flags() -> None:
    flags.DEFINE_string(
        "prompt",
        None,
        "The user's message, - for stdin; or give --prompt_file, --messages, --prompt_tokens or "
        "--request.",
    )
    flags.DEFINE_string("prompt_file", None, "File with the user's message (UTF-8), - for stdin.")
    flags.DEFINE_string("system", None, "System prompt, with --prompt or in chat. Default: none.")
    flags.DEFINE_string(
        "messages",
        None,
        'Dialog in JSON, - for stdin: [{"role": "user", "content": "Hi"}, ...].',
    )
    flags.DEFINE_list(
        "prompt_tokens", None, "Token ids, used as they are (no BOS is added): 1,15043,2787."
    )
    flags.DEFINE_string("request", None, "A whole model card request in JSON, - for stdin.")
    flags.DEFINE_bool("raw", False, "Use --prompt as it is, after BOS, without the chat template.")
    flags.DEFINE_bool(
        "parse_control",
        False,
        "With --raw, and in score: <s>, </s> and the checkpoint's added control tokens in the "
        "prompt are these tokens, not plain text.",
    )
    flags.DEFINE_bool(
        "allow_control_tags",
        False,
        "Accept tags such as [INST] in system and user turns, as plain text. Whoever writes these "
        "turns can then forge others.",
    )


def _define_sampling_flags() -> None:
    flags.DEFINE_integer(
        "max_tokens",
        None,
        "Maximum number of tokens to generate, 0 or more. Default: 256, or what the context has "
        "left beside the prompt if that is less.",
    )
    flags.DEFINE_float(
        "temperature", 0.6, "Sampling temperature, 0 to 5; 0 always takes the most likely token."
    )
    flags.DEFINE_float(
        "top_p",
        None,
        "Sample from the most likely tokens up to this total probability, 0 to 2. Default: off.",
    )
    flags.DEFINE_integer(
        "top_k", None, "Sample from this many of the most likely tokens, 1 to 50. Default: off."
    )
    flags.DEFINE_float(
        "min_p",
        0.0,
        "Drop tokens less likely than this share of the most likely one's probability, 0 to 1; 0 "
        "is off.",
    )
    flags.DEFINE_integer(
        "seed",
        None,
        "Random seed, 0 to 2^64 - 1. Default: drawn at random, and reported. In batch: decides the "
        "seeds of lines without one; default: 0.",
    )
    flags.DEFINE_float(
        "repetition_penalty",
        1.0,
        "Penalty on tokens of the prompt and the output, 0 to 2; 1 is off.",
    )
    flags.DEFINE_float(
        "frequency_penalty",
        0.0,
        "Penalty per occurrence of a token in the output, 0 to 2; 0 is off.",
    )
    flags.DEFINE_float(
        "presence_penalty", 0.0, "Penalty on tokens that occur in the output, 0 to 2; 0 is off."
    )


def _define_token_flags() -> None:
    """Define which tokens may come, and which text and tokens end the answer."""
    flags.DEFINE_list(
        "logit_bias",
        None,
        "Numbers to add to the logits of token ids, -100 to 100 each: 15043:5,2787:-100. Default: "
        "none.",
    )
    flags.DEFINE_list(
        "allowed_tokens",
        None,
        "The only token ids to sample from: 1939,3869. Without EOS among them an answer ends at "
        "--max_tokens. Default: all.",
    )
    flags.DEFINE_multi_string(
        "stop", [], "Stop before this text; repeat the flag for up to 16 texts. Default: none."
    )
    flags.DEFINE_bool("ignore_eos", False, "Continue past the end-of-sequence token.")


def _define_output_flags() -> None:
    flags.DEFINE_string(
        "output",
        "text",
        "Format on stdout, text or json. In batch, and with --input: the file of results.",
    )
    flags.DEFINE_bool("stream", True, "Print the text as it is generated (text output only).")
    flags.DEFINE_integer(
        "logprobs",
        None,
        "Return the top-N log-probabilities (JSON output only), 0 to 20. Default: none.",
    )
    flags.DEFINE_bool(
        "print_prompt_tokens", False, "Print the prompt's token ids and exit; loads no weights."
    )


def _define_score_flags() -> None:
    flags.DEFINE_string(
        "continuation", None, "Score only this text, which continues --prompt or --prompt_file."
    )
    flags.DEFINE_integer(
        "stride",
        None,
        "Tokens from one window to the next in a text longer than the context. Default: half the "
        "context.",
    )
    flags.DEFINE_bool(
        "token_logprobs", False, "Return the tokens and their log-probabilities (JSON only)."
    )
