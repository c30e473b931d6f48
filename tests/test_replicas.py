"""Replicas of a model answer on devices of their own, simulated on the CPU, as one does."""

import pytest

from tests.helpers.simulated_devices import run_cases

SOME = "test_a_batch or a_slot_that_fails or read_at_the_same_time or mistake or holds_a_model"


@pytest.mark.slow
def test_some_cases_on_eight_devices():
    assert " passed" in run_cases("replica_cases", "-k", SOME)


@pytest.mark.exhaustive
@pytest.mark.long
def test_every_case_on_eight_devices():
    assert " passed" in run_cases("replica_cases", "-k", f"not ({SOME})")
