"""Tokenizers as people have them: tokenizer.json alone, and tokens added by a fine-tune."""

import dataclasses
import json
import random
import shutil

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from convert import vocabulary
from convert.__main__ import main
from convert.vocabulary import read_vocabulary
from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.engine.request import make_request
from llama_jax.errors import InputError
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer
from tests.helpers.sources import GQA, random_weights, write_hf

DEMO = DEMO_CHECKPOINT / "tokenizer.model"
PIECES = 1024


def fast_tokenizer(path):
    """Return the tokenizer.json of a tokenizer.model, as transformers 4 made those of Llama 2."""
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    by_score = sorted(vocab, key=lambda piece: -model.pieces[vocab[piece]].score)
    merges = [
        f"{piece[:i]} {piece[i:]}"
        for piece in by_score
        if vocab[piece] > 2
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    special = [{"id": vocab[text], "content": text, "special": True} for text in ("<s>", "</s>")]
    return {
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": merges},
    }


def write(path, values):
    path.write_text(json.dumps(values))
    return path


def texts(count):
    rng = random.Random(0)
    letters = "abcdeilnorstu ABC 0123456789 .,!?\n\t▁äöüß日本語😀  "
    words = ["the ", "  ", "llama", "Once upon a time", " Paris", "https://", "<s>", "   x"]
    for _ in range(count):
        parts = [rng.choice(words) for _ in range(rng.randrange(6))]
        parts += [rng.choice(letters) for _ in range(rng.randrange(20))]
        rng.shuffle(parts)
        yield "".join(parts)


@pytest.fixture(params=["demo", "llama2"])
def model_file(request):
    if request.param == "demo":
        return DEMO
    return request.getfixturevalue("assets") / "llama2-tokenizer" / "tokenizer.model"


@pytest.mark.parametrize("merges", ["text", "pairs"])
def test_tokenizer_json_gives_the_same_ids_as_the_model_it_was_made_from(
    tmp_path, model_file, merges
):
    values = fast_tokenizer(model_file)
    if merges == "pairs":  # as tokenizers writes since 0.20
        model = values["model"]
        model["merges"] = [merge.split(" ") for merge in model["merges"]]
    expected = Tokenizer(model_file)
    found = read_vocabulary(write(tmp_path / "tokenizer.json", values), expected.vocab_size)
    got = Tokenizer(found.model)
    assert got.vocab_size == expected.vocab_size
    for text in texts(3000):
        ids = expected.encode(text)
        assert got.encode(text) == ids, text
        assert got.decode(ids) == expected.decode(ids), text


def test_tokenizer_model_alone_is_taken_byte_for_byte():
    assert read_vocabulary(DEMO, PIECES).model == DEMO.read_bytes()


def change(values, name):
    model = values["model"]
    if name == "type":
        model["type"] = "Unigram"
    elif name == "bytes":
        model["byte_fallback"] = False
    elif name == "normalizer":
        values["normalizer"], values["pre_tokenizer"] = None, {"type": "ByteLevel"}
    elif name == "merge left out":
        model["merges"].pop()
    elif name == "gap in the ids":
        model["vocab"]["▁new"] = 5000
    elif name == "no special ids":
        vocab = model["vocab"]
        vocab["<bos>"] = vocab.pop("<s>")
    elif name == "empty":
        values.clear()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("type", "not BPE"),
        ("bytes", "not BPE with byte fallback"),
        ("normalizer", "does not replace spaces"),
        ("merge left out", "merges are not all"),
        ("gap in the ids", "not consecutive"),
        ("no special ids", "BOS|not a SentencePiece"),
        ("empty", "not BPE"),
    ],
)
def test_another_tokenizer_json_is_refused_with_the_reason(tmp_path, name, reason):
    values = fast_tokenizer(DEMO)
    change(values, name)
    path = write(tmp_path / "tokenizer.json", values)
    with pytest.raises(InputError, match=f"no Llama 2 tokenizer: .*({reason}).*--tokenizer=none"):
        read_vocabulary(path, PIECES)


# Added tokens.

ADDED = {"<pad>": PIECES, "<|im_end|>": PIECES + 1, "llamas!": PIECES + 3}


