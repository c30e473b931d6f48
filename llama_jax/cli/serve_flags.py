"""Serve flags: where the server listens, whom it serves, and how many wait."""

from absl import flags


def define() -> None:
    """Define them."""
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
    flags.DEFINE_integer("port", 8787, "Port to listen on, 0 to 65535; 0 takes any free one.")
    flags.DEFINE_string(
        "api_token",
        None,
        "Token that clients must send. Default: $LLAMA_JAX_API_TOKEN, else none.",
    )
    flags.DEFINE_bool("insecure", False, "Accept other machines and host names without a token.")
    flags.DEFINE_list(
        "allowed_origins",
        [],
        "Origins whose pages may call the server, such as https://example.com; * is any. "
        "Default: none.",
    )
    flags.DEFINE_multi_string(
        "served_model_name",
        [],
        "Names by which clients may call the model, separated by commas; also repeatable. "
        "Default: the model card's name.",
    )
    flags.DEFINE_integer(
        "max_queue",
        64,
        "Requests that may wait for a slot, 0 or more; further ones get status 429.",
    )
    flags.DEFINE_integer(
        "max_queue_per_client",
        None,
        "Requests of one address that may wait for a slot; further ones get status 429. Default: "
        "--max_queue.",
    )
    flags.DEFINE_integer(
        "max_slots_per_client",
        None,
        "Slots that one address may have while others are active, 1 or more: its answers then slow "
        "those of others less, and slots may be idle. Default: all but one.",
    )
    flags.DEFINE_enum(
        "log_format",
        "auto",
        ["auto", "json", "text"],
        "Form of the access log; auto: short lines of text in a terminal, else JSON.",
    )
    flags.DEFINE_float(
        "timeout_s", 600, "Seconds for a request, time in the queue included; above 0."
    )
