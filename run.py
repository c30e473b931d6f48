"""Run Llama 2: a prompt in, text out.

  python run.py --prompt="What is the capital of France?" --temperature=0
  python run.py --checkpoint=DIR --system="Be brief." --prompt="Why is the sky blue?" --seed=7
  python run.py --messages=dialog.json --output=json
  python run.py --request=request.json
  python run.py chat --checkpoint=DIR
  python run.py batch --input=requests.jsonl --output=results.jsonl
  python run.py serve --port=8787

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
from tqdm import tqdm

from llama_jax import InputError, Llama, Result, use_compile_cache
from llama_jax.batch import Batch
from llama_jax.card import contract
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.engine.request import GenerationRequest, make_request
from llama_jax.llama import default_checkpoint
from llama_jax.strict_json import parse_json
from llama_jax.weights.checkpoint import DTYPES, load_tokenizer

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
flags.DEFINE_string(
    "request", None, "JSON file, or - for stdin: a whole request, as the model card has it."
)
flags.DEFINE_bool("raw", False, "Use the prompt as it is, behind BOS, without the chat template.")
flags.DEFINE_integer("max_tokens", 256, "Tokens to generate at most.")
flags.DEFINE_float("temperature", 0.6, "0 (always the likeliest token) to 5.")
flags.DEFINE_float("top_p", None, "0 to 2: keep the likeliest tokens up to this probability.")
flags.DEFINE_integer("top_k", None, "1 to 50: keep this many of the likeliest tokens.")
flags.DEFINE_integer("seed", None, "0 to 2^64 - 1; default: one is drawn and shown.")
flags.DEFINE_float("repetition_penalty", 1.0, "0 to 2, over prompt and output; 1 is off.")
flags.DEFINE_float("frequency_penalty", 0.0, "0 to 2, for each occurrence in the output.")
flags.DEFINE_float("presence_penalty", 0.0, "0 to 2, once for what occurs in the output.")
flags.DEFINE_multi_string("stop", [], "End before this text; may be given several times.")
flags.DEFINE_integer("logprobs", None, "0 to 20: tell so many tokens' logprobs, in the JSON.")
flags.DEFINE_bool("stream", True, "Print the text as it is generated (with --output=text).")
flags.DEFINE_enum("dtype", None, DTYPES, "Of weights and cache; default: as stored.")
flags.DEFINE_integer("context", None, "Tokens of prompt plus output; default: the model's most.")
flags.DEFINE_bool("verify", False, "First compare all weights with the checkpoint's digests.")
flags.DEFINE_integer(
    "slots", None, "Answers to draw at once; default: 8 in batch and serve, else 1."
)
flags.DEFINE_string("input", None, "batch: a file of requests, one of the card's form a line.")
flags.DEFINE_string("host", "127.0.0.1", "serve: the address to listen at.")
flags.DEFINE_integer("port", 8787, "serve: the port to listen at; 0: any that is free.")
flags.DEFINE_string(
    "api_token", None, "serve: what clients must send; default: $LLAMA_JAX_API_TOKEN, else none."
)
flags.DEFINE_bool("insecure", False, "serve: let other machines and names in without a token.")
flags.DEFINE_list(
    "allowed_origins", [], "serve: origins, as https://example.com, whose pages may call it."
)
flags.DEFINE_integer("max_queue", 64, "serve: requests that may wait; more are told to come back.")
flags.DEFINE_float("timeout_s", 600, "serve: seconds that a request may take.")
flags.DEFINE_bool("ignore_eos", False, "Go on to max_tokens, past the end-of-sequence token.")
flags.DEFINE_bool(
    "print_prompt_tokens", False, "Print the ids that the model would be fed, and do no more."
)
flags.DEFINE_string("output", "text", "What goes to stdout, text or json; batch: a file to write.")
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
    "stop",
    "ignore_eos",
    "logprobs",
)
PROMPT_FLAGS = ("prompt", "system", "messages", "prompt_tokens", "raw", "request")
VERB_FLAGS = {
    "batch": ("input",),
    "serve": ("host", "port", "api_token", "insecure", "max_queue", "timeout_s", "allowed_origins"),
}

CHAT_HELP = (
    "/reset forgets, /seed N sets the seed, /system TEXT sets the system prompt, /quit ends, "
    "Ctrl-C stops an answer"
)


def note(text: str) -> None:
    """Say something to the person, not to the pipe."""
    print(text, file=sys.stderr, flush=True)


def checkpoint_path() -> pathlib.Path:
    """Return the checkpoint that the flags or the environment name."""
    if FLAGS.checkpoint is not None:
        return pathlib.Path(FLAGS.checkpoint)
    if (path := default_checkpoint()) == DEMO_CHECKPOINT:
        note("no --checkpoint: running the embedded demo model, which knows only its small corpus")
    return path


def load(slots: int = 1, **how: Any) -> Llama:
    """Load the checkpoint, with as many slots unless the flags say otherwise."""
    use_compile_cache()
    return Llama.load(
        checkpoint_path(),
        dtype=FLAGS.dtype,
        context=FLAGS.context,
        slots=slots if FLAGS.slots is None else FLAGS.slots,
        verify=FLAGS.verify,
        progress=sys.stderr.isatty(),
        **how,
    )


def read_request() -> tuple[GenerationRequest, str]:
    """Return the request that the flags describe, checked, and how one asks for a seed there.

    The latter has "{}" for the seed; it is empty if one was given.
    """
    if FLAGS.output not in ("text", "json"):
        raise InputError(f"--output is {FLAGS.output!r:.40}, expected text or json")
    if FLAGS.logprobs is not None and FLAGS.output != "json":
        raise InputError("--logprobs is given without --output=json, where they are told; add it")
    if FLAGS.request is not None:
        return read_card_request(FLAGS.request)
    request: dict[str, Any] = {name: FLAGS[name].value for name in PARAMETER_FLAGS}
    request |= {"prompt": FLAGS.prompt, "system": FLAGS.system, "raw": FLAGS.raw}
    if FLAGS.messages is not None:
        request["messages"] = read_messages(FLAGS.messages)
    if FLAGS.prompt_tokens is not None:
        request["prompt_tokens"] = [parse_token(text) for text in FLAGS.prompt_tokens]
    if FLAGS.output == "json" and FLAGS["stream"].present and FLAGS.stream:
        raise InputError("--stream is given with --output=json, which is printed whole; drop one")
    return make_request(**request), "--seed={}" if FLAGS.seed is None else ""


def read_card_request(source: str) -> tuple[GenerationRequest, str]:
    """Return as `read_request` the request of a JSON file in the card's form.

    Says which of its fields do nothing.
    """
    others = [name for name in (*PROMPT_FLAGS, *PARAMETER_FLAGS) if name != "request"]
    refuse_flags("--request", "which holds all of it", *others)
    card = contract.check(read_json(source, f"--request={source}"))
    for name in card.ignored:
        note(f"warning: {name} is no field of the model card here, and is left out of account")
    if card.stream and not (FLAGS.stream and FLAGS.output == "text"):
        note("warning: stream is true in the request, but the answer is printed whole")
    return card.request(), "" if "seed" in card.fields else '"seed": {}'


def read_json(source: str, name: str) -> Any:
    """Parse the JSON of a file, or of stdin for "-"."""
    try:
        # Bytes, so that UTF-8 is UTF-8 whatever the terminal speaks.
        text = sys.stdin.buffer.read() if source == "-" else pathlib.Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}; name a JSON file or -") from None
    return parse_json(text, name)


def read_messages(source: str) -> list:
    """Return the messages of a JSON file."""
    name = f"--messages={source}"
    messages = read_json(source, name)
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
    if FLAGS.print_prompt_tokens:
        others = ("verify", "context", "dtype", "slots", "output", "stream")
        refuse_flags("--print_prompt_tokens", "which runs no model", *others)
    # Before the weights: a mistake should not take a minute to show.
    request, repeat = read_request()
    if FLAGS.print_prompt_tokens:
        print_prompt_tokens(request)
        return
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
    note(summary(llm, result, repeat))


def print_prompt_tokens(request: GenerationRequest) -> None:
    """Print what the model would be fed: the ids to stdout, their pieces to stderr."""
    tokenizer, vocab_size = load_tokenizer(checkpoint_path())
    tokens = request.encode(tokenizer, vocab_size)
    print(",".join(map(str, tokens)))
    if tokenizer is not None:
        note(" ".join(tokenizer.piece(token) for token in tokens))
    note(f"{len(tokens):,} tokens")


def batch() -> None:
    """Answer a file of requests."""
    if FLAGS.input is None or FLAGS.output in ("text", "json"):
        raise InputError("batch needs --input and --output, two files of JSON lines; name both")
    others = (*PROMPT_FLAGS, *PARAMETER_FLAGS, "stream", "print_prompt_tokens")
    refuse_flags("batch", "whose requests are in --input", *others)
    work = Batch(FLAGS.input, FLAGS.output)
    if work.done:
        note(f"{FLAGS.output} has {work.done:,} of {work.total:,} lines already; going on")
    llm = load(slots=8)
    with tqdm(total=work.total, initial=work.done, unit="request", file=sys.stderr) as bar:
        for _ in work.run(llm):
            bar.update()
    if work.failed:
        raise InputError(
            f"{work.failed:,} of {work.total:,} requests have an `error` in {FLAGS.output}; "
            "mend them and run them as another batch"
        )


def serve() -> None:
    """Answer requests over HTTP until told to stop."""
    others = (*PROMPT_FLAGS, *PARAMETER_FLAGS, "stream", "output", "print_prompt_tokens")
    refuse_flags("serve", "whose requests come over HTTP", *others)
    try:
        from llama_jax.server import serve as server
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install 'llama_jax[serve]'") from None
    token = FLAGS.api_token
    server.serve(
        lambda: load(slots=8, max_queue=FLAGS.max_queue),
        host=FLAGS.host,
        port=FLAGS.port,
        # An empty token is a mistake, which Settings tells, and no wish to have none.
        api_token=token if token is not None else os.environ.get("LLAMA_JAX_API_TOKEN"),
        allowed_origins=tuple(FLAGS.allowed_origins),
        insecure=FLAGS.insecure,
        timeout_s=FLAGS.timeout_s,
    )


def refuse_flags(verb: str, reason: str, *names: str) -> None:
    """Refuse flags that would not be heeded."""
    given = [name for name in names if FLAGS[name].present]
    if given:
        raise InputError(f"--{given[0]} is given with {verb}, {reason}; drop it")


def summary(llm: Llama, result: Result, repeat: str) -> str:
    """Return the line on stderr: where the time went, and how to repeat the run.

    Args:
        llm: what ran.
        result: what came of it.
        repeat: how to ask for the seed, which was drawn, with "{}" for it; empty: it was given.
    """
    t = result.timings
    parts = [f"load {t.load_s:.2f} s", f"compile {t.compile_s:.2f} s"]
    if t.prefill_tokens_per_s is not None:
        read = result.usage.prompt_tokens - result.usage.cached_tokens
        parts.append(
            f"prefill {read} tokens in {t.prefill_s:.3f} s ({t.prefill_tokens_per_s:,.0f} tok/s)"
        )
    if t.decode_tokens_per_s is not None:
        rate = t.decode_tokens_per_s
        parts.append(
            f"decode {t.decode_s:.3f} s "
            f"({rate:,.0f} tok/s, {rate * llm.weight_bytes_per_token / 1e9:.2f} GB/s of weights)"
        )
    parts.append(f"{result.usage.completion_tokens} tokens, {result.finish_reason}")
    seed = f"seed {result.seed}"
    if repeat:
        seed += f" (drawn; {repeat.format(result.seed)} repeats this)"
    return " | ".join([*parts, llm.dtype, seed])


def chat() -> None:
    """Talk in turns until /quit or the end of the input."""
    refuse_flags(
        "chat",
        "which asks for the turns",
        *("prompt", "messages", "prompt_tokens", "request", "print_prompt_tokens", "logprobs"),
    )
    if FLAGS.raw or FLAGS.output != "text" or not FLAGS.stream:
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
        return make_request(prompt="x", seed=int(text)).parameters.seed
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
    note(summary(llm, stream.result, "/seed {}" if parameters["seed"] is None else ""))
    turns.append({"role": "assistant", "content": stream.result.response})
    try:
        make_request(messages=[*turns, {"role": "user", "content": "x"}])
    except InputError:
        note("the answer spells a control tag, so it cannot be part of the conversation: left out")
        return turns[:-2]
    return turns


VERBS = {"chat": chat, "batch": batch, "serve": serve}


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
        if argv[1:] and argv[1:] not in [[verb] for verb in VERBS]:
            raise InputError(
                f"got the argument {argv[1]!r}, expected {', '.join(VERBS)} or none; a prompt goes "
                "to --prompt"
            )
        for verb, names in VERB_FLAGS.items():
            if verb not in argv[1:]:
                refuse_flags(argv[1] if argv[1:] else "a prompt", f"but is of {verb}", *names)
        VERBS[argv[1]]() if argv[1:] else generate()
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