@pytest.fixture
def folder(tmp_path):
    shutil.copy(DEMO, tmp_path / "tokenizer.model")
    write(tmp_path / "added_tokens.json", ADDED)
    write(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})
    return tmp_path


def test_added_tokens_become_pieces(folder):
    found = read_vocabulary(folder / "tokenizer.model", PIECES + 8, pad_token=PIECES)
    assert found.added == {token: text for text, token in ADDED.items()}
    tokenizer = Tokenizer(found.model)
    assert tokenizer.vocab_size == PIECES + 4
    assert tokenizer.piece(PIECES) == "<pad>"
    control = [PIECES, PIECES + 1, PIECES + 2]
    assert [token for token in range(PIECES, PIECES + 4) if tokenizer.is_control(token)] == control
    # A special token is never read out of a text; another one is, and keeps its text.
    assert not {PIECES, PIECES + 1} & {*tokenizer.encode("a <pad> and <|im_end|>")}
    ids = tokenizer.encode("two llamas! and more")
    assert PIECES + 3 in ids
    assert tokenizer.decode([*ids, *control]) == "two llamas! and more"
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in [*ids, *control]]
    assert "".join([*pieces, decoder.finish()]) == "two llamas! and more"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {str(PIECES): {"content": "<pad>"}}}),
        ("tokenizer.json", {"added_tokens": [{"id": PIECES, "content": "<pad>"}]}),
        ("added_tokens.json", {"<pad>": PIECES}),
    ],
)
@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_are_found_in_each_file_that_names_them(tmp_path, file, content, special):
    shutil.copy(DEMO, tmp_path / "tokenizer.model")
    entry = content.get("added_tokens_decoder", {}).get(str(PIECES))
    entry = entry or content.get("added_tokens", [None])[0]
    if special and entry:
        entry["special"] = True
    write(tmp_path / file, content)
    pad = PIECES if special and not entry else None
    tokenizer = Tokenizer(read_vocabulary(tmp_path / "tokenizer.model", PIECES + 1, pad).model)
    assert tokenizer.decode([PIECES]) == ("" if special else "<pad>")


def test_added_control_tokens_are_parsed_longest_first_where_control_is_parsed(folder):
    tokenizer = Tokenizer(read_vocabulary(folder / "tokenizer.model", PIECES + 4, PIECES).model)
    # Neither a piece of text nor the name that stands for an id without one.
    assert tokenizer.control_pieces == {
        "<s>": 1,
        "</s>": 2,
        "<pad>": PIECES,
        "<|im_end|>": PIECES + 1,
    }
    plain = make_request(prompt="a<|im_end|>b", raw=True)
    assert PIECES + 1 not in plain.encode(tokenizer, tokenizer.vocab_size)
    [warning] = plain.warnings(tokenizer)
    assert warning.startswith("the prompt contains <|im_end|>, which is plain text here")
    parsed = dataclasses.replace(plain, parse_control=True)
    encoded = [1, *tokenizer.encode("a"), PIECES + 1, *tokenizer.encode("b")]
    assert parsed.encode(tokenizer, tokenizer.vocab_size) == encoded
    assert parsed.warnings(tokenizer) == []


@pytest.mark.parity
def test_parsed_control_tokens_have_the_ids_of_transformers(tmp_path, model_file):
    from transformers import PreTrainedTokenizerFast

    values = fast_tokenizer(model_file)
    pieces = len(values["model"]["vocab"])
    names = ["<|im_start|>", "<|im_end|>", "<|im_end|><|im", "<|im_end"]  # beginnings of another
    values["added_tokens"] += [
        {"id": pieces + i, "content": name, "special": True} for i, name in enumerate(names)
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"] = [flags | entry for entry in values["added_tokens"]]
    file = write(tmp_path / "tokenizer.json", values | {"version": "1.0"})
    tokenizer = Tokenizer(read_vocabulary(file, pieces + 9).model)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(file))
    chat = "<|im_start|>user\nWhere is Paris?<|im_end|>\n<|im_start|>assistant\n"
    for text in [chat, *mixed([*names, "<s>", "</s>", "<|im", "|>", " ", "\n", "Paris "], 500)]:
        assert tokenizer.encode_with_control(text) == theirs(text).input_ids, text


