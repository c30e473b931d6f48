"""A run is repeated in bits: from any interface, in any slots, on any number of devices."""

import dataclasses
import itertools
import json

import pytest

from llama_jax.errors import InputError
from llama_jax.receipt.file import ReceiptFile
from llama_jax.replay import replay
from llama_jax.replay.compare import compare_receipts, compare_with_model, figures, logits_of
from llama_jax.replay.verdict import Outcome
from llama_jax.text.tokenizer import BOS_ID
from tests.helpers import forgery
from tests.helpers.commands import run_py
from tests.helpers.demo import load_demo
from tests.helpers.serving import RUN, serving
from tests.helpers.simulated_devices import run_code

PROMPTS = ("What is the capital of France?", "Tell me a story.", "Hello")


def requests():
    """Twenty mixed requests."""
    for i in range(20):
        request = {"prompt": PROMPTS[i % 3], "seed": i, "max_tokens": 4 + 2 * i}
        request["temperature"] = (0, 0.7, 1.5, 3)[i % 4]
        if i % 2:
            request |= {"top_p": 0.9, "top_k": 1 + i, "min_p": 0.001 * i}
        if i % 5 == 0:
            request |= {"frequency_penalty": 0.4, "repetition_penalty": 1.2}
        if i % 7 == 0:
            request |= {"logit_bias": {"300": 2.0}, "ignore_eos": True}
        if i % 9 == 0:
            request |= {"stop": ["the"]}
        if i % 10 == 0:
            request |= {"raw": True}
        yield request


@pytest.fixture(scope="module")
def llm():
    return load_demo(slots=4)


def answered(llm, request, *, is_streamed):
    """The result of a request in Python."""
    if not is_streamed:
        return llm.generate(**request)
    stream = llm.stream(**request)
    assert "".join(stream) == stream.result.response
    return stream.result


def served(client, request, *, is_streamed):
    """The receipt of a request to a server."""
    response = client.post(RUN, json=request | {"stream": is_streamed})
    assert response.status_code == 200
    return client.get(f"/receipts/{response.headers['x-receipt-id']}").json()


@pytest.fixture(scope="module")
def few(llm):
    """Receipts of the first six runs, every second one streamed."""
    results = [
        answered(llm, r, is_streamed=i % 2) for i, r in enumerate(itertools.islice(requests(), 6))
    ]
    return [forgery.read(result.receipt()) for result in results]


