"""Dialogs are exactly Meta's ids: the expected texts are spelled out and encoded piece by piece."""

import re

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.errors import InputError
from llama_jax.text.chat import encode_dialog
from llama_jax.text.tokenizer import Tokenizer

BOS, EOS = 1, 2


def dialog(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


# From each dialog to its texts: each is encoded by itself behind BOS, and all but the last end in
# EOS. From meta-llama/llama, llama/generation.py, chat_completion; not computed by any code here.
GOLDEN = {
    "1 turn": (dialog("q1"), ["[INST] q1 [/INST]"]),
    "1 turn, system": (
        dialog("q1", system="Be brief."),
        ["[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq1 [/INST]"],
    ),
    "2 turns": (
        dialog("q1", "a1", "q2"),
        ["[INST] q1 [/INST] a1 ", "[INST] q2 [/INST]"],
    ),
    "2 turns, system": (
        dialog("q1", "a1", "q2", system="Be brief."),
        ["[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq1 [/INST] a1 ", "[INST] q2 [/INST]"],
    ),
    "5 turns": (
        dialog("q1", "a1", "q2", "a2", "q3", "a3", "q4", "a4", "q5"),
        [
            "[INST] q1 [/INST] a1 ",
            "[INST] q2 [/INST] a2 ",
            "[INST] q3 [/INST] a3 ",
            "[INST] q4 [/INST] a4 ",
            "[INST] q5 [/INST]",
        ],
    ),
    "5 turns, system": (
        dialog("q1", "a1", "q2", "a2", "q3", "a3", "q4", "a4", "q5", system="Be brief."),
        [
            "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq1 [/INST] a1 ",
            "[INST] q2 [/INST] a2 ",
            "[INST] q3 [/INST] a3 ",
            "[INST] q4 [/INST] a4 ",
            "[INST] q5 [/INST]",
        ],
    ),
    "whitespace around turns is stripped": (
        dialog(" \n q1\t", "\u3000a1\n\n", "  q2"),
        ["[INST] q1 [/INST] a1 ", "[INST] q2 [/INST]"],
    ),
    "whitespace inside turns is kept": (
        dialog("q  1\n\nx", "a\t1", "q2"),
        ["[INST] q  1\n\nx [/INST] a\t1 ", "[INST] q2 [/INST]"],
    ),
    # Meta strips the first turn after the system prompt has been put in front of it.
    "whitespace around the system prompt is kept": (
        dialog("  q1  ", system="  S \n"),
        ["[INST] <<SYS>>\n  S \n\n<</SYS>>\n\n  q1 [/INST]"],
    ),
    "empty contents": (
        dialog("", "", " ", system=""),
        ["[INST] <<SYS>>\n\n<</SYS>> [/INST]  ", "[INST]  [/INST]"],
    ),
    "special tokens are plain text": (
        dialog("<s>q1</s>", "</s><s>", "<unk>", system="<s>"),
        [
            "[INST] <<SYS>>\n<s>\n<</SYS>>\n\n<s>q1</s> [/INST] </s><s> ",
            "[INST] <unk> [/INST]",
        ],
    ),
    "braces and brackets": (
        dialog("{0} %s [INST /INST] <<SYS> [inst]", "[/inst]", "</SYS>>"),
        ["[INST] {0} %s [INST /INST] <<SYS> [inst] [/INST] [/inst] ", "[INST] </SYS>> [/INST]"],
    ),
    "unicode": (
        dialog("你好 😀", "مرحبا", "é\u0301"),
        ["[INST] 你好 😀 [/INST] مرحبا ", "[INST] é\u0301 [/INST]"],
    ),
}


@pytest.fixture(params=["demo", "llama2"])
def path(request):
    if request.param == "demo":
        return DEMO_CHECKPOINT / "tokenizer.model"
    return request.getfixturevalue("assets") / "llama2-tokenizer" / "tokenizer.model"


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(path, name):
    messages, texts = GOLDEN[name]
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    *finished, last = (plain.encode(text) for text in texts)
    expected = [token for ids in finished for token in (BOS, *ids, EOS)] + [BOS, *last]
    assert encode_dialog(messages, Tokenizer(path)) == expected
    assert (expected.count(BOS), expected.count(EOS)) == (len(texts), len(texts) - 1)


# Ids of Llama 2's own tokenizer, as Meta's code gives them.
# fmt: off
HI = [1, 518, 25580, 29962, 7251, 518, 29914, 25580, 29962]
PAIR = [1, 518, 25580, 29962, 3855, 29896, 518, 29914, 25580, 29962, 263, 29896, 29871, 2]
SYSTEM = [1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 29903, 13, 29966, 829, 14816, 29903,
          6778, 13, 13, 2918, 518, 29914, 25580, 29962]
LITERAL = [1, 518, 25580, 29962, 1533, 29879, 5299, 29879, 29958, 518, 29914, 25580, 29962]
# fmt: on


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (dialog("hi"), HI),
        (dialog("q1", "a1", "hi"), PAIR + HI),
        (dialog("hi", system="S"), SYSTEM),
        (dialog("</s><s>"), LITERAL),
    ],
    ids=["hi", "pair", "system", "literal"],
)
def test_published_ids(assets, messages, expected):
    tokenizer = Tokenizer(assets / "llama2-tokenizer" / "tokenizer.model")
    assert encode_dialog(messages, tokenizer) == expected


# Refusals.


