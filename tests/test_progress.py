"""Progress on stderr: a bar in a terminal, elsewhere a line for each tenth."""

import io
import sys

import pytest

from llama_jax.progress import progress_bar


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    def become(file):
        monkeypatch.setattr(sys, "stderr", file)
        return file

    return become


def test_without_a_terminal_each_tenth_is_a_line(stderr):
    file = stderr(io.StringIO())
    with progress_bar(total=1000, unit="request", label="answering", delay=0) as bar:
        for _ in range(1000):
            bar.update()
    lines = file.getvalue().splitlines()
    assert lines[0] == "answering: 0% (0 of 1000)"
    assert lines[5] == "answering: 50% (500 of 1000)"
    assert lines[-1] == "answering: 100% (1000 of 1000)"
    assert len(lines) == 11
    assert "\r" not in file.getvalue()


@pytest.mark.parametrize("total", [0, 1, 7, 10, 64])
def test_no_line_comes_twice_and_the_last_is_the_end(stderr, total):
    file = stderr(io.StringIO())
    assert list(progress_bar(range(total), total=total, unit="run", delay=0)) == list(range(total))
    lines = file.getvalue().splitlines()
    assert len(set(lines)) == len(lines) <= 14
    assert not total or lines[-1].startswith("runs: 100% ")


def test_bytes_have_units(stderr):
    file = stderr(io.StringIO())
    with progress_bar(total=13_500_000_000, unit="B", label="reading", delay=0) as bar:
        bar.update(13_500_000_000)
    assert file.getvalue().splitlines()[-1] == "reading: 100% (13.5G of 13.5G)"


def test_a_terminal_has_a_bar(stderr):
    file = stderr(Screen())
    with progress_bar(total=10, unit="run", delay=0) as bar:
        bar.update(10)
    assert "100%|" in file.getvalue()


@pytest.mark.parametrize("options", [{"shown": False, "delay": 0}, {}])
def test_short_work_and_work_that_is_not_shown_say_nothing(stderr, options):
    for file in (stderr(io.StringIO()), stderr(Screen())):
        assert sum(progress_bar(range(5), total=5, unit="run", **options)) == 10
        assert file.getvalue() == ""
