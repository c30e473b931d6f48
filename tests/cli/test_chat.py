"""A chat: turns, commands, interruptions, a terminal."""

import dataclasses
import json
import re
import stat

import pytest

from llama_jax import Llama
from tests.helpers.terminal import ALT_ENTER, CTRL_C, CTRL_D, READY, UP, Terminal, paste

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
        "/help lists commands",
        "conversation forgotten",
        "seed is 'x', expected an integer from 0 to 2^64 - 1",
        "seed is '²', expected an integer",
        "seed is '99999999999999999999', expected an integer",
        "unknown command '/nonsense'; /help lists them",
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
    assert "error: the context is full: the conversation has " in err
    assert " tokens, of 512; /drop forgets the oldest turns and asks again" in err
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
    assert ("stopped: the conversation is as it was before" in err) == dropped


def test_control_tags_are_plain_text_where_allowed(cli):
    status, out, err = cli("chat", "--temperature=0", "--allow_control_tags", stdin="Hi [INST]\n")
    assert status == 0
    assert out.strip()
    assert "error" not in err


FRANCE, PARIS = "What is the capital of France?", "The capital of France is Paris."


def conversation_of(path):
    return [message["content"] for message in json.loads(path.read_text("utf-8"))]


def test_help_names_every_command(cli):
    err = cli("chat", stdin="/help\n")[2]
    for command in ("help", "retry", "stats", "save", "load", "drop", "reset", "system", "seed"):
        assert re.search(rf"^/{command} ", err, re.MULTILINE), command
    assert "/exit" in err


def test_a_conversation_is_saved_and_continued(cli, tmp_path):
    path = tmp_path / "talk.json"
    talk = ("chat", "--temperature=0")
    asked = f"What is the capital of Italy?\n/save {path}\nAnd of Spain?\n/save {path}\n"
    status, out, err = cli(*talk, "--system=Be kind.", stdin=asked)
    assert status == 0
    rome, madrid = out.splitlines()
    assert f"saved 1 turn; /load {path}" in err
    assert f"saved 2 turns; /load {path}" in err, "its own file may be replaced"
    saved = path.read_text("utf-8")
    question, follow_up = "What is the capital of Italy?", "And of Spain?"
    assert conversation_of(path) == ["Be kind.", question, rome, follow_up, madrid]
    other = tmp_path / "other.json"
    status, _, err = cli(*talk, stdin=f"/load {path}\n/save {other}\n/save {path}\n/load {path}\n")
    assert "loaded 2 turns" in err
    assert f"{path}" in err
    assert path.read_text("utf-8") == other.read_text("utf-8") == saved
    after = cli(*talk, stdin=f"/load {path}\nAnd of France?\n")[1]
    at_once = cli(*talk, "--system=Be kind.", stdin=f"{question}\n{follow_up}\nAnd of France?\n")[1]
    assert after == at_once.splitlines()[-1] + "\n", "the same answer as without a break"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/save", "/save names no file; write /save FILE"),
        ("/save {there}", "exists already; name another file"),
        ("/save {there}/x", "Not a directory; name another file"),
        ("/save ~nobody_here/x", "no such user; name another file"),
        ("/load", "/load names no file"),
        ("/load -", "/load names no file"),
        ("/load {there}.not", "No such file or directory"),
        ("/load {there}", "there: not JSON"),
        ("/load {object}", "got {}, expected a list of messages"),
        ("/load {question}", "role"),
        ("/retry", "there is no answer yet; ask something"),
        ("/stats", "there is no answer yet; ask something"),
        ("/drop", "there is no turn to drop"),
        ("/drop 3", "/drop takes nothing, got '3'; drop it"),
    ],
)
def test_a_command_that_cannot_be_done_changes_nothing(cli, tmp_path, command, expected):
    files = {name: tmp_path / name for name in ("there", "object", "question")}
    files["there"].write_text("hello")
    files["object"].write_text("{}")
    files["question"].write_text('[{"role": "user", "content": "Hi"}]')
    status, out, err = cli("chat", "--temperature=0", stdin=command.format_map(files) + "\nHello\n")
    assert status == 0
    [error] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert expected in error
    assert out.startswith(HELLO)
    assert files["there"].read_text() == "hello"
    assert set(tmp_path.iterdir()) == set(files.values()), "no half-written file"


