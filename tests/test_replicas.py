"""Replicas of a model answer on devices of their own, simulated on the CPU, as one does."""

import pytest

from tests.helpers.simulated_devices import run_cases

MORE = "test_a_batch or a_slot_that_fails"
FEW = "read_at_the_same_time or mistake or holds_a_model"


def test_a_few_cases_on_eight_devices():
    run_cases("replica_cases", "-k", FEW)


@pytest.mark.slow
def test_more_cases_on_eight_devices():
    assert " passed" in run_cases("replica_cases", "-k", MORE)


@pytest.mark.exhaustive
@pytest.mark.long
def test_every_case_on_eight_devices():
    assert " passed" in run_cases("replica_cases", "-k", f"not ({FEW} or {MORE})")
