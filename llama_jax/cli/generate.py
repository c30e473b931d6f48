"""No verb: answer one request."""

from llama_jax.cli.console import indented_json, keeping_interrupts, note, summary
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.model import checkpoint_path, load_model
from llama_jax.cli.receipts import open_receipts
from llama_jax.cli.refusals import refuse_flags
from llama_jax.cli.requests import read_request
from llama_jax.cli.verbs import RECEIPT
from llama_jax.engine.request import GenerationRequest
from llama_jax.engine.result import Result
from llama_jax.llama import Llama
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.stored_tokenizer import load_tokenizer


def generate() -> None:
    """Print the answer to the request that the flags describe."""
    if FLAGS.print_prompt_tokens:
        others = ("verify", "convert", "context", "dtype", "slots", "output", "stream")
        refuse_flags("--print_prompt_tokens", "which runs no model", *others, *RECEIPT)
    # Before the weights: a mistake should not take a minute to show.
    request, repeat = read_request()
    if FLAGS.print_prompt_tokens:
        _print_prompt_tokens(request)
        return
    with open_receipts() as receipts:
        llm = load_model(requests=[request])
        result = _answer(llm, request)
        if receipts is not None:
            receipts.append(result)
    note(summary(llm, result, repeat))


def _answer(llm: Llama, request: GenerationRequest) -> Result:
    """Print the answer; return its result."""
    _note_warnings(request, llm.tokenizer)
    shown = FLAGS.output == "text" and FLAGS.stream
    stream = llm.start(request, streamed=shown)
    with keeping_interrupts() as check:
        for piece in stream:
            check()
            if shown:
                print(piece, end="", flush=True)
    result = stream.result
    if FLAGS.output == "json":
        print(indented_json(result.to_dict()))
    elif FLAGS.stream:
        print()
    else:
        ids = ",".join(map(str, result.tokens))
        print(ids if result.response is None else result.response)
    return result


def _note_warnings(request: GenerationRequest, tokenizer: Tokenizer | None) -> None:
    for warning in request.warnings(tokenizer):
        note(f"warning: {warning}")


def _print_prompt_tokens(request: GenerationRequest) -> None:
    """Print the ids that the model would get to stdout, and their pieces to stderr."""
    tokenizer, vocab_size = load_tokenizer(checkpoint_path())
    tokens = request.encode(tokenizer, vocab_size)
    _note_warnings(request, tokenizer)
    print(",".join(map(str, tokens)))
    if tokenizer is not None:
        note(" ".join(tokenizer.piece(token) for token in tokens))
    note(f"{len(tokens):,} tokens")
