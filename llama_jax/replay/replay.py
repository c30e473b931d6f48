"""Replay: the runs of receipts, many at once, here; each ends in a verdict."""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator

from llama_jax.decode.sampling import SAMPLER_VERSION
from llama_jax.engine.clock import Clock
from llama_jax.engine.draw import Draw
from llama_jax.engine.generation import Generation
from llama_jax.engine.result import Result
from llama_jax.engine.stream import Stream, finish_in_order
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.provenance.canonical import text_digest
from llama_jax.receipt.reading import Receipt
from llama_jax.replay import judge as judging
from llama_jax.replay.check import check_draws
from llama_jax.replay.verdict import Judgement, Outcome, Verdict
from llama_jax.text.chat import CHAT_TEMPLATE


def replay(llm: Llama, receipts: Iterable[Receipt], *, prefill: bool = False) -> Iterator[Verdict]:
    """Run receipts again, as many at once as there are slots; yield their verdicts in order.

    Args:
        llm: the model.
        receipts: as `read_receipts` yields them.
        prefill: check all draws of a receipt by one pass over prompt and answer, which takes the
            time of reading them. With the CPU kernels the numbers have the same bits.
    """
    if prefill:
        for receipt in receipts:
            yield _refusal(llm, receipt) or _judged(llm, receipt)
        return
    submissions = (functools.partial(_submit, llm, receipt) for receipt in receipts)
    for (receipt, verdict), stream in finish_in_order(llm.engine, submissions):
        if stream is None:
            assert verdict is not None
            yield verdict
            continue
        collections.deque(stream, maxlen=0)
        record = stream.result.record
        assert record is not None
        yield _compared(llm, receipt, record.draws)


Submission = tuple[tuple[Receipt, Verdict | None], Stream | None]


def _submit(llm: Llama, receipt: Receipt) -> Submission:
    """Submit the run of a receipt, or say why it is not run."""
    if (verdict := _refusal(llm, receipt)) is not None:
        return (receipt, verdict), None
    request = receipt.request()
    # No more than it has: a run that goes on has another draw, and needs no more room.
    parameters = dataclasses.replace(request.parameters, max_tokens=receipt.num_draws)
    return (receipt, None), llm.start(dataclasses.replace(request, parameters=parameters))


def _refusal(llm: Llama, receipt: Receipt) -> Verdict | None:
    """Return the verdict of a receipt that cannot be run here or is edited; None: it is run."""
    if missing := tuple(_missing(llm, receipt)):
        return Verdict(receipt, Outcome.NOT_REPLAYABLE, reasons=missing)
    problems = tuple(receipt.problems or _content_problems(llm, receipt))
    if problems:
        return Verdict(receipt, Outcome.DIVERGED, Judgement.EDITED, reasons=problems)
    return None


def _missing(llm: Llama, receipt: Receipt) -> list[str]:
    """Return what the receipt names and this model or program is not."""
    there, here = receipt.environment.parts, llm.engine.environment.parts
    missing = [
        f"{name}: the receipt names {there.get(part)!r:.90}, here is {here.get(part)!r:.90}"
        for part, name in {
            "weights": "weights (the checkpoint's root)",
            "tokenizer": "tokenizer.model",
            "config": "config",
            "dtype": "dtype",
        }.items()
        if there.get(part) != here.get(part)
    ]
    if there["sampler"] != SAMPLER_VERSION:
        missing.append(f"the sampling law has version {there['sampler']}, here {SAMPLER_VERSION}")
    if receipt.internal["template"] != text_digest(CHAT_TEMPLATE):
        missing.append("chat template: the receipt's has another digest than the one here")
    if receipt.is_private:
        missing.append("the receipt is private: it has no prompt and no tokens to run")
    elif (size := len(receipt.prompt_tokens) + receipt.num_draws) > llm.context:
        missing.append(f"context: the run has {size:,} tokens, here is room for {llm.context:,}")
    return missing


def _content_problems(llm: Llama, receipt: Receipt) -> list[str]:
    """Return where the ids, the texts and the end that are recorded are not each other's."""
    vocab_size = llm.config.vocab_size
    if any(draw.token >= vocab_size for draw in receipt.draws):
        return [f"a draw has an id beyond the vocabulary's {vocab_size:,}"]
    drawable = llm.tokenizer.vocab_size if llm.tokenizer else vocab_size
    try:
        receipt.parameters.check_token_ids(drawable)
        if receipt.request().encode(llm.tokenizer, vocab_size) != receipt.prompt_tokens:
            return ["promptTokens are not the ids of the prompt"]
    except InputError as error:
        return [f"the request cannot be run: {error}"]
    result = _answer(llm, receipt)
    if result is None:
        return [f"the draws do not end as {receipt.finish_reason} does"]
    if receipt.text not in (None, result.response):
        return ["the text is not that of the draws"]
    return []


def _answer(llm: Llama, receipt: Receipt) -> Result | None:
    """Return the answer that the recorded draws make; None: they do not end as recorded."""
    generation = Generation(
        dataclasses.replace(receipt.request(), resumed=()),
        receipt.prompt_tokens,
        llm.tokenizer,
        eos_tokens=llm.config.eos_tokens,
        clock=Clock(),
    )
    for draw in receipt.draws:
        if generation.done:
            return None
        generation.push(draw)
    if not generation.done and receipt.finish_reason == "cancelled":
        generation.finish("cancelled")
    if not generation.done and generation.max_tokens == 0:
        generation.finish("length")
    result = generation.result
    return result if result and result.finish_reason == receipt.finish_reason else None


def _compared(llm: Llama, receipt: Receipt, again: list[Draw]) -> Verdict:
    """Compare a run with its record."""
    draws = receipt.draws
    if draws == again:
        return Verdict(receipt, Outcome.EXACT)
    if [draw.token for draw in draws] == [draw.token for draw in again]:
        allowed = judging.tolerance(receipt.environment, llm.engine.environment, receipt.parameters)
        if allowed != judging.EXACT and judging.are_within(draws, again, allowed):
            return Verdict(receipt, Outcome.TOKENS)
    return _judged(llm, receipt)


def _judged(llm: Llama, receipt: Receipt) -> Verdict:
    """Check each draw after the recorded ones before it, and judge what is not the same."""
    checked = check_draws(llm, receipt.prompt_tokens, receipt.draws, receipt.parameters)
    # Those that it took over were drawn by another law.
    draws, checked = receipt.draws[receipt.resumed :], checked[receipt.resumed :]
    if draws == [each.draw for each in checked]:
        return Verdict(receipt, Outcome.EXACT)
    allowed = judging.tolerance(receipt.environment, llm.engine.environment, receipt.parameters)
    divergence = judging.first_divergence(draws, checked, allowed, index=receipt.resumed)
    judgement = judging.judge(draws, checked, allowed)
    outcome = Outcome.TOKENS if judgement is None else Outcome.DIVERGED
    return Verdict(
        receipt, outcome, judgement, divergence, mean_deficit=judging.mean_deficit(checked)
    )
