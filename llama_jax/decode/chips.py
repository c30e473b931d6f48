"""Chips: what one accelerator has, from its maker's data sheet."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One GPU or TPU chip."""

    name: str
    platform: str
    """As JAX names it: gpu or tpu."""
    memory: int
    """Bytes that a program may take."""
    bandwidth: float
    """Bytes/s read from memory."""
    flops: float
    """FLOP/s of products of 16 bits: bfloat16, or float16 where there are none."""
    interconnect: float | None = None
    """Bytes/s that all its links to other chips bring it. None: it has none but the host's."""


GIB = 2**30

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("t4", "gpu", int(14.5 * GIB), 320e9, 65e12),
        Chip("a100-40", "gpu", int(39.4 * GIB), 1555e9, 312e12, 300e9),
        Chip("a100-80", "gpu", int(79.1 * GIB), 2039e9, 312e12, 300e9),
        Chip("h100", "gpu", int(79.1 * GIB), 3352e9, 989e12, 450e9),
        Chip("v5e", "tpu", int(15.75 * GIB), 819e9, 197e12, 200e9),
        Chip("v5p", "tpu", int(95.0 * GIB), 2765e9, 459e12, 600e9),
        Chip("v6e", "tpu", int(31.25 * GIB), 1640e9, 918e12, 400e9),
    )
}
"""By name. The memory is what is left of the card's own for programs."""
