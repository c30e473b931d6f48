"""Files of requests: run one, and read its results."""

import json

from llama_jax.batch import Batch


def run(files, llm):
    """Answer a file (input, output); return the batch, its steps, and the rows of the output."""
    with Batch(*files) as batch:
        steps = sum(1 for _ in batch.run(llm))
    return batch, steps, [json.loads(line) for line in files[1].read_text().splitlines()]


def answers(rows):
    """Return the tokens, or the error, of each row."""
    return [row["result"]["tokens"] if "result" in row else row["error"] for row in rows]