def mixed(parts, count):
    rng = random.Random(0)
    return ("".join(rng.choices(parts, k=rng.randrange(1, 12))) for _ in range(count))


def test_an_added_token_without_an_embedding_is_left_out_and_named(folder):
    found = read_vocabulary(folder / "tokenizer.model", PIECES)
    assert found.left_out == {token: text for text, token in ADDED.items()}
    assert Tokenizer(found.model).vocab_size == PIECES


@pytest.mark.parametrize(
    ("added", "rows", "reason"),
    [
        ({"<pad>": 300}, PIECES, "the id 300 is .* and '<pad>'"),
        ({"<pad>": "x"}, PIECES, "expected an id and a text"),
        ({"the": PIECES}, PIECES + 1, "empty or another token's"),
        ({"": PIECES}, PIECES + 1, "empty or another token's"),
        ({}, PIECES - 1, "has 1,024 pieces, the model's vocab_size is 1,023"),
        ({}, 32_000, "has 1,024 pieces, the model's vocab_size is 32,000"),
    ],
)
def test_a_contradicting_tokenizer_is_refused(tmp_path, added, rows, reason):
    shutil.copy(DEMO, tmp_path / "tokenizer.model")
    known = next(p for p in ("the", "er", "in") if p in pieces(DEMO))
    write(tmp_path / "added_tokens.json", {known if k == "the" else k: v for k, v in added.items()})
    with pytest.raises(InputError, match=reason):
        read_vocabulary(tmp_path / "tokenizer.model", rows)


def pieces(path):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return {plain.id_to_piece(i) for i in range(plain.get_piece_size())}


# The command line.


@pytest.fixture
def source(tmp_path, tokenizer):
    """A source whose embedding has two rows more than its tokenizer has pieces."""
    rows = Tokenizer(tokenizer).vocab_size + 2
    config = GQA.__class__(**{**vars(GQA), "vocab_size": rows})
    folder = write_hf(tmp_path / "hf", random_weights(config), vocab_size=rows)
    shutil.copy(tokenizer, folder / "tokenizer.model")
    write(folder / "added_tokens.json", {"<pad>": rows - 2})
    return folder


@pytest.mark.slow
def test_rows_without_a_piece_are_never_generated(tmp_path, source, capsys):
    assert main(["hf", str(source), str(tmp_path / "out")]) == 0
    assert "the last 1 ids have no text: they are never generated" in capsys.readouterr().err
    llm = Llama.load(tmp_path / "out")
    last = llm.config.vocab_size - 1
    for seed in range(20):
        result = llm.generate(
            prompt_tokens=[1, last], max_tokens=30, seed=seed, temperature=5.0, ignore_eos=True
        )
        assert last not in result.tokens
        assert result.response is not None


def test_tokenizer_is_added_later(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert main(["hf", str(source), str(out), "--tokenizer=none"]) == 0
    assert "`python -m convert tokenizer` adds one later" in capsys.readouterr().err
    assert Llama.load(out).tokenizer is None
    assert main(["tokenizer", str(out), str(source / "tokenizer.model")]) == 0
    assert main(["verify", str(out)]) == 0
    assert Llama.load(out).generate(prompt="hi", max_tokens=2).response is not None
    assert main(["tokenizer", str(out), str(source / "tokenizer.model")]) == 2
    assert "has a tokenizer already" in capsys.readouterr().err


def test_named_tokenizer_takes_precedence(tmp_path, source, capsys):
    other = tmp_path / "elsewhere"
    other.mkdir()
    write(other / "tokenizer.json", fast_tokenizer(source / "tokenizer.model"))
    out = str(tmp_path / "out")
    assert main(["hf", str(source), out, f"--tokenizer={other / 'tokenizer.json'}"]) == 0
    assert f"tokenizer.json is taken from {other}" in capsys.readouterr().err
    assert vocabulary.FILES[0] in {path.name for path in (tmp_path / "out").iterdir()}
