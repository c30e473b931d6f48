"""What every engine speaks: a JSON object a line on stdin, one answer a line on stdout.

    {"op": "decode", "context": 128, "batch": 1, "new_tokens": 32}  ->  {"result": 0.71}

An answer holds `result` or `error`. Standard library only: what is imported here counts in every
engine's memory.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterable
from typing import Any

SPECIAL = ("<unk>", "<s>", "</s>")
TIMED = ("prefill", "decode")
"""Operations that return seconds, and run once untimed before a case is first timed."""


def serve(engine: Any) -> None:
    """Answer requests with the engine's methods until stdin ends."""
    # Whatever a library prints goes to the log; only answers go to the pipe.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warmed = set()
    for line in sys.stdin:
        request = json.loads(line)
        call = getattr(engine, request.pop("op"))
        case = (call.__name__, *request.values())
        try:
            if call.__name__ in TIMED and case not in warmed:
                call(**request)
                warmed.add(case)
            answer = {"result": call(**request)}
        except Exception as error:  # an engine that fails must not end the others' measurement
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


def prompt(length: int, vocab_size: int) -> list[int]:
    """Return `length` token ids, the same for every engine; no special ones (below 3)."""
    return [(i * 7919) % (vocab_size - 3) + 3 for i in range(length)]


def text_of(tokens: Iterable[int]) -> str:
    """Return ids as text of one character each, so that any text's length in tokens is known.

    Random weights have this vocabulary: characters of CJK Extension B, none of which combine.
    """
    return "".join(chr(0x20000 + token) for token in tokens)


def pieces(vocab_size: int) -> list[str]:
    """Return the text of each id of that vocabulary."""
    return [*SPECIAL, *text_of(range(len(SPECIAL), vocab_size))]


def peak_rss() -> int:
    """Return the most bytes of memory that this process, or what started it, has held so far."""
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
