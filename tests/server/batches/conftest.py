"""The model that all tests of stored batches share."""

import pytest

from tests.helpers.demo import load_demo


@pytest.fixture(scope="session")
def demo():
    """Loads it: each server has an engine of its own, and programs that are compiled once."""
    return lambda: load_demo(slots=4)


@pytest.fixture
def llm(demo):
    return demo()