def test_retry_takes_the_last_answer_back(cli, tmp_path):
    files = [tmp_path / name for name in "abcd"]
    first, second, third, fourth = (f"/save {file}" for file in files)
    lines = ["Tell me a story.", first, "/retry", second, "/seed 3", "/retry", third, "/retry"]
    err = cli("chat", "--temperature=5", stdin="\n".join([*lines, fourth]))[2]
    answers = [conversation_of(file) for file in files]
    assert {question for question, _ in answers} == {"Tell me a story."}
    assert answers[0] != answers[1]
    assert answers[2] == answers[3]
    assert err.count("the seed is 3, so the answer will be the same; /seed N sets another") == 2


def test_a_retry_that_is_stopped_leaves_the_answer_and_can_be_repeated(
    cli, tmp_path, monkeypatch, demo
):
    class Stopped:
        def __iter__(self):
            raise KeyboardInterrupt

    asked = []

    def stream(llm, *, messages, **parameters):
        asked.append([message["content"] for message in messages])
        return Stopped() if len(asked) == 2 else original(llm, messages=messages, **parameters)

    original = type(demo).stream
    monkeypatch.setattr(type(demo), "stream", stream)
    saves = [f"/save {tmp_path / name}" for name in "ab"]
    lines = [FRANCE, "/retry", saves[0], "/retry", saves[1]]
    err = cli("chat", "--temperature=0", stdin="\n".join(lines))[2]
    assert "stopped: the conversation is as it was before; /retry asks again" in err
    assert asked == [[FRANCE]] * 3, "each time in place of the answer, not after it"
    assert conversation_of(tmp_path / "a") == conversation_of(tmp_path / "b") == [FRANCE, PARIS]


def test_drop_makes_room_for_the_question_that_had_none(cli, tmp_path):
    path = tmp_path / "talk.json"
    lines = ["Hello"] * 20 + [FRANCE, "/drop", f"/save {path}", "/drop"]
    status, out, err = cli("chat", "--temperature=0", stdin="\n".join(lines) + "\n")
    assert status == 0
    assert out.splitlines()[-1] == PARIS
    assert err.count("error: the context is full") > 2
    *_, question, answer = conversation_of(path)
    assert (question, answer) == (FRANCE, PARIS)
    dropped, kept = map(int, re.search(r"dropped the oldest (\d+); (\d+) turns left", err).groups())
    assert len(conversation_of(path)) == 2 * (kept + 1)
    assert dropped > 1, "there is room for an answer"
    assert kept > 1, "no more is forgotten than must be"
    assert f"dropped the oldest turn; {kept} turns left" in err


def test_a_question_too_long_for_the_context_costs_no_turn(cli, tmp_path):
    path = tmp_path / "talk.json"
    lines = ["Hello", "word " * 600, "/drop", f"/save {path}"]
    _, _, err = cli("chat", "--temperature=0", stdin="\n".join(lines) + "\n")
    assert conversation_of(path)[0] == "Hello"
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 2


def test_text_without_a_tokenizer_is_refused_before_the_weights(
    mistake, bare_checkpoint, monkeypatch
):
    monkeypatch.setattr(Llama, "load", lambda *_, **__: pytest.fail("the weights were loaded"))
    for verb in (["chat"], ["--prompt=Hi"], ["sweep", "--seeds=1", "--prompt=Hi"]):
        line = mistake(*verb, f"--checkpoint={bare_checkpoint}")
        assert "the checkpoint has no tokenizer.model, so text cannot be encoded" in line


# In a terminal.


