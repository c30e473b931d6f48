"""Replicas of a model against one device: run by tests/test_replicas.py in a process of eight.

With the CPU kernels tokens and log-probabilities are equal in bits, whichever replica a request is
in, and whatever else it and the others do.
"""

import json
import random
import subprocess
import sys

import jax
import numpy as np
import pytest

from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.engine.draft_model import DraftModel
from llama_jax.errors import InputError
from tests.helpers import ROOT
from tests.helpers.serving import ANSWER, QUESTION

SIZES = {"context": 400}


def draw_requests(count):
    """Return requests of which many begin alike, in up to two chunks' tokens."""
    rng = random.Random(7)
    beginnings = [[1, *(rng.randrange(3, 1000) for _ in range(n))] for n in (0, 40, 260)]
    return [
        {
            "prompt_tokens": [
                *rng.choice(beginnings),
                *(rng.randrange(3, 1000) for _ in range(rng.choice([1, 20, 90]))),
            ],
            "seed": seed,
            "max_tokens": rng.choice([0, 1, 9, 30]),
            "temperature": rng.choice([0, 0.6, 2.0]),
            "top_p": rng.choice([None, 0.9]),
            "repetition_penalty": rng.choice([1, 1.3]),
            "logprobs": rng.choice([None, 3]),
            "prompt_logprobs": rng.random() < 0.2,
            "ignore_eos": True,
        }
        for seed in range(count)
    ]


def load(**options):
    """Load the demo model, and compile what serves every request: no more is compiled later."""
    llm = Llama.load(DEMO_CHECKPOINT, **SIZES, **options)
    for _ in llm.engine.warm_up():
        pass
    return llm


def answers(llm, requests):
    return [record(result) for result in llm.generate_all(requests)]


def record(result):
    return (
        result.tokens,
        result.finish_reason,
        repr(result.logprobs),
        repr(result.prompt_logprobs),
    )


def answers_of_a_mix(llm, requests):
    """Return the answers to requests that all come at once, and of which some are cancelled.

    Of these: what they had generated.
    """
    streams = [llm.stream(**request) for request in requests]
    for _ in range(6):
        while not (under_way := [s for s in streams if s._generation.tokens and not s.done]):
            llm.engine.step()
        under_way[-1].close()
        llm.engine.step()
    for stream in streams:
        while stream.next_piece() is not None:
            pass
    return [record(stream.result) for stream in streams]


@pytest.mark.parametrize(
    ("dtype", "replicas", "devices"), [("float32", 2, 1), ("bfloat16", 4, 1), ("float16", 2, 2)]
)
def test_fifty_mixed_requests(native_kernels, dtype, replicas, devices):
    requests = draw_requests(50)
    one = load(dtype=dtype)
    expected = answers(one, requests)
    llm = load(dtype=dtype, slots=4, replicas=replicas, devices=devices)
    cancelled = 0
    for got, whole in zip(answers_of_a_mix(llm, requests), expected, strict=True):
        if got[1] == "cancelled":
            assert got[0] == whole[0][: len(got[0])]
            cancelled += 1
        else:
            assert got == whole
    assert cancelled == 6
    assert llm.engine.counts.cached_tokens > 1000
    assert all(slot.last_used for slot in llm.engine._scheduler.slots)
    assert llm.engine.fingerprint == one.engine.fingerprint


def test_drafts_in_every_replica_change_no_token(native_kernels, monkeypatch):
    """Each replica verifies those of its own slots, whatever they cost."""
    monkeypatch.setattr(DraftModel, "is_eager", True)
    requests = draw_requests(30)
    expected = answers(load(), requests)
    llm = load(slots=4, replicas=2, devices=2, speculate=DEMO_CHECKPOINT)
    compiled = len(llm.executor.compiled.names)
    assert answers(llm, requests) == expected
    assert llm.engine.counts.accepted > 100
    # Only the programs of requests that score their prompts are not there from the start.
    later = llm.executor.compiled.names[compiled:]
    assert all(name.startswith("score(") for name in later)


def test_prompts_are_read_at_the_same_time_in_all_replicas(native_kernels):
    """What takes one replica four turns takes four replicas one."""
    prompts = [[1, *range(3 + i, 103 + i)] for i in range(4)]
    turns = {}
    for replicas in (1, 4):
        llm = Llama.load(DEMO_CHECKPOINT, **SIZES, slots=4, replicas=replicas)
        streams = [llm.stream(prompt_tokens=prompt, max_tokens=1) for prompt in prompts]
        turns[replicas] = 0
        while not all(stream.done for stream in streams):
            llm.engine.step()
            turns[replicas] += 1
    assert (turns[4], turns[1]) == (1, 4)


