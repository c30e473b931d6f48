"""The flags of a batch on Ray."""

from absl import flags


def define() -> None:
    """Define them in absl's global set."""
    flags.DEFINE_enum(
        "engine",
        "local",
        ["local", "ray"],
        "local: this process answers. ray: workers of a Ray cluster do (the extra ray).",
    )
    flags.DEFINE_string(
        "ray_address",
        None,
        "Ray cluster to use: auto, HOST:PORT or ray://HOST:PORT. Default: $RAY_ADDRESS, else one "
        "of this machine alone, which ends with the run.",
    )
    flags.DEFINE_integer(
        "workers", 1, "Processes that each load the model; together they use all cores."
    )
    flags.DEFINE_float("gpus_per_worker", 0, "GPUs of each worker; a part of 1 shares one.")
    flags.DEFINE_integer("rows_per_call", 32, "Requests that a worker is sent at a time.")
    flags.DEFINE_bool(
        "allow_mixed",
        False,
        "Take answers of workers whose fingerprints differ, as may the answers.",
    )
