"""The text of --help and --version."""

import importlib.metadata
import pathlib
import platform
import textwrap

from llama_jax.cli.flags import FLAGS
from llama_jax.cli.verbs import (
    BATCH,
    COMPARE,
    ESTIMATE,
    HOSTS,
    KEPT_RECEIPTS,
    MODEL,
    OUTPUT,
    PROMPT,
    RAY,
    RECEIPT,
    REPLAY,
    RESUME,
    SAMPLING,
    SCORE,
    SERVE,
    SPECULATION,
    SWEEP,
    VERBS,
    VERIFY,
)
from llama_jax.version import __version__

_WIDTH = 80
_TEXT_COLUMN = 28

_GROUPS = {
    "Prompt": PROMPT,
    "Sampling": SAMPLING,
    "Output": OUTPUT,
    "Serve": SERVE,
    "Sweep": SWEEP,
    "Compare": COMPARE,
    "Files of lines": BATCH,
    "Ray": RAY,
    "Score": SCORE,
    "Model": tuple(name for name in MODEL if name not in HOSTS),
    "Speculation": SPECULATION,
    "Memory": ESTIMATE,
    "Receipt": tuple(
        dict.fromkeys(("receipt", *KEPT_RECEIPTS, *RECEIPT, *VERIFY, *REPLAY, *RESUME))
    ),
    "Several hosts": HOSTS,
}
"""What one verb alone has comes before what all have."""

_VALUES = {
    "checkpoint": "DIR",
    "dtype": "TYPE",
    "determinism": "WORD",
    "config": "FILE",
    "chip": "NAME",
    "eos_tokens": "ID,...",
    "prompt_file": "FILE",
    "messages": "FILE",
    "prompt_tokens": "ID,...",
    "logit_bias": "ID:X,...",
    "allowed_tokens": "ID,...",
    "request": "FILE",
    "receipt": "FILE",
    "sign_key": "FILE",
    "key": "FILE",
    "resume": "FILE",
    "seeds": "A:B",
    "ray_address": "ADDRESS",
    "engine": "WORD",
    "plot": "FILE",
    "input": "FILE",
    "output": "FORMAT",
    "host": "ADDRESS",
    "api_token": "TOKEN",
    "allowed_origins": "URL,...",
    "served_model_name": "NAME",
    "speculate": "WORD|DIR",
}
"""Names of the flags' values; the others are named by their type."""

_VALUES_BY_TYPE = {"int": "N", "float": "X"}

_EXAMPLES = {
    "": (
        '--prompt="What is the capital of France?" --temperature=0',
        '--prompt="Tell me a story." --system="Be brief." --seed=7',
        "--messages=dialog.json --output=json --logprobs=5",
        "--request=request.json",
        '--prompt="Tell me a story." --receipt=receipt.json',
        "--resume=receipt.json --at=10 --seed=8",
        "--estimate --config=configs/llama-2-7b.json --chip=h100",
    ),
    "chat": ('chat --system="You are a pirate."',),
    "batch": (
        "batch --input=requests.jsonl --output=results.jsonl",
        "batch --input=in.jsonl --output=out.jsonl --engine=ray",
    ),
    "score": (
        "score --prompt_file=book.txt",
        'score --prompt="The capital is" --continuation=" Paris."',
        "score --input=texts.jsonl --output=scores.jsonl",
    ),
    "sweep": ('sweep --seeds=0:64 --prompt="Tell me a story." > stories.jsonl',),
    "replay": ("replay receipt.json --checkpoint=DIR", "replay receipts.jsonl --prefill"),
    "verify_receipt": ("verify_receipt receipts.jsonl --key=PUBLIC.pem",),
    "compare": (
        "compare first.jsonl second.jsonl",
        "compare DIR DIR,dtype=bfloat16 --input=requests.jsonl",
    ),
    "selftest": ("selftest", "selftest --devices=all"),
    "serve": (
        "serve --port=8787 --slots=16 --receipts=1000",
        "serve --speculate=ngram --speculate_tokens=4",
        "serve --estimate --slots=64",
    ),
}

_END = """\
Generated text goes to stdout, everything else to stderr.
Exit status: 0 done, 1 a replay or selftest diverged or a receipt is not valid,
2 a mistake in the input or a full disk, 130 interrupted."""


def version_text() -> str:
    """Return the versions that decide what is computed; no device is initialized."""
    jax = importlib.metadata.version("jax")
    return f"llama_jax {__version__} (jax {jax}, Python {platform.python_version()})"


def help_text(argv: list[str]) -> str:
    """Return the help of a command line: of the verb in it, else of all verbs."""
    program = "python run.py" if pathlib.PurePath(argv[0]).name == "run.py" else "llama-jax"
    verbs = [VERBS[name] for name in VERBS if name in argv[1:]] or list(VERBS.values())
    usage = {" ".join(filter(None, (program, v.name, v.arguments))): v.summary for v in verbs}
    column = max(map(len, usage)) + 4
    examples = [f"  {program} {line}" for verb in verbs for line in _EXAMPLES[verb.name]]
    taken = {name for verb in verbs for name in verb.takes}
    sections = [
        ["Llama 2 chat in JAX."],
        ["Usage:", *(_entry(use, summary, column) for use, summary in usage.items())],
        ["Examples:", *examples],
    ]
    for title, names in _GROUPS.items():
        shown = [_flag(name) for name in names if name in taken]
        if shown:
            sections.append([f"{title}:", *shown])
    general = [
        _entry("-h, --help", "Show this text; after a verb, only what applies to that verb."),
        _entry("--helpfull", "Show absl's flags too."),
        _entry("--version", "Show the versions of llama_jax, JAX and Python."),
        _flag("debug"),
    ]
    sections += [["General:", *general], [_END]]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _flag(name: str) -> str:
    """Return a flag with its value's name, its text and its default."""
    flag = FLAGS[name]
    text = flag.help.split(";\n")[0]  # absl says there that a flag may be repeated
    if flag.default not in (None, []):
        default = str(flag.default_as_str).strip("'")
        text += f" Default: {default}."
    if flag.boolean:
        return _entry(f"--[no]{name}" if flag.default else f"--{name}", text)
    value = _VALUES.get(name) or _VALUES_BY_TYPE.get(flag.flag_type(), "TEXT")
    return _entry(f"--{name}={value}", text)


def _entry(term: str, text: str, column: int = _TEXT_COLUMN) -> str:
    """Return a term and, in a column of its own, what it is."""
    lines = textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"  {term}".ljust(column),
        subsequent_indent=" " * column,
        break_on_hyphens=False,
    )
    return "\n".join(lines)