def test_each_device_holds_a_model_and_its_slots():
    one, four = (Llama.load(DEMO_CHECKPOINT, slots=4, replicas=n) for n in (1, 4))
    layer = four.executor.params["layer_0"]["attention"]["q"]
    assert [shard.data.shape for shard in layer.addressable_shards] == [(128, 128)] * 4
    state = four.executor.init_state()
    for array, shape in ((state.cache[0].k, (1, 2, 512, 32)), (state.bias, (1, 1024))):
        assert [shard.data.shape for shard in array.addressable_shards] == [shape] * 4
    assert four.weight_bytes_per_token == one.weight_bytes_per_token
    np.testing.assert_array_equal(four.logits(range(3, 40)), one.logits(range(3, 40)))


def test_without_the_kernels_the_tokens_are_the_same(monkeypatch):
    monkeypatch.setattr("llama_jax.decode.plan.has_kernels", lambda: False)
    sampled = {"max_tokens": 20, "temperature": 0.7, "logprobs": 1, "ignore_eos": True}
    prompts = [[1, *range(3, n)] for n in (5, 10, 60, 61)]
    requests = [{"prompt_tokens": p, "seed": i, **sampled} for i, p in enumerate(prompts)]
    one, two = (Llama.load(DEMO_CHECKPOINT, context=200, slots=2, replicas=n) for n in (1, 2))
    assert answers(two, requests) == answers(one, requests)
    assert one.engine.fingerprint != two.engine.fingerprint


def test_a_slot_that_fails_is_cleared_and_the_others_go_on(native_kernels):
    llm = Llama.load(DEMO_CHECKPOINT, **SIZES, slots=2, replicas=2)
    fine = {"prompt_tokens": [1, 5, 6], "max_tokens": 9, "seed": 1}
    [expected] = answers(llm, [fine])
    state = llm.engine._scheduler.pipeline._state
    broken = [layer._replace(v=layer.v.at[0].set(np.nan)) for layer in state.cache]
    cleared = llm.executor.clear_slot(state._replace(cache=tuple(broken)), 0)
    assert not any(np.isnan(np.asarray(layer.v)).any() for layer in cleared.cache)
    llm.engine._scheduler.pipeline._state = cleared
    assert answers(llm, [fine] * 4) == [expected] * 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"replicas": 0}, "replicas is 0, expected a whole number from 1"),
        ({"replicas": -1}, "replicas is -1, expected a whole number from 1"),
        ({"replicas": 2, "slots": 3}, "slots is 3, expected a multiple of 2, .*; choose 4, or"),
        ({"replicas": 3, "slots": 3, "devices": "all"}, "devices is 'all' with 3 replicas, "),
        ({"replicas": 2, "slots": 2, "devices": 5}, "5 with 2 replicas, expected 'all' or 1 to 4"),
        ({"replicas": 9, "slots": 9}, "with 9 replicas, expected fewer replicas: .* the 8 CPU"),
        ({"replicas": 2, "slots": 2, "devices": 3}, "cannot be split over 3 devices: it has 2"),
    ],
    ids=str,
)
def test_a_mistake_is_named(arguments, expected):
    with pytest.raises(InputError, match=expected):
        Llama.load(DEMO_CHECKPOINT, **arguments)


def test_all_devices_are_shared_among_the_replicas():
    llm = Llama.load(DEMO_CHECKPOINT, replicas=4, devices="all", slots=4)
    assert dict(llm.executor.mesh.shape) == {"data": 4, "kv": 2, "group": 1}
    assert {each.id for each in llm.executor.mesh.devices.flat} == {e.id for e in jax.devices()}


def test_a_batch(native_kernels, tmp_path):
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text(3 * (json.dumps({"prompt": QUESTION, "temperature": 0}) + "\n"))
    run = [sys.executable, "run.py", "batch", f"--input={given}", f"--output={out}"]
    subprocess.run([*run, "--replicas=2", "--devices=2"], cwd=ROOT, check=True)
    answered = map(json.loads, out.read_text().splitlines())
    assert [line["result"]["response"] for line in answered] == [ANSWER] * 3
