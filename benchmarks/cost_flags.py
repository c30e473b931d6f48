"""What the parts of a replica's turns take, as flags."""

import itertools
import re

from absl import flags

from benchmarks.turns import Costs
from llama_jax.errors import InputError


def define(
    values: flags.FlagValues,
    prefill_rates: str | None = None,
    decode_rates: str | None = None,
    decode_steps: int = 8,
    in_flight: int = 1,
) -> None:
    """Define the flags, with these defaults."""
    flags.DEFINE_list(
        "prefill_rates",
        prefill_rates,
        "Tokens/s of reading a prompt's chunk, by its size: 64:5000,256:20000. Give all sizes that "
        "the plan has: 16, 32, 64 and 128 on a CPU with the kernels, 64 and 256 on a GPU or TPU. "
        "The end of a prompt is padded to one of them.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "decode_rates",
        decode_rates,
        "Tokens/s of all slots together, by the number of slots that a step computes: 1:48,8:200. "
        "A CPU with the kernels has programs for 1, 2, 4, 8 ... slots, all else for all slots "
        "only. Measured at about the mean context of the mix.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "request_ms",
        0.0,
        "What each request takes besides: its admission and first token.",
        lower_bound=0.0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "decode_steps",
        decode_steps,
        "Tokens of each slot in a turn: 8 on a CPU, 16 on a GPU or TPU.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "in_flight",
        in_flight,
        "Calls sent before the first is read: 1 on a CPU, 2 on a GPU or TPU.",
        lower_bound=1,
        flag_values=values,
    )


def read(values: flags.FlagValues) -> Costs:
    """Return what the flags say of the parts of a turn."""
    chunks = _read_rates(values, "prefill_rates", "SIZE:TOKENS_PER_S such as 128:540")
    sizes = sorted(chunks)
    for size, larger in itertools.pairwise(sizes):
        if larger % size:
            raise InputError(
                f"--prefill_rates has the sizes {size} and {larger}, expected each a multiple of "
                "the one before; name the plan's"
            )
    steps = _read_rates(values, "decode_rates", "SLOTS:TOKENS_PER_S such as 8:200")
    return Costs(
        {size: size / rate for size, rate in chunks.items()},
        {slots: slots / rate for slots, rate in steps.items()},
        values.request_ms / 1e3,
        values.decode_steps,
        values.in_flight,
    )


def _read_rates(values: flags.FlagValues, flag: str, form: str) -> dict[int, float]:
    """Return tokens a second by a whole number."""
    rates: dict[int, float] = {}
    texts = values[flag].value or []
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
