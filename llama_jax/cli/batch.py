"""The verb batch: answer a file of requests."""

from llama_jax.batch import Batch
from llama_jax.cli.console import note
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.model import load_model
from llama_jax.cli.ray_batch import answer_on_ray, check_ray_flags, open_input
from llama_jax.cli.receipts import open_receipts
from llama_jax.errors import InputError
from llama_jax.progress import progress_bar


def batch() -> None:
    """Answer the requests of --input that --output has no results for."""
    if FLAGS.input is None or FLAGS.output in ("text", "json"):
        raise InputError("batch needs --input and --output, two files of JSON lines; name both")
    check_ray_flags()
    with (
        open_receipts() as receipts,
        open_input() as source,
        Batch(source, FLAGS.output, receipts=receipts, seed=FLAGS.seed or 0) as work,
    ):
        if work.done:
            note(f"{work.output} has {work.done:,} of {work.total:,} results already; resuming")
        if FLAGS.engine == "ray":
            answer_on_ray(work)
        else:
            llm = load_model(slots=8)
            with progress_bar(total=work.total, initial=work.done, unit="request") as bar:
                for _ in work.run(llm):
                    bar.update()
    warn_of_ignored(work)
    if work.failed:
        raise InputError(
            f"{work.failed:,} of {work.total:,} requests have an `error` in {work.output}; "
            "fix them and run them as another batch"
        )


def warn_of_ignored(work: Batch) -> None:
    """Name the fields that had no effect."""
    if work.ignored:
        names = ", ".join(f"{name} ({count:,})" for name, count in work.ignored.most_common())
        note(f"warning: fields without effect were ignored, in so many lines: {names}")
