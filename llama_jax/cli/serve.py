"""The verb serve: the HTTP API."""

import os
import pathlib
from typing import Any

from llama_jax.cli.flags import FLAGS
from llama_jax.cli.keys import read_signer
from llama_jax.cli.model import load_model
from llama_jax.errors import InputError


def serve() -> None:
    """Answer requests over HTTP until a signal ends it."""
    try:
        from llama_jax.server import serve as server
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install 'llama_jax[serve]'") from None
    token = FLAGS.api_token
    names = [name.strip() for value in FLAGS.served_model_name for name in value.split(",")]
    own_names = {"models": tuple(names)} if names else {}
    server.serve(
        lambda: load_model(slots=8, max_queue=FLAGS.max_queue),
        host=FLAGS.host,
        port=FLAGS.port,
        # An empty --api_token is a mistake, which Settings refuses; it does not mean none.
        api_token=token if token is not None else os.environ.get("LLAMA_JAX_API_TOKEN"),
        allowed_origins=tuple(FLAGS.allowed_origins),
        insecure=FLAGS.insecure,
        log_format=FLAGS.log_format,
        timeout_s=FLAGS.timeout_s,
        receipts=FLAGS.receipts,
        private_receipts=FLAGS.private,
        signer=read_signer(),
        max_queue_per_client=FLAGS.max_queue_per_client,
        max_slots_per_client=FLAGS.max_slots_per_client,
        batches=_batch_settings(),
        **own_names,
    )


def _batch_settings() -> Any:
    """Return the settings of batches; None: none are stored."""
    from llama_jax.server.batches.settings import DAY_S, BatchSettings

    if FLAGS.batch_dir is None:
        return None
    return BatchSettings(
        pathlib.Path(FLAGS.batch_dir).expanduser(),
        max_requests=FLAGS.batch_max_requests,
        max_file_bytes=FLAGS.batch_max_file_mb * 10**6,
        max_stored_bytes=FLAGS.batch_max_stored_mb * 10**6,
        keep_s=FLAGS.batch_keep_days * DAY_S,
        slots=FLAGS.batch_slots,
    )