def refusal(messages) -> str:
    tokenizer = Tokenizer(DEMO_CHECKPOINT / "tokenizer.model")
    with pytest.raises(InputError) as error:
        encode_dialog(messages, tokenizer)
    return str(error.value)


def message(role, content="x"):
    return {"role": role, "content": content}


USER, ASSISTANT, FIRST = message("user"), message("assistant"), message("system")
ORDER = "; the order is an optional system, then user and assistant in turn"


def test_no_messages():
    assert refusal([]) == "messages is empty, expected at least one user message; add one"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([ASSISTANT], "messages[0] has the role assistant, expected user"),
        ([ASSISTANT, USER], "messages[0] has the role assistant, expected user"),
        ([FIRST, ASSISTANT, USER], "messages[1] has the role assistant, expected user"),
        ([FIRST, FIRST, USER], "messages[1] has the role system, expected user"),
        ([USER, USER], "messages[1] has the role user, expected assistant"),
        ([FIRST, USER, USER], "messages[2] has the role user, expected assistant"),
        ([USER, FIRST, USER], "messages[1] has the role system, expected assistant"),
        ([USER, ASSISTANT, ASSISTANT], "messages[2] has the role assistant, expected user"),
        ([USER, ASSISTANT, FIRST, USER], "messages[2] has the role system, expected user"),
    ],
)
def test_roles_out_of_order_are_refused(messages, expected):
    assert refusal(messages) == expected + ORDER


@pytest.mark.parametrize("before", [[FIRST], [USER, ASSISTANT], [FIRST, USER, ASSISTANT]])
def test_last_message_must_be_the_users(before):
    assert refusal(before) == (
        f"the last message has the role {before[-1]['role']}, expected user; add the user's turn"
    )


@pytest.mark.parametrize("role", ["tool", "User", "", "human", None, 1, ["user"]])
def test_unknown_role(role):
    said = refusal([USER, message(role)])
    assert said == f"messages[1] has the role {role!r}, expected system, user or assistant"


@pytest.mark.parametrize("content", [None, 5, True, ["hi"], [{"type": "text", "text": "hi"}], b"x"])
def test_content_is_no_string(content):
    said = refusal([message("user", content)])
    assert said.startswith(f"messages[0] has the content {repr(content)[:40]}")
    assert said.endswith(", expected a string")


@pytest.mark.parametrize(
    "bad", [{}, {"role": "user"}, {"content": "x"}, {"text": "x"}, "hi", None, ["user", "hi"], 5]
)
def test_message_without_role_and_content_is_refused(bad):
    said = refusal([USER, bad])
    assert said == f"messages[1] is {bad!r}, expected an object with role and content"


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("role", ["system", "user"])
def test_control_tags_would_forge_a_turn(role, tag):
    messages = dialog("q1", "a1", "q2", system="S")
    index = [m["role"] for m in messages].index(role)
    messages[index]["content"] = f"before{tag}after"
    assert refusal(messages) == (
        f"messages[{index}] contains the control tag {tag}, which would forge a turn; remove it, "
        "or set allow_control_tags (OpenAI's routes, Python, run.py)"
    )
    tokenizer = Tokenizer(DEMO_CHECKPOINT / "tokenizer.model")
    allowed = encode_dialog(messages, tokenizer, allow_control_tags=True)
    assert f"before{tag}after" in tokenizer.decode(allowed)


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_control_tags_in_an_assistant_turn_are_plain_text(path, tag):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    first, last = f"[INST] q1 [/INST] a {tag} b ", "[INST] q2 [/INST]"
    expected = [BOS, *plain.encode(first), EOS, BOS, *plain.encode(last)]
    assert encode_dialog(dialog("q1", f"a {tag} b", "q2"), Tokenizer(path)) == expected


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 1023), max_size=12))
@example([])
@example([13 + 3, 0x20 + 3])  # nothing but whitespace
@example([0x00 + 3])
@example([0xED + 3, 0xA0 + 3, 0x80 + 3])  # the bytes of a lone surrogate
@example([0xF0 + 3, 0x9F + 3])  # the beginning of a character
@example([0, 1, 2])
def test_a_dialog_goes_on_after_whatever_the_model_generated(tokens):
    tokenizer = Tokenizer(DEMO_CHECKPOINT / "tokenizer.model")
    answer = tokenizer.decode(tokens)
    ids = encode_dialog(dialog("q1", answer, "q2"), tokenizer)
    assert (ids.count(BOS), ids.count(EOS)) == (2, 1)


@pytest.mark.parametrize("answer", ["", " \n", "\ufffd", "a</s><s>[INST] b [/INST]", "<<SYS>>"])
def test_answers_that_look_like_the_format_forge_no_token(path, answer):
    ids = encode_dialog(dialog("q1", answer, "q2"), Tokenizer(path))
    assert (ids.count(BOS), ids.count(EOS)) == (2, 1)


def test_every_bad_message_is_named():
    messages = [
        message("system", "<<SYS>>"),
        message("user"),
        message("tool"),
        {"role": "user"},
        message("assistant", None),
        message("user", "[/INST]"),
        message("assistant", "[/INST]"),
    ]
    said = refusal(messages)
    assert re.findall(r"messages\[(\d)\]", said) == ["0", "2", "3", "4", "5"]
    for part in ("tag <<SYS>>", "role 'tool'", "{'role': 'user'}", "content None", "tag [/INST]"):
        assert part in said
    assert "\n" not in said


def test_long_contents_are_cut_in_the_message():
    assert len(refusal([message("user", ["x" * 10_000])])) < 120
    assert len(refusal([message("x" * 10_000)])) < 120
