"""Run Llama 2: a prompt in, text out.

  python run.py --prompt="What is the capital of France?" --temperature=0
  python run.py --checkpoint=DIR --system="Be brief." --prompt="Why is the sky blue?" --seed=7
  python run.py --messages=dialog.json --output=json
  python run.py chat --checkpoint=DIR

The text goes to stdout, everything else to stderr. Without --checkpoint and without
$LLAMA_JAX_CHECKPOINT the embedded demo model runs. Exit status: 0 done, 2 a mistake in the input.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import sys
from typing import Any

from absl import app, flags, logging

from llama_jax import InputError, Llama, Result
from llama_jax.checkpoint import DTYPES
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.files import parse_json
from llama_jax.llama import default_checkpoint
from llama_jax.request import GenerationRequest, make_request

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "checkpoint",
    None,
    "Folder that `python -m convert` wrote; default: $LLAMA_JAX_CHECKPOINT, else the demo model.",
)
flags.DEFINE_string("prompt", None, "What the user says.")
flags.DEFINE_string("system", None, "System prompt, with --prompt or in chat.")
flags.DEFINE_string(
    "messages", None, 'JSON file, or - for stdin: [{"role": "user", "content": "Hi"}, ...].'
)
flags.DEFINE_list("prompt_tokens", None, "Token ids, used as they are: 1,15043,2787.")
flags.DEFINE_bool("raw", False, "Use the prompt as it is, behind BOS, without the chat template.")
flags.DEFINE_integer("max_tokens", 256, "Tokens to generate at most.")
flags.DEFINE_float("temperature", 0.6, "0 (always the likeliest token) to 5.")
flags.DEFINE_float("top_p", None, "0 to 2: keep the likeliest tokens up to this probability.")
flags.DEFINE_integer("top_k", None, "1 to 50: keep this many of the likeliest tokens.")
flags.DEFINE_integer("seed", None, "0 to 2^64 - 1; default: one is drawn and shown.")
flags.DEFINE_float("repetition_penalty", 1.0, "0 to 2, over prompt and output; 1 is off.")
flags.DEFINE_float("frequency_penalty", 0.0, "0 to 2, for each occurrence in the output.")
flags.DEFINE_float("presence_penalty", 0.0, "0 to 2, once for what occurs in the output.")
flags.DEFINE_bool("stream", True, "Print the text as it is generated (with --output=text).")
flags.DEFINE_enum("dtype", None, DTYPES, "Of weights and cache; default: as stored.")
flags.DEFINE_integer("context", None, "Tokens of prompt plus output; default: the model's most.")
flags.DEFINE_bool("verify", False, "First compare all weights with the checkpoint's digests.")
flags.DEFINE_bool("ignore_eos", False, "Go on to max_tokens, past the end-of-sequence token.")
flags.DEFINE_enum("output", "text", ["text", "json"], "What goes to stdout.")
flags.DEFINE_bool("debug", False, "Show the traceback of an error.")

PARAMETER_FLAGS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "ignore_eos",
)

CHAT_HELP = (
    "/reset forgets, /seed N sets the seed, /system TEXT sets the system prompt, /quit ends, "
    "Ctrl-C stops an answer"
)


def note(text: str) -> None:
    """Say something to the person, not to the pipe."""
    print(text, file=sys.stderr, flush=True)


def load() -> Llama:
    """Load the checkpoint that the flags or the environment name."""
    path = FLAGS.checkpoint if FLAGS.checkpoint is not None else default_checkpoint()
    if path == DEMO_CHECKPOINT:
        note("no --checkpoint: running the embedded demo model, which knows only its small corpus")
    return Llama.load(
        path,
        dtype=FLAGS.dtype,
        context=FLAGS.context,
        verify=FLAGS.verify,
        progress=sys.stderr.isatty(),
    )


def read_request() -> GenerationRequest:
    """Return the request that the flags describe, checked."""
    request: dict[str, Any] = {name: FLAGS[name].value for name in PARAMETER_FLAGS}
    request |= {"prompt": FLAGS.prompt, "system": FLAGS.system, "raw": FLAGS.raw}
    if FLAGS.messages is not None:
        request["messages"] = read_messages(FLAGS.messages)
    if FLAGS.prompt_tokens is not None:
        request["prompt_tokens"] = [parse_token(text) for text in FLAGS.prompt_tokens]
    if FLAGS.output == "json" and FLAGS["stream"].present and FLAGS.stream:
        raise InputError("--stream is given with --output=json, which is printed whole; drop one")
    return make_request(**request)


def read_messages(source: str) -> list:
    """Parse the JSON list of a file, or of stdin for "-"."""
    name = f"--messages={source}"
    try:
        text = sys.stdin.read() if source == "-" else pathlib.Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}; name a JSON file or -") from None
    messages = parse_json(text, name)
    if not isinstance(messages, list):
        raise InputError(f"{name} holds {messages!r:.40}, expected a list of messages")
    return messages


def parse_token(text: str) -> int:
    """Return one id of --prompt_tokens."""
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"--prompt_tokens: {text!r} is no whole number, expected ids such as 1,15043"
        ) from None


def generate() -> None:
    """Answer one request."""
    request = read_request()  # before the weights: a mistake should not take a minute to show
    llm = load()
    stream = llm.start(request)
    write = FLAGS.output == "text"
    for piece in stream:
        if write and FLAGS.stream:
            print(piece, end="", flush=True)
    result = stream.result
    if not write:
        print(json.dumps(dataclasses.asdict(result), ensure_ascii=False, indent=2))
    elif FLAGS.stream:
        print()
    else:
        ids = ",".join(map(str, result.tokens))
        print(ids if result.response is None else result.response)
    note(summary(llm, result, drawn=FLAGS.seed is None))


def summary(llm: Llama, result: Result, *, drawn: bool) -> str:
    """Return the line on stderr: where the time went, and how to repeat the run."""
    t = result.timings
    parts = [f"load {t['load_s']:.2f} s", f"compile {t['compile_s']:.2f} s"]
    if t["prefill_tokens_per_s"] is not None:
        parts.append(
            f"prefill {result.usage['prompt_tokens']} tokens in {t['prefill_s']:.3f} s "
            f"({t['prefill_tokens_per_s']:,.0f} tok/s)"
        )
    if t["decode_tokens_per_s"] is not None:
        rate = t["decode_tokens_per_s"]
        parts.append(
            f"decode {t['decode_s']:.3f} s "
            f"({rate:,.0f} tok/s, {rate * llm.weight_bytes_per_token / 1e9:.2f} GB/s of weights)"
        )
    parts.append(f"{result.usage['completion_tokens']} tokens, {result.finish_reason}")
    seed = f"seed {result.seed}" + (f" (drawn; --seed={result.seed} repeats this)" if drawn else "")
    return " | ".join([*parts, llm.dtype, seed])


def chat() -> None:
    """Talk in turns until /quit or the end of the input."""
    for name in ("prompt", "messages", "prompt_tokens"):
        if FLAGS[name].value is not None:
            raise InputError(f"--{name} is given with chat, which asks for the turns; drop one")
    if FLAGS.raw or FLAGS.output == "json" or not FLAGS.stream:
        raise InputError("chat streams text in the chat format; drop --raw, --output, --nostream")
    parameters: dict[str, Any] = {name: FLAGS[name].value for name in PARAMETER_FLAGS}
    make_request(prompt="x", system=FLAGS.system, **parameters)  # before the weights, as above
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (line editing and history for input)
    llm = load()
    note(CHAT_HELP)
    system, turns = FLAGS.system, []
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            line = input("> " if in_terminal else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                turns = []
                note("forgotten")
            elif command == "/system":
                make_request(prompt="x", system=rest or None)
                system, turns = rest or None, []
                note("system prompt set, conversation forgotten")
            elif command == "/seed":
                parameters["seed"] = parse_seed(rest)
            elif command.startswith("/"):
                raise InputError(f"unknown command {command}; {CHAT_HELP}")
            elif line:
                turns = answer(llm, system, turns, line, parameters)
        except InputError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            note("\nstopped: the question and what was said of the answer are left out")


def parse_seed(text: str) -> int:
    """Return the seed that /seed names."""
    try:
        return make_request(prompt="x", seed=int(text)).seed
    except ValueError:  # InputError is one
        raise InputError(f"seed is {text!r}, expected a whole number from 0 to 2^64 - 1") from None


def answer(
    llm: Llama, system: str | None, turns: list, line: str, parameters: dict[str, Any]
) -> list:
    """Print the answer to one more turn; return the turns with both."""
    turns = [*turns, {"role": "user", "content": line}]
    head = [] if system is None else [{"role": "system", "content": system}]
    try:
        stream = llm.stream(messages=head + turns, **parameters)
    except InputError as error:
        raise InputError(f"{error} (/reset forgets the turns so far)") from None
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    note(summary(llm, stream.result, drawn=parameters["seed"] is None))
    turns.append({"role": "assistant", "content": stream.result.response})
    try:
        make_request(messages=[*turns, {"role": "user", "content": "x"}])
    except InputError:
        note("the answer spells a control tag, so it cannot be part of the conversation: left out")
        return turns[:-2]
    return turns


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; a mistake in it is one line and exit 2."""
    if {"--help", "-h"} & set(argv[1:]):  # absl's own exits 1
        app.usage(shorthelp=True, writeto_stdout=True)
        sys.exit(0)
    try:
        return FLAGS(argv)
    except flags.Error as error:
        note(f"error: {str(error).removeprefix('ERROR:: ')}; see --help")
        sys.exit(2)


def main(argv: list[str]) -> None:
    """Dispatch, and turn a user's mistake into one line and exit 2."""
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.DEBUG if FLAGS.debug else logging.WARNING)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):  # whatever bytes come: no traceback
            stream.reconfigure(errors=errors)
    try:
        if argv[1:] not in ([], ["chat"]):
            raise InputError(
                f"got the argument {argv[1]!r}, expected chat or none; a prompt goes to --prompt"
            )
        chat() if argv[1:] else generate()
    except InputError as error:
        if FLAGS.debug:
            raise
        note(f"error: {' '.join(str(error).split())}")
        sys.exit(2)
    except KeyboardInterrupt:
        note("")
        # XLA's threads may be compiling: the interpreter's own way out would free what they use.
        os._exit(130)
    except BrokenPipeError:  # the reader of our stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
