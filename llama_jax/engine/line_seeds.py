"""Seeds of a batch's lines: a function of the job and the line, not of who answers it or when."""

import hashlib

from llama_jax.engine.parameters import MAX_DRAWN_SEED
from llama_jax.errors import InputError

LARGEST_JOB_SEED = 2**64 - 1


def check_job_seed(seed: int) -> int:
    """Return the seed of a job.

    Raises:
        InputError: it is no whole number from 0 to LARGEST_JOB_SEED.
    """
    if type(seed) is not int or not 0 <= seed <= LARGEST_JOB_SEED:
        raise InputError(f"seed is {seed!r:.40}, expected a whole number from 0 to 2^64 - 1")
    return seed


def line_seed(job: int, number: int, sha256: str) -> int:
    """Return the seed of a line that names none, from 1 to MAX_DRAWN_SEED.

    Args:
        job: the seed of the whole batch, from 0.
        number: of the line, from 1.
        sha256: of the line's bytes, in hexadecimal, as the line of output has it.
    """
    digest = hashlib.sha256(f"{job} {number} {sha256}".encode("ascii")).digest()
    return 1 + int.from_bytes(digest, "big") % MAX_DRAWN_SEED