@pytest.fixture(scope="module")
def receipts(llm, tmp_path_factory):
    """A file of the receipts of all runs: from Python and a server, every second one streamed,
    from a batch, and from the command line."""
    folder = tmp_path_factory.mktemp("receipts")
    lines = list(map(json.dumps, requests()))
    with ReceiptFile(folder / "python.jsonl") as file:
        for i, line in enumerate(lines[:5]):
            file.append(answered(llm, json.loads(line), is_streamed=i % 2))
    with serving(llm, receipts=5) as client:
        found = [
            served(client, json.loads(x), is_streamed=bool(i % 2))
            for i, x in enumerate(lines[5:10])
        ]
    (folder / "server.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    (folder / "requests.jsonl").write_text("\n".join(lines[10:18]))
    files = f"--input={folder}/requests.jsonl", f"--output={folder}/results.jsonl"
    done = [run_py("batch", *files, "--slots=4", f"--receipt={folder}/batch.jsonl")]
    for line in lines[18:]:
        done.append(run_py("--request=-", f"--receipt={folder}/command.jsonl", input=line))
    assert [each.returncode for each in done] == [0, 0, 0], [each.stderr for each in done]
    parts = [folder / f"{name}.jsonl" for name in ("python", "server", "batch", "command")]
    path = folder / "receipts.jsonl"
    path.write_text("".join(part.read_text() for part in parts))
    return path


CODE = """
import json, sys
from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.receipt import read_receipts
from llama_jax.replay import replay
path = json.loads(sys.argv[1])
found = {}
for slots, devices in ((8, 1), (1, 2)):
    llm = Llama.load(DEMO_CHECKPOINT, slots=slots, devices=devices)
    for prefill in (False, True)[:devices]:
        verdicts = replay(llm, read_receipts(path), prefill=prefill)
        found[f"{slots} {devices} {prefill}"] = [each.outcome.name for each in verdicts]
invariant = llm.executor.plan.batch_invariant
print(json.dumps([found, invariant]))
"""


def test_runs_are_repeated_by_the_same_model(llm, few):
    assert {verdict.outcome for verdict in replay(llm, few)} == {Outcome.EXACT}


@pytest.mark.slow
def test_runs_are_repeated_in_another_process(receipts):
    """Of every interface: from 8 slots and 1, on one device and two, and in one pass."""
    found, invariant = run_code(CODE, str(receipts))
    assert len(found) == 3
    for how, outcomes in found.items():
        expected = {"EXACT"} if invariant else {"EXACT", "TOKENS"}
        assert len(outcomes) == 20
        assert set(outcomes) <= expected, how


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [60, 200])
def test_one_pass_counts_what_was_drawn_in_all_chunks(llm, prompt):
    """Penalties are of the output alone: of the chunk's tokens and of the chunks before it."""
    words = [BOS_ID, *[300 + i % 40 for i in range(prompt)]]
    penalties = {"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.1}
    request = {"prompt_tokens": words, "max_tokens": 250, "ignore_eos": True, "seed": 3}
    request["logit_bias"] = {words[-1]: 20}
    whole = llm.generate(**request, **penalties, temperature=2)
    assert len(list(llm.executor.sizes.chunks(prompt + 250))) > 1
    assert words[-1] in whole.tokens
    (verdict,) = replay(llm, [forgery.read(whole.receipt())], prefill=True)
    assert verdict.outcome.status == 0, str(verdict)
    if llm.executor.plan.batch_invariant:
        assert verdict.outcome is Outcome.EXACT


# Continued.


@pytest.mark.parametrize("at", [0, 1, 9, 16, 17])
def test_a_run_continues_from_any_draw(llm, at):
    """The same tokens and numbers; a part that is read has the bits of one that was drawn."""
    whole = llm.generate(prompt=PROMPTS[1], temperature=3, seed=5, max_tokens=17, top_p=0.95)
    receipt = forgery.read(whole.receipt())
    stream = llm.start(receipt.continuation(at))
    text = "".join(stream)
    result = stream.result
    assert (result.tokens, result.response, result.finish_reason) == (
        whole.tokens,
        whole.response,
        "length",
    )
    assert text == whole.response
    assert result.usage.completion_tokens == 17
    if llm.executor.plan.batch_invariant:
        assert result.record.draws == whole.record.draws
    again = forgery.read(result.receipt())
    assert again.resumed == at
    for prefill in (False, True):
        (verdict,) = replay(llm, [again], prefill=prefill)
        assert verdict.outcome.status == 0


def test_a_fork_has_another_seed_from_its_draw_on(llm):
    whole = llm.generate(prompt=PROMPTS[1], temperature=3, seed=5, max_tokens=30)
    receipt = forgery.read(whole.receipt())
    fork = llm.start(receipt.continuation(10, seed=6))
    list(fork)
    assert fork.result.tokens[:10] == whole.tokens[:10]
    assert fork.result.tokens[10:] != whole.tokens[10:]
    forked = forgery.read(fork.result.receipt())
    for prefill in (False, True):
        (verdict,) = replay(llm, [forked], prefill=prefill)
        assert verdict.outcome.status == 0, str(verdict)


def test_penalties_count_what_was_taken_over(llm):
    request = {"prompt": PROMPTS[1], "temperature": 0, "max_tokens": 40, "frequency_penalty": 2}
    whole = llm.generate(**request)
    stream = llm.start(forgery.read(whole.receipt()).continuation(20))
    list(stream)
    assert stream.result.tokens == whole.tokens


def test_scores_of_a_prompt_are_of_the_prompt_alone(llm):
    request = {"prompt": PROMPTS[0], "temperature": 0, "prompt_logprobs": True, "logprobs": 1}
    whole = llm.generate(**request, max_tokens=6)
    stream = llm.start(forgery.read(whole.receipt()).continuation(3))
    list(stream)
    result = stream.result
    assert result.prompt_logprobs == whole.prompt_logprobs
    assert [each.token for each in result.logprobs] == whole.tokens


def test_draws_of_another_vocabulary_are_refused(llm):
    whole = llm.generate(prompt=PROMPTS[0], max_tokens=3)
    request = forgery.read(whole.receipt()).continuation(2)
    first = request.resumed[0]._replace(token=5000)
    with pytest.raises(InputError, match=r"the resumed draws\[0\] is 5000"):
        llm.start(dataclasses.replace(request, resumed=(first,)))


def test_a_run_that_had_ended_is_continued_to_its_end(llm):
    whole = llm.generate(prompt=PROMPTS[0], temperature=0, max_tokens=5)
    receipt = forgery.read(whole.receipt())
    stream = llm.start(receipt.continuation(5))
    assert "".join(stream) == whole.response
    for at in (-1, 6):
        with pytest.raises(InputError, match="expected 0 to 5"):
            receipt.continuation(at)
    with pytest.raises(InputError, match="private"):
        forgery.read(whole.receipt(private=True)).continuation(1)


# Compared.


@pytest.mark.slow
def test_sides_that_are_equal(llm, few):
    known = [logits_of(receipt, llm) for receipt in few]
    for pairs in (
        list(compare_receipts(few, few)),
        list(compare_with_model(few, llm, [None] * 6)),
        list(compare_with_model(few, llm, known)),
    ):
        found = figures(pairs)
        assert found["token_agreement"] == 1
        assert found["runs_without_divergence"] == found["runs"] == 6
        assert found["logprob_gap_max"] <= 1e-5
    assert found["kl_max"] == 0


def test_sides_that_differ(llm):
    first, second = (
        [forgery.read(llm.generate(prompt=PROMPTS[1], temperature=3, seed=seed).receipt())]
        for seed in (1, 2)
    )
    with pytest.raises(InputError, match="different requests"):
        list(compare_receipts(first, second))
    with pytest.raises(InputError, match="as many"):
        list(compare_receipts(first, []))
    changed = json.loads(json.dumps(first[0].statement))
    _, internal = forgery.parts(changed)
    internal["draws"]["token"][5] = 300
    (pair,) = compare_receipts(first, [forgery.read(changed)])
    assert pair.first_divergence == 5
    (pair,) = compare_with_model([forgery.read(changed)], llm, [None])
    assert pair.first_divergence == 5
    assert pair.deficits[5] > 0
    assert figures([pair])["token_difr"] > 0


def test_outcomes_have_their_exit_statuses():
    assert [outcome.status for outcome in Outcome] == [0, 0, 1, 2]