@pytest.fixture(scope="module")
def terminal(tmp_path_factory):
    """A chat that tests share: each begins by /reset."""
    cache = tmp_path_factory.mktemp("cache")
    arguments = ("chat", "--temperature=0", "--seed=7")
    with Terminal(*arguments, LLAMA_JAX_CACHE=str(cache)) as terminal:
        assert "/help lists commands" in terminal.read_until(READY)
        terminal.cache = cache
        yield terminal


def asked(terminal, tmp_path, keys):
    """Return what is shown for keys, and the conversation after them."""
    terminal.ask("/reset")
    shown = terminal.ask(keys)
    terminal.ask(f"/save {tmp_path / 'talk.json'}")
    return shown, conversation_of(tmp_path / "talk.json")


def test_an_answer_has_a_short_footer(terminal, tmp_path):
    shown, turns = asked(terminal, tmp_path, FRANCE)
    assert re.search(rf"{re.escape(PARIS)}\n\(\d+ tokens, [\d.,]+/s, seed 7, \d+ of 512\)\n", shown)
    assert "reading" in shown, "a sign of life while the prompt is read"
    assert turns == [FRANCE, PARIS]
    assert "GB/s of weights" in terminal.ask("/stats")


def test_a_paste_is_one_question(terminal, tmp_path):
    text = "Here are\nthree lines,\nand one question."
    assert asked(terminal, tmp_path, paste(text))[1][0] == text


def test_alt_enter_begins_a_line(terminal, tmp_path):
    assert asked(terminal, tmp_path, f"one{ALT_ENTER}two")[1][0] == "one\ntwo"


def test_ctrl_c_clears_what_was_typed_and_no_more(terminal, tmp_path):
    terminal.ask("/reset")
    terminal.ask("What is the capital of Italy?")
    terminal.type(f"half a line{CTRL_C}")
    terminal.read_until(READY)
    assert PARIS in terminal.ask(FRANCE)
    terminal.ask(f"/save {tmp_path / 'talk.json'}")
    assert conversation_of(tmp_path / "talk.json")[2:] == [FRANCE, PARIS]


def test_tab_completes_commands(terminal):
    terminal.type("/he\t")
    terminal.read_until("lp")
    assert "where the time of the last answer went" in terminal.ask("")


def test_what_was_typed_comes_back_in_the_next_chat(terminal):
    terminal.ask(FRANCE)
    file = terminal.cache / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with Terminal("chat", "--temperature=0", LLAMA_JAX_CACHE=str(terminal.cache)) as later:
        later.read_until(READY)
        assert PARIS in later.ask(UP)
        later.type(CTRL_D)
        assert later.end() == 0


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(tmp_path):
    path = tmp_path / "talk.json"
    cold = {"LLAMA_JAX_CACHE": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with Terminal("chat", "--temperature=0", **cold) as terminal:
        terminal.read_until(READY)
        terminal.type(f"{FRANCE}\r")
        terminal.read_until("compiling and reading")  # which takes seconds
        terminal.type(CTRL_C)
        shown = terminal.read_until(READY)
        assert "stopped: the conversation is as it was before" in shown
        assert PARIS not in shown
        terminal.ask(f"/save {path}")
        assert conversation_of(path) == []
        assert PARIS in terminal.ask("/retry")
        terminal.ask(f"/save {path}")
        assert conversation_of(path) == [FRANCE, PARIS]
        terminal.type("/exit\r")
        assert terminal.end() == 0


def test_a_chat_without_a_home_keeps_its_history_in_memory(terminal, tmp_path):
    (tmp_path / "file").write_text("")
    with Terminal("chat", "--temperature=0", LLAMA_JAX_CACHE=str(tmp_path / "file" / "x")) as chat:
        chat.read_until(READY)
        assert PARIS in chat.ask(FRANCE)
        assert PARIS in chat.ask(UP)
        chat.type(CTRL_D)
        assert chat.end() == 0
