"""How many requests a second a server answers, from measured rates of prefill and decode.

  python -m benchmarks.capacity --prefill_rates=16:280,32:400,64:490,128:540 \\
    --decode_rates=1:48,2:85,4:150,8:200 --mix=64:64:1,500:200:0.5

The engine's turns are computed one by one (benchmarks/turns.py); nothing is run. The rates are of
one model on one device or group of devices: `python -m benchmarks` measures them, `python -m
benchmarks.aot` computes a bound of them. docs/scaling.md has the formula. `python -m
benchmarks.capacity_check` measures the rates here and compares the prediction with the engine.
"""

import dataclasses
import itertools
import math
import re
import statistics
import sys

from absl import flags

from benchmarks import command
from benchmarks.report import number, table
from benchmarks.turns import Bound, Costs, Kind, Turns, draw, formula, percentile
from llama_jax.errors import InputError

REQUESTS = 2000
"""Those that are computed, for each figure."""
BUSY = 0.8
"""Share of the most requests a second at which waits are given, by default."""

FLAGS = flags.FlagValues()
flags.DEFINE_list(
    "prefill_rates",
    None,
    "Tokens/s of reading a prompt's chunk, by its size: 64:5000,256:20000. Give all sizes that the "
    "plan has: 16, 32, 64 and 128 on a CPU with the kernels, 64 and 256 on a GPU or TPU. The "
    "end of a prompt is padded to one of them.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "decode_rates",
    None,
    "Tokens/s of all slots together, by the number of slots that a step computes: 1:48,8:200. "
    "A CPU with the kernels has programs for 1, 2, 4, 8 ... slots, all else for all slots only. "
    "Measured at about the mean context of the mix.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "mix",
    None,
    "Requests by PROMPT:OUTPUT:SHARE, as in 64:200:3,1500:50:1: tokens to read that are not in the "
    "prefix cache, tokens to generate, and how many of all.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "slots", None, "Of the server. Default: the most of --decode_rates.", flag_values=FLAGS
)
flags.DEFINE_float(
    "rate",
    None,
    "Requests that come in a second, at random times, for the waits. Default: 80% of the most.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "request_ms",
    0.0,
    "What each request takes besides: its admission and first token.",
    lower_bound=0.0,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "decode_steps",
    8,
    "Tokens of each slot in a turn: 8 on a CPU, 16 on a GPU or TPU.",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "in_flight",
    1,
    "Calls sent before the first is read: 1 on a CPU, 2 on a GPU or TPU.",
    lower_bound=1,
    flag_values=FLAGS,
)


@dataclasses.dataclass(frozen=True)
class Load:
    """What becomes of requests that come at some rate."""

    rate: float
    """Requests a second."""
    first_s: tuple[float, float]
    """Seconds to the first token, p50 and p99."""
    answer_s: tuple[float, float]
    """Seconds to the last token, p50 and p99."""
    slots_used: float
    """On average: requests a second times the seconds that one holds a slot (Little's law)."""


def most(costs: Costs, slots: int, mix: list[Kind], requests: int = REQUESTS) -> float:
    """Return the requests a second when there are always some that wait."""
    jobs = draw(mix, requests)
    seconds = Turns(costs, slots, jobs).now
    return len(jobs) / seconds if seconds else math.inf


def at_rate(costs: Costs, slots: int, mix: list[Kind], rate: float) -> Load:
    """Return the waits of requests that come at random times, so many a second."""
    jobs = draw(mix, REQUESTS, rate)
    seconds = Turns(costs, slots, jobs).now
    first = [job.first - job.submitted for job in jobs]
    answer = [job.ended - job.submitted for job in jobs]
    held = statistics.fmean(job.ended - job.began for job in jobs)
    return Load(
        rate,
        (percentile(first, 50), percentile(first, 99)),
        (percentile(answer, 50), percentile(answer, 99)),
        len(jobs) / seconds * held,
    )


def least_slots(costs: Costs, slots: int, mix: list[Kind], rate: float) -> int | None:
    """Return the fewest slots, of at most so many, that answer this rate; None: not even all."""
    low, high = 1, slots + 1
    while low < high:
        middle = (low + high) // 2
        if middle > slots or most(costs, middle, mix) >= rate:
            high = middle
        else:
            low = middle + 1
    return low if low <= slots else None


