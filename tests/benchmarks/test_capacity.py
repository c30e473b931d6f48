"""The capacity model: exact cases of its arithmetic, its limits and its command line."""

import math
import re

import pytest

from benchmarks import capacity, capacity_check
from benchmarks.turns import Costs, Job, Kind, Turns, draw, formula, percentile
from tests.helpers import ROOT

STEP = {1: 0.01, 2: 0.015, 4: 0.02, 8: 0.03}
COSTS = Costs({16: 0.1, 32: 0.15, 64: 0.2, 128: 0.4}, STEP)
RATES = ["--prefill_rates=64:320,128:320", "--decode_rates=1:100,8:400"]


def run(costs, slots, *lengths):
    """Return the jobs of these (prompt, output), all there at the beginning, and the seconds."""
    jobs = [Job(0.0, range(prompt), output) for prompt, output in lengths]
    return jobs, Turns(costs, slots, jobs).now


def test_one_request_takes_its_chunks_and_its_steps():
    """128 + 32 tokens to read, then 9 tokens after the first: two turns of 8 steps."""
    (job,), seconds = run(COSTS, 8, (150, 10))
    assert job.first == pytest.approx(0.4 + 0.15)
    assert seconds == pytest.approx(0.55 + 2 * 8 * 0.01)


def test_one_slot_answers_one_after_the_other():
    mix = [Kind(150, 10, 1), Kind(20, 1, 1)]
    one, other = 0.55 + 2 * 8 * 0.01, 0.15
    _, seconds = run(COSTS, 1, (150, 10), (20, 1), (20, 1), (150, 10))
    assert seconds == pytest.approx(2 * (one + other))
    assert formula(COSTS, 1, mix[:1]).requests_per_s == pytest.approx(1 / one)
    assert capacity.most(COSTS, 1, mix, 100) == pytest.approx(2 / (one + other))


@pytest.mark.parametrize(("slots", "seconds"), [(1, 0.01), (2, 0.015), (4, 0.02), (8, 0.03)])
def test_without_prompts_all_slots_decode(slots, seconds):
    """33 tokens: the first, and four turns of 8 steps of all slots."""
    mix = [Kind(0, 33, 1)]
    expected = slots / (4 * 8 * seconds)
    assert capacity.most(COSTS, slots, mix, 80) == pytest.approx(expected)
    bound = formula(COSTS, slots, mix)
    assert (bound.requests_per_s, bound.by) == (pytest.approx(expected), "slots")


def test_outputs_of_one_token_need_no_step():
    """A turn reads two prompts of 64 tokens, by chunks of 0.2 s."""
    mix = [Kind(64, 1, 1)]
    assert capacity.most(COSTS, 8, mix, 80) == pytest.approx(5)
    bound = formula(COSTS, 8, mix)
    assert (bound.requests_per_s, bound.by) == (pytest.approx(5), "prompts")


def test_a_turn_reads_no_more_prompt_tokens_than_the_largest_chunk_has():
    """Prompts of four chunks, answers of one turn: one request in four turns, each of a chunk."""
    mix = [Kind(512, 9, 1)]
    bound = formula(COSTS, 8, mix)
    assert bound.by == "prompts"
    assert bound.requests_per_s == pytest.approx(1 / (4 * 0.4 + 8 * 0.01))
    assert capacity.most(COSTS, 8, mix, 200) == pytest.approx(bound.requests_per_s, rel=0.01)


def test_a_step_computes_the_next_larger_number_of_slots():
    _, seconds = run(COSTS, 8, *[(0, 9)] * 5)
    assert seconds == pytest.approx(8 * STEP[8])
    _, seconds = run(COSTS, 8, *[(0, 9)] * 3)
    assert seconds == pytest.approx(8 * STEP[4])


def test_what_a_request_takes_besides_is_added():
    costs = Costs({64: 0.2}, STEP, request_s=0.05)
    _, seconds = run(costs, 8, (64, 1), (64, 1))
    assert seconds == pytest.approx(2 * 0.25)
    assert formula(costs, 8, [Kind(0, 1, 1)]).requests_per_s == pytest.approx(20)
    assert math.isinf(formula(COSTS, 8, [Kind(0, 1, 1)]).requests_per_s)


def test_a_second_call_in_flight_holds_a_slot_for_longer():
    """The one slot is free when its last tokens are read, which is when nothing else is sent."""
    costs = Costs({64: 0.2}, {1: 0.01}, in_flight=2)
    jobs, seconds = run(costs, 1, (64, 9), (64, 9))
    assert jobs[1].began == pytest.approx(0.2 + 8 * 0.01)
    assert seconds == pytest.approx(2 * (0.2 + 8 * 0.01))


@pytest.mark.parametrize(
    "mix", [[Kind(64, 64, 1)], [Kind(64, 64, 2), Kind(300, 32, 1), Kind(20, 120, 1)]]
)
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_the_turns_stay_below_the_formula_and_near_it(mix, slots):
    """But for the ends of a run, where not all slots are used, the formula of means is a bound."""
    share = capacity.most(COSTS, slots, mix) / formula(COSTS, slots, mix).requests_per_s
    assert 0.8 < share < 1.02


