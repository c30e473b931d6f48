"""Batches on Ray in tests: requests, the rows of the local engine, and lines that do harm."""

import json
import os
import pathlib
import re
import signal

from llama_jax.batch import Batch
from llama_jax.batch.line import CARD, Format, request_format
from llama_jax.demo import DEMO_CHECKPOINT
from tests.helpers.serving import CHAT, MODEL

LOAD = {"path": str(DEMO_CHECKPOINT), "slots": 8}


def requests(count: int) -> list[bytes]:
    """Return lines: of both formats, with and without a seed, and some that are wrong."""
    lines = []
    for i in range(count):
        prompt = f"Tell me a story about {'the sea ' * (i % 5)}{i % 50}."
        line = {"prompt": prompt, "max_tokens": 4 + i % 9, "custom_id": f"row-{i % (count - 3)}"}
        if i % 4 == 0:
            line["seed"] = i + 1
        if i % 10 == 7:
            body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
            body["max_tokens"] = 5
            line = {"custom_id": f"row-{i}", "method": "POST", "url": CHAT, "body": body}
        lines.append(json.dumps(line).encode())
    lines[11] = b'{"prompt": "Hi", "max_tokens": 5000}'  # too long
    lines[12] = b"\xff\xfe{"
    lines[13] = b""
    lines[14] = b'{"prompt": "Hi", "temperature": 9}'
    return lines


def write(folder: pathlib.Path, lines: list[bytes]) -> tuple[pathlib.Path, pathlib.Path]:
    """Write the lines; return their file and one for the output."""
    (folder / "in.jsonl").write_bytes(b"\n".join(lines))
    return folder / "in.jsonl", folder / "out.jsonl"


def local(source: pathlib.Path, llm) -> list[bytes]:
    """Return the rows of the local engine."""
    output = source.with_name("local.jsonl")
    output.unlink(missing_ok=True)
    with Batch(source, output) as batch:
        for _ in batch.run(llm):
            pass
    return comparable(output)


def comparable(output: pathlib.Path) -> list[bytes]:
    """Return the rows of a file without what differs between two runs of the same engine.

    These are times, the tokens that a cache happened to have, and the random names in OpenAI's
    format.
    """
    text = output.read_bytes()
    for pattern in (
        rb'"timings": \{[^}]*\}',
        rb'"cached_tokens": \d+',
        rb'"created": \d+',
        rb'"(id|request_id)": "[^"]*"',
    ):
        text = re.sub(pattern, b"", text)
    return text.splitlines()


# Formats that do harm. Workers find them by their names.


def _is(fields, word: str) -> bool:
    return isinstance(fields, dict) and word in str(fields.get("prompt"))


def kills_once(fields) -> Format:
    """Kill the process at the line that names a file which is not there yet."""
    if _is(fields, "kill once"):
        marker = pathlib.Path(fields["prompt"].split()[-1])
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return request_format(fields)


def harms(fields) -> Format:
    """Raise, or kill the process, each time."""
    if _is(fields, "raise always"):
        return CARD._replace(make=_raise)
    if _is(fields, "kill always"):
        os.kill(os.getpid(), signal.SIGKILL)
    return request_format(fields)


def _raise(fields, llm):
    raise RuntimeError("a bug")