def read_costs() -> Costs:
    """Return what the flags say of the parts of a turn."""
    chunks = _read_rates("prefill_rates", "SIZE:TOKENS_PER_S such as 128:540")
    sizes = sorted(chunks)
    for size, larger in itertools.pairwise(sizes):
        if larger % size:
            raise InputError(
                f"--prefill_rates has the sizes {size} and {larger}, expected each a multiple of "
                "the one before; name the plan's"
            )
    steps = _read_rates("decode_rates", "SLOTS:TOKENS_PER_S such as 8:200")
    return Costs(
        {size: size / rate for size, rate in chunks.items()},
        {slots: slots / rate for slots, rate in steps.items()},
        FLAGS.request_ms / 1e3,
        FLAGS.decode_steps,
        FLAGS.in_flight,
    )


def read_mix(texts: list[str] | None) -> list[Kind]:
    """Return the kinds of requests that --mix names."""
    if not texts:
        raise InputError("--mix is not given, expected PROMPT:OUTPUT:SHARE,...; add it")
    kinds = []
    for text in texts:
        found = re.fullmatch(r"(\d{1,7}):([1-9]\d{0,6}):(\d+\.?\d*|\.\d+)", text)
        if found is None or float(found[3]) <= 0:
            raise InputError(
                f"--mix has {text!r}, expected PROMPT:OUTPUT:SHARE with a prompt of 0 tokens or "
                "more, an output of 1 or more and a share above 0, such as 64:200:3"
            )
        kinds.append(Kind(int(found[1]), int(found[2]), float(found[3])))
    return kinds


def _read_rates(flag: str, form: str) -> dict[int, float]:
    """Return tokens a second by a whole number."""
    rates: dict[int, float] = {}
    texts = FLAGS[flag].value or []
    if not texts:
        raise InputError(f"--{flag} is not given, expected {form}; add it")
    for text in texts:
        found = re.fullmatch(r"([1-9]\d{0,5}):(\d+\.?\d*|\.\d+)", text)
        if found is None or float(found[2]) <= 0:
            raise InputError(f"--{flag} has {text!r}, expected {form}")
        if int(found[1]) in rates:
            raise InputError(f"--{flag} has {found[1]} twice, expected it once; drop one")
        rates[int(found[1])] = float(found[2])
    return rates


def make_report(saturated: float, bound: Bound, reading: float, tokens: float, load: Load) -> str:
    """Return the figures as text.

    Args:
        saturated: the most requests a second.
        bound: the same by the formula.
        reading: the share of the time in which prompts are read.
        tokens: generated by a mean request.
        load: at a lower rate.
    """
    binds = {
        "prompts": "prompts: a turn reads no more of them, so more slots do not help",
        "slots": "slots: all are in use",
    }[bound.by]
    rows = [
        {"": "first token", "p50 s": load.first_s[0], "p99 s": load.first_s[1]},
        {"": "answer", "p50 s": load.answer_s[0], "p99 s": load.answer_s[1]},
    ]
    return (
        f"at most {number(saturated)} requests/s ({number(bound.requests_per_s)} by the formula), "
        f"{number(saturated * tokens)} tokens/s\n"
        f"bound by {binds}\n"
        f"time: {reading:.0%} for prompts, {1 - reading:.0%} for decode steps\n\n"
        f"at {number(load.rate)} requests/s, at random times:\n{table(rows)}\n"
        f"{number(load.slots_used)} slots in use on average"
    )


def run() -> int:
    """Compute what the flags say; return the exit status."""
    costs, mix = read_costs(), read_mix(FLAGS.mix)
    largest = max(costs.step_s)
    slots = largest if FLAGS.slots is None else FLAGS.slots
    if not 1 <= slots <= largest:
        raise InputError(
            f"--slots is {slots}, expected 1 to {largest}, the most of --decode_rates; add "
            "the rate of more slots there"
        )
    turns = Turns(costs, slots, draw(mix, REQUESTS))
    saturated = most(costs, slots, mix)
    rate = BUSY * saturated if FLAGS.rate is None else FLAGS.rate
    if not 0 < rate < saturated:
        raise InputError(
            f"--rate is {rate:g}, expected more than 0 and less than {saturated:.4g}, the most "
            "that is answered; lower it, or divide it by the number of servers"
        )
    busy = turns.reading_s + turns.decoding_s
    tokens = sum(k.output * k.share for k in mix) / sum(k.share for k in mix)
    bound = formula(costs, slots, mix)
    load = at_rate(costs, slots, mix, rate)
    print(make_report(saturated, bound, turns.reading_s / busy, tokens, load))
    print(f"{least_slots(costs, slots, mix, rate)} slots at least answer so many")
    return 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
