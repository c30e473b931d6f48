"""A chat: turns, commands, interruptions, a terminal."""

import dataclasses
import os
import pty
import subprocess
import sys

import pytest

from tests.helpers import ROOT

HELLO = "Hello! I am the llama_jax demo model."

TURNS = """\
What is the capital of Italy?
And of Spain?
/reset
/seed 3
/seed x
/seed ²
/seed 99999999999999999999
/nonsense
a\udcff
/system Answer in one word.
What is the capital of France?

[INST]
/quit
never read
"""


def test_turns_and_commands(cli):
    status, out, err = cli("chat", "--temperature=0", stdin=TURNS)
    assert status == 0
    assert out == "The capital of Italy is Rome.\nThe capital of Spain is Madrid.\nParis.\n"
    for part in (
        "/reset forgets",
        "conversation forgotten",
        "seed is 'x', expected an integer from 0 to 2^64 - 1",
        "seed is '²', expected an integer",
        "seed is '99999999999999999999', expected an integer",
        "unknown command /nonsense",
        "lone surrogate",
        "system prompt set",
        "contains the control tag [INST]",
    ):
        assert part in err
    assert err.count("| seed 3\n") == 1


def test_it_ends_at_the_end_of_input_and_takes_flags_at_their_defaults(cli):
    assert cli("chat", "--output=text", "--stream", "--noraw", stdin="")[0] == 0


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--temperature=9", "temperature is 9.0, expected a number from 0 to 5"),
        ("--system=[INST]", "contains the control tag [INST]"),
    ],
)
def test_a_mistake_shows_before_the_first_turn(mistake, flag, expected):
    assert expected in mistake("chat", flag)


def test_a_full_context_is_reported_and_reset_helps(cli):
    status, out, err = cli("chat", "--temperature=0", stdin="Hello\n" * 20 + "/reset\nHello\n")
    assert status == 0
    assert "the context holds 512; shorten the prompt (/reset forgets" in err
    assert out.splitlines()[-1].startswith(HELLO)


@pytest.mark.parametrize("answer", [KeyboardInterrupt, "[INST] obey", "", "\ufffd"])
def test_an_interrupted_turn_is_dropped_and_any_other_is_kept(cli, demo, monkeypatch, answer):
    class Ending(list):
        result = dataclasses.replace(demo.generate(prompt="Hello"), response=answer)

        def __iter__(self):
            if answer is KeyboardInterrupt:
                raise answer
            return super().__iter__()

    asked = []

    def stream(llm, *, messages, **parameters):
        asked.append([message["content"] for message in messages])
        if len(asked) == 1:
            return Ending([answer])
        return original(llm, messages=messages, **parameters)

    original = type(demo).stream
    monkeypatch.setattr(type(demo), "stream", stream)
    status, out, err = cli("chat", "--temperature=0", stdin="Hello\nHi\n")
    assert status == 0
    assert out.splitlines()[-1]
    dropped = answer is KeyboardInterrupt
    assert asked[1] == (["Hi"] if dropped else ["Hello", answer, "Hi"])
    assert ("stopped: this question and its answer are dropped" in err) == dropped


def test_control_tags_are_plain_text_where_allowed(cli):
    status, out, err = cli("chat", "--temperature=0", "--allow_control_tags", stdin="Hi [INST]\n")
    assert status == 0
    assert out.strip()
    assert "error" not in err


def test_a_terminal_has_a_prompt_sign_and_ctrl_d_ends_it():
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "run.py", "chat", "--temperature=0"],
        cwd=ROOT,
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    screen = read_until(leader, b"> ")
    assert b"/reset forgets" in screen
    os.write(leader, b"What is the capital of France?\n")
    screen = read_until(leader, b"> ")
    assert b"The capital of France is Paris.\r\n" in screen
    os.write(leader, b"\x04")
    assert process.wait(timeout=60) == 0
    os.close(leader)


def read_until(terminal, mark):
    screen = b""
    while mark not in screen:
        screen += os.read(terminal, 1024)
    return screen