@pytest.mark.parametrize("chip", ["H100, float16", "TPU v6e, bfloat16"])
def test_the_table_of_the_page_is_computed(chip):
    page = (ROOT / "docs/scaling.md").read_text()
    (row,) = re.findall(rf"^\| {chip} \| (.+) \|$", page, re.MULTILINE)
    prefill, decode, requests, tokens, *waits = row.split(" | ")
    rate = float(prefill.replace(",", ""))
    costs = Costs({256: 256 / rate}, {8: 8 / float(decode)}, decode_steps=16, in_flight=2)
    mix = [Kind(500, 250, 1)]
    most = capacity.most(costs, 8, mix)
    load = capacity.at_rate(costs, 8, mix, 0.8 * most)
    assert (requests, tokens) == (f"{most:.2f}", f"{250 * most:.0f}")
    expected = [f"{p50:.1f}, {p99:.1f} s" for p50, p99 in (load.first_s, load.answer_s)]
    assert waits == expected


def test_more_slots_answer_no_fewer_requests():
    mix = [Kind(64, 64, 1), Kind(20, 10, 1)]
    rates = [capacity.most(COSTS, slots, mix) for slots in (1, 2, 4, 8)]
    assert rates == sorted(rates)
    assert capacity.least_slots(COSTS, 8, mix, rates[1]) == 2
    assert capacity.least_slots(COSTS, 8, mix, rates[3] * 1.01) is None


def test_at_a_low_rate_nobody_waits():
    load = capacity.at_rate(COSTS, 8, [Kind(64, 9, 1)], 1e-4)
    alone = 0.2 + 8 * 0.01
    assert load.first_s == pytest.approx((0.2, 0.2))
    assert load.answer_s == pytest.approx((alone, alone))
    assert load.slots_used == pytest.approx(1e-4 * alone, rel=0.1)


def test_requests_are_drawn_by_their_shares_and_come_in_order():
    jobs = draw([Kind(1, 2, 3), Kind(4, 5, 1)], 400, rate=10.0)
    assert sum(len(job.prefix) == 1 for job in jobs) == 300
    moments = [job.submitted for job in jobs]
    assert moments == sorted(moments)
    assert moments[-1] == pytest.approx(40, rel=0.2)


def test_a_percentile_is_one_of_the_values():
    assert percentile([3, 1, 2], 50) == 2
    assert percentile(range(1, 101), 99) == 99
    assert percentile([7], 99) == 7


def test_the_report(cli):
    status, out, err = cli(capacity, *RATES, "--mix=64:41:1", "--slots=8")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    # 8 requests in 5 turns: each turn has 1.6 chunks of 0.2 s and 8 steps of 0.02 s.
    assert "(3.33 by the formula)" in lines[0]
    assert lines[1] == "bound by slots: all are in use"
    assert lines[2] == "time: 67% for prompts, 33% for decode steps"
    assert lines[-1].endswith("slots at least answer so many")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (RATES, "--mix is not given, expected PROMPT:OUTPUT:SHARE,...; add it"),
        ([*RATES, "--mix=64:0:1"], "--mix has '64:0:1', expected PROMPT:OUTPUT:SHARE with"),
        ([*RATES, "--mix=64:8:0"], "--mix has '64:8:0', expected PROMPT:OUTPUT:SHARE with"),
        ([*RATES, "--mix=-1:8:1"], "--mix has '-1:8:1', expected PROMPT:OUTPUT:SHARE with"),
        (["--mix=64:8:1"], "--prefill_rates is not given, expected SIZE:TOKENS_PER_S such as"),
        ([*RATES, "--prefill_rates=100"], "--prefill_rates has '100', expected SIZE:TOKENS_PER_S"),
        ([*RATES, "--prefill_rates=64:0"], "--prefill_rates has '64:0', expected SIZE:"),
        ([*RATES, "--prefill_rates=64:9,96:9"], "--prefill_rates has the sizes 64 and 96, expecte"),
        ([*RATES, "--decode_rates=8:1,8:2"], "--decode_rates has 8 twice, expected it once; drop"),
        ([*RATES, "--decode_rates=x"], "--decode_rates has 'x', expected SLOTS:TOKENS_PER_S such"),
        ([*RATES, "--mix=64:8:1", "--slots=9"], "--slots is 9, expected 1 to 8, the most of --dec"),
        ([*RATES, "--mix=64:8:1", "--slots=0"], "--slots is 0, expected 1 to 8, the most of --dec"),
        ([*RATES, "--mix=64:8:1", "--rate=99"], "--rate is 99, expected more than 0 and less than"),
        ([*RATES, "--mix=64:8:1", "--rate=0"], "--rate is 0, expected more than 0 and less than"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_2(cli, arguments, expected):
    status, out, err = cli(capacity, *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {expected}")


@pytest.mark.exhaustive
def test_the_prediction_is_compared_with_the_engine(cli):
    sizes = ["--dtype=float32", "--requests=4", "--rounds=1", "--slots=2", "--mix=20:9:1,40:4:1"]
    status, out, _ = cli(capacity_check, "--shape=demo", *sizes)
    assert status == 0
    assert out.splitlines()[-1].startswith("predicted/measured, median: ")
