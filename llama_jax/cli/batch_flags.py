"""The flags of stored batches, in serve."""

from absl import flags


def define() -> None:
    """Define them in absl's global set."""
    flags.DEFINE_string(
        "batch_dir",
        None,
        "Folder of stored batches and files (/v1/batches, ?queueRequest=true), of one server at a "
        "time. Default: none are taken.",
    )
    flags.DEFINE_integer("batch_max_requests", 50_000, "Lines of one batch, 1 or more.")
    flags.DEFINE_integer("batch_max_file_mb", 200, "Megabytes of one uploaded file, 1 or more.")
    flags.DEFINE_integer(
        "batch_max_stored_mb",
        10_000,
        "Megabytes of all files and answers kept; beyond it, uploads get status 507.",
    )
    flags.DEFINE_float(
        "batch_keep_days", 30, "Days for which files and batches that have ended are kept."
    )
    flags.DEFINE_integer(
        "batch_slots",
        None,
        "Slots that batches may use at a time, 1 or more: fewer slow live requests less. Default: "
        "all that no live request needs.",
    )
