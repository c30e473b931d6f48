"""Prompts, dialogs and whole requests, from flags, files and stdin."""

import json
import os
import re

import pytest

from tests.helpers import ROOT
from tests.helpers.commands import PARIS, PARIS_ANSWER, run_py

QUESTION = "What is the capital of France?"


def test_system_raw_and_prompt_tokens(cli):
    paris = [PARIS, "--temperature=0"]
    assert cli(*paris, "--system=Answer in one word.")[1] == "Paris.\n"
    ids = json.loads(cli(*paris, "--output=json")[1])["prompt_tokens"]
    tokens = "--prompt_tokens=" + ",".join(map(str, ids))
    assert cli(tokens, "--temperature=0")[1] == PARIS_ANSWER
    raw = ["--raw", f"--prompt=[INST] {QUESTION} [/INST]", "--temperature=0"]
    assert cli(*raw)[1] == PARIS_ANSWER


def test_messages_from_a_file_and_from_stdin(cli, tmp_path):
    messages = json.dumps(
        [
            {"role": "user", "content": "What is the capital of Italy?"},
            {"role": "assistant", "content": "The capital of Italy is Rome."},
            {"role": "user", "content": "And of Spain?"},
        ]
    )
    (tmp_path / "messages.json").write_text(messages)
    expected = "The capital of Spain is Madrid.\n"
    assert cli(f"--messages={tmp_path / 'messages.json'}", "--temperature=0")[1] == expected
    assert cli("--messages=-", "--temperature=0", stdin=messages)[1] == expected


def test_a_card_request_from_a_file_and_from_stdin_names_the_fields_it_ignores(cli, tmp_path):
    question = {"prompt": QUESTION, "temperature": 0}
    (tmp_path / "request.json").write_text(json.dumps(question))
    assert cli(f"--request={tmp_path / 'request.json'}")[1] == PARIS_ANSWER
    messages = [{"role": "user", "content": QUESTION, "name": "me"}]
    body = {"messages": messages, "temperature": 0, "lora": "x", "tools": None}
    status, out, err = cli("--request=-", stdin=json.dumps(body))
    assert (status, out) == (0, PARIS_ANSWER)
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1] for line in warnings] == ["lora", "messages[0].name"]


def test_stdin_is_utf_8_whatever_the_terminal_s_encoding(demo):
    """With a byte order mark too, which some shells write."""
    body = {"prompt": "Größe 🦙", "temperature": 0, "max_tokens": 1}
    done = run_py(
        *("--request=-", "--print_prompt_tokens"),
        input=b"\xef\xbb\xbf" + json.dumps(body, ensure_ascii=False).encode(),
        text=False,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )
    ids = [int(token) for token in done.stdout.split(b",")]
    assert ids == demo.generate(**body).prompt_tokens


@pytest.mark.parametrize(
    ("arguments", "stdin", "expected"),
    [
        ([PARIS], "", r"seed (\d+) \(drawn; --seed=\1 repeats this\)"),
        ([PARIS, "--seed=3"], "", "seed 3"),
        (["--request=-"], '{"prompt": "Hi"}', r'seed (\d+) \(drawn; "seed": \1 repeats this\)'),
        (["--request=-"], '{"prompt": "Hi", "seed": 3}', "seed 3"),
        (["chat"], "Hi", r"seed (\d+) \(drawn; /seed \1 repeats this\)"),
        (["chat", "--seed=3"], "Hi", "seed 3"),
    ],
)
def test_a_drawn_seed_is_reported_with_how_to_repeat_it(cli, arguments, stdin, expected):
    limit = [] if "--request=-" in arguments else ["--max_tokens=1"]
    line = cli(*arguments, *limit, stdin=stdin)[2].splitlines()[-1]
    assert re.fullmatch(expected, line.split(" | ")[-1])


@pytest.mark.parametrize(
    ("flags", "whole"), [([], False), (["--nostream"], True), (["--output=json"], True)]
)
def test_a_request_to_stream_that_is_not_met_is_named(cli, flags, whole):
    body = {"prompt": "Hi", "temperature": 0, "max_tokens": 2, "stream": True}
    status, _, err = cli("--request=-", *flags, stdin=json.dumps(body))
    assert status == 0
    assert ("warning: stream is true in the request" in err) == whole


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"prompt": "a", "temperature": 9}', "oneOf at '/' not met, 0 matches: '/temperature' "),
        ('{"prompt": "a", "seed": 0}', "'/seed' must be >= 1"),
        ('{"prompt": "a", "max_tokens": NaN}', "--request=-: not JSON (NaN is not a number"),
        ('{"messages": []}', "messages is empty, expected at least one user message"),
    ],
)
def test_the_card_s_check_applies_to_a_request(mistake, body, expected):
    assert expected in mistake("--request=-", stdin=body)


@pytest.mark.parametrize(
    ("stdin", "expected"),
    [
        ("<html>", "--messages=-: not JSON"),
        ('{"role": "user"}', "--messages=- holds {'role': 'user'}, expected a list of messages"),
        ("null", "--messages=- holds None, expected a list of messages"),
        ("[]", "messages is empty, expected at least one user message"),
        ("[" * 100_000, "--messages=-: not JSON"),
        ('[{"role": "user"}]', "messages[0] is {'role': 'user'}, expected an object with role"),
        ('[{"role": "assistant", "content": "a"}]', "messages[0] has the role assistant, expected"),
        ('[{"role": "user", "content": null}]', "messages[0] has the content None, expected a str"),
    ],
)
def test_messages_that_are_no_dialog_are_refused(mistake, stdin, expected):
    assert expected in mistake("--messages=-", stdin=stdin)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no prompt given, expected one of prompt, messages and prompt_tokens"),
        (["--prompt="], "prompt is empty, expected at least 1 character"),
        (["--prompt=[INST] a"], "contains the control tag [INST]"),
        (["--prompt=a", "--messages=-"], "prompt, messages are given together"),
        (["--prompt=a", "--raw", "--system=s"], "system is given with raw"),
        (["--messages=none.json"], "--messages=none.json: No such file or directory; name a JSON"),
        (["--messages=tests"], "--messages=tests: Is a directory; name a JSON file or -"),
        (["--prompt_tokens="], "prompt_tokens is empty, expected at least 1 token id"),
        (["--prompt_tokens=1,x"], "--prompt_tokens has 'x', expected integers such as 1,15043"),
        (["--prompt_tokens=5000"], "prompt_tokens[0] is 5000, expected a token id from 0 to 1023"),
        (["--prompt=a", "--request=-"], "--prompt is given with --request, which holds the whole"),
        (["--seed=1", "--request=-"], "--seed is given with --request, which holds the whole"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_2(mistake, arguments, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert expected in mistake(*arguments)
