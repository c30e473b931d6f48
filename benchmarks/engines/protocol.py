"""What every engine speaks: a JSON object a line on stdin, one answer a line on stdout.

    {"op": "decode", "context": 128, "batch": 1, "new_tokens": 32}  ->  {"result": 0.71}

An answer holds `result`, `unsupported` (the engine cannot do this, and why) or `error`. Standard
library only: an engine may run under another interpreter, with other packages.
"""

import json
import os
import pathlib
import re
import sys
import traceback
from typing import Any

TIMED = ("prefill", "decode")
"""Operations that return seconds, and run once untimed before a case is first timed."""


class UnsupportedError(Exception):
    """The engine has no way to do what was asked."""


def serve(engine: Any) -> None:
    """Answer requests with the engine's methods until stdin ends.

    Args:
        engine: has `load(**settings)`, `prefill(tokens)`, `decode(context, batch, new_tokens)` and
            `memory()`; see `benchmarks/README.md` for what they time and return.
    """
    # Whatever a library prints goes to the log; only answers go to the pipe.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warmed = set()
    for line in sys.stdin:
        request = json.loads(line)
        call = getattr(engine, request.pop("op"))
        try:
            if (
                call.__name__ in TIMED
                and (case := (call.__name__, *request.values())) not in warmed
            ):
                call(**request)
                warmed.add(case)
            answer = {"result": call(**request)}
        except UnsupportedError as error:
            answer = {"unsupported": str(error)}
        except Exception as error:  # an engine that fails must not end the others' measurement
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


def prompt(length: int, vocab_size: int) -> list[int]:
    """Return `length` token ids, the same for every engine; no special ones (below 3)."""
    return [(i * 7919) % (vocab_size - 3) + 3 for i in range(length)]


def peak_rss() -> int:
    """Return the most bytes of memory that this process has held so far."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
