"""Prompts, dialogs and whole requests, from flags, files and stdin."""

import json
import os
import re

import pytest

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


def test_control_pieces_in_a_raw_prompt_are_parsed_on_request_and_named_otherwise(cli):
    prompt = ["--raw", "--prompt=<s>[INST] Hi [/INST]", "--print_prompt_tokens"]
    status, plain, err = cli(*prompt)
    assert status == 0
    assert err.startswith("warning: the prompt contains <s>, which is plain text here") or (
        "\nwarning: the prompt contains <s>, which is plain text here" in err
    )
    assert "warning: the prompt contains </s>" in cli("--raw", "--prompt=</s>", "--max_tokens=1")[2]
    parsed = cli(*prompt, "--parse_control")
    assert "warning" not in parsed[2]
    assert parsed[1] == cli("--prompt=Hi", "--print_prompt_tokens")[1] != plain


def test_control_tags_in_a_user_turn_are_plain_text_where_allowed(cli):
    prompt = ["--prompt=What does [INST] mean?", "--print_prompt_tokens"]
    assert "would forge a turn" in cli(*prompt)[2]
    assert cli(*prompt, "--allow_control_tags")[0] == 0


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


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ("Größe 🦙", "Größe 🦙"),
        ("\ufeffHi\r\nyou\r\n", "Hi\nyou"),
        ("Hi\n", "Hi"),
        ("Hi\n\n", "Hi\n"),
        ("-", "-"),
    ],
)
def test_a_prompt_from_a_file_and_from_stdin(
    cli, demo, tmp_path, monkeypatch, content, prompt, raw
):
    """Without a byte order mark and without the last line break."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompt.txt").write_bytes(content.encode())
    expected = demo.generate(prompt=prompt, raw=raw, temperature=0, max_tokens=1).prompt_tokens
    flags = ["--print_prompt_tokens", *["--raw"] * raw]
    for source in ("--prompt_file=~/prompt.txt", "--prompt_file=-", "--prompt=-"):
        status, out, _ = cli(source, *flags, stdin=content)
        assert (status, out) == (0, ",".join(map(str, expected)) + "\n")


def test_files_of_json_may_be_in_the_home_folder(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.json").write_text(json.dumps({"prompt": QUESTION, "temperature": 0}))
    (tmp_path / "b.json").write_text(json.dumps([{"role": "user", "content": QUESTION}]))
    assert cli("--request=~/a.json")[1] == PARIS_ANSWER
    assert cli("--messages=~/b.json", "--temperature=0")[1] == PARIS_ANSWER


def test_a_card_request_may_have_the_parameters_of_this_project(cli):
    body = {"prompt": QUESTION, "temperature": 0, "seed": 2**63, "stop": ["Paris"], "logprobs": 1}
    status, out, err = cli("--request=-", "--output=json", stdin=json.dumps(body))
    result = json.loads(out)
    assert (status, result["response"]) == (0, "The capital of France is ")
    assert (result["seed"], result["finish_reason"]) == (2**63, "stop")
    assert len(result["logprobs"]) == len(result["tokens"])
    assert "warning" not in err


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
    ("arguments", "stdin", "expected"),
    [
        ([], "", "no prompt given, expected --prompt=TEXT, "),
        ([], "", "or talk to the model with the verb chat; see --help"),
        (["--prompt=a", "--messages=-"], "[]", "prompt, messages are given together"),
        (["--prompt=a", "--raw", "--system=s"], "", "system is given with raw"),
        (["--prompt=a", "--parse_control"], "", "parse_control is given without raw"),
        (["--prompt=a", "--request=-"], "", "--prompt is given with --request, which holds the"),
        (["--seed=1", "--request=-"], "", "--seed is given with --request, which holds the whole"),
        (["--request=-"], '{"prompt": "a", "top_k": 0}', "'/top_k' must be >= 1"),
        (["--request=-"], '{"prompt": "a", "stop": 3}', "stop is 3, expected a string, or a list"),
        (["--prompt=a", "--prompt_file=-"], "", "--prompt and --prompt_file are given together"),
        (["--prompt_file=-", "--request=-"], "", "--prompt_file is given with --request, which"),
        (["--prompt_file=-", "--prompt_tokens=1"], "x", "prompt, prompt_tokens are given together"),
        (["--prompt_file=none.txt"], "", "--prompt_file=none.txt: No such file or directory; name"),
        (["--prompt_file=."], "", "--prompt_file=.: Is a directory; name a file, or - for stdin"),
        (["--prompt_file=~no-one/x"], "", "--prompt_file=~no-one/x: no such user; name another"),
        (["--prompt=-"], "", "--prompt=- is empty, expected a prompt of at least 1 character"),
        (["--prompt_file=-"], "\n", "--prompt_file=- is empty"),
        (["--prompt=-"], "a\udcff", "--prompt=-: not UTF-8 (byte 1 is 0xff); save it as UTF-8"),
        (["--request=-"], '{"prompt": NaN}', "--request=-: not JSON (NaN is not a number"),
        (["--messages=none.json"], "", "--messages=none.json: No such file or directory; name a"),
        (["--messages=-"], "<html>", "--messages=-: not JSON"),
        (["--messages=-"], "null", "--messages=- holds None, expected a list of messages"),
        (["--messages=-"], "[]", "messages is empty, expected at least one user message"),
        (["--messages=-"], '[{"role": "user", "content": null}]', "messages[0] has the content No"),
        (["--prompt=a", "--min_p=2"], "", "min_p is 2.0, expected a number from 0 to 1"),
        (["--prompt=a", "--logit_bias=5"], "", "--logit_bias has '5', expected a token id and its"),
        (["--prompt=a", "--logit_bias=5:x"], "", "--logit_bias has '5:x', expected a token id and"),
        (["--prompt=a", "--logit_bias=x:5"], "", "logit_bias has the key 'x', expected a token id"),
        (["--prompt=a", "--logit_bias=5:1,5:2"], "", "--logit_bias has 5 more than once, expected"),
        (["--prompt=a", "--logit_bias=5:nan"], "", "logit_bias[5] is nan, expected a finite numb"),
        (["--prompt=a", "--logit_bias=5:101"], "", "logit_bias[5] is 101.0, expected a number fr"),
        (["--prompt=a", "--logit_bias=5000:1"], "", "logit_bias has the token id 5000, expected i"),
        (["--prompt=a", "--allowed_tokens="], "", "allowed_tokens is [], expected a list of at l"),
        (["--prompt=a", "--allowed_tokens=x"], "", "--allowed_tokens has 'x', expected integers"),
        (["--prompt=a", "--allowed_tokens=-1"], "", "allowed_tokens[0] is -1, expected a token id"),
        (["--prompt=a", "--allowed_tokens=5000"], "", "has the token id 5000, expected ids from 0"),
        (["--request=-"], '{"prompt": "a", "logit_bias": {"a": 1}}', "logit_bias has the key 'a'"),
        (["--prompt_tokens=1,x"], "", "--prompt_tokens has 'x', expected integers such as 1,15043"),
        (
            ["--prompt_tokens=--5"],
            "",
            "--prompt_tokens has '--5', expected integers such as 1,1504",
        ),
        (["--prompt_tokens=5000"], "", "prompt_tokens[0] is 5000, expected a token id from 0 to"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(mistake, arguments, stdin, expected):
    assert expected in mistake(*arguments, stdin=stdin)


@pytest.mark.parametrize("flag", ["--prompt_file", "--request", "--messages"])
def test_a_prompt_without_end_is_refused(mistake, flag):
    name = f"{flag}=/dev/zero"
    assert mistake(name) == f"error: {name} has more than 67,108,864 bytes; shorten it"
