"""The verb score; the figures are tested in tests/engine/test_score.py."""

import json

import pytest

FIGURES = {"num_tokens", "num_bytes", "logprob", "nats_per_token", "perplexity", "bits_per_byte"}


@pytest.fixture
def files(tmp_path):
    rows = [
        {"text": "Hello there", "custom_id": "a"},
        {"text": "The capital of France is", "continuation": " Paris.", "metadata": {"k": 1}},
        {"text": [1, 500, 600], "note": 3},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def arguments(files, *more):
    return "score", f"--input={files[0]}", f"--output={files[1]}", *more


def numbers(out):
    """Return the table on stdout, by name."""
    rows = [line.rsplit(maxsplit=1) for line in out.splitlines()]
    return {name: float(value.replace(",", "")) for name, value in rows}


def test_a_text_on_stdout(cli, demo, tmp_path):
    text = "The capital of France\nis Paris."
    (tmp_path / "text").write_text(f"{text}\n")
    expected = demo.score(text, stride=4)
    status, out, err = cli("score", f"--prompt_file={tmp_path / 'text'}", "--stride=4")
    assert status == 0
    assert numbers(out) == {
        "tokens": expected.num_tokens,
        "bytes": len(text),
        "log-likelihood (nats)": pytest.approx(expected.logprob, abs=1e-4),
        "nats per token": pytest.approx(expected.nats_per_token, abs=1e-4),
        "perplexity": pytest.approx(expected.perplexity, abs=1e-4),
        "bits per byte": pytest.approx(expected.bits_per_byte, abs=1e-4),
    }
    assert err.splitlines()[-1].endswith(f"| float32 | {expected.fingerprint}")


def test_a_continuation_in_json(cli, demo):
    expected = demo.score("The capital of France is", " Paris.")
    text = ("--prompt=-", "--continuation= Paris.", "--output=json")
    status, out, _ = cli("score", *text, "--token_logprobs", stdin="The capital of France is\n")
    row = json.loads(out)
    assert status == 0
    assert row.keys() == FIGURES | {
        *("tokens", "token_logprobs", "is_greedy", "fingerprint", "quantization", "warnings")
    }
    for name, value in row.items():
        assert value == getattr(expected, name)
    status, out, err = cli("score", "--prompt=<s>a", "--output=json")
    assert (status, "tokens" in json.loads(out)) == (0, False)
    assert "warning: the prompt contains <s>, which is plain text here" in err


def test_a_file_of_texts(files, cli, demo):
    status, out, err = cli(*arguments(files))
    assert status == 0
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    expected = [
        demo.score("Hello there"),
        demo.score("The capital of France is", " Paris."),
        demo.score([1, 500, 600]),
    ]
    for row, score in zip(rows, expected, strict=True):
        assert {name: row["result"][name] for name in FIGURES} == {
            name: getattr(score, name) for name in FIGURES
        }
    assert (rows[0]["custom_id"], rows[1]["metadata"]) == ("a", {"k": 1})
    assert rows[2]["ignored"] == ["note"]
    assert "fields without effect were ignored, in so many lines: note (1)" in err
    table = numbers(out)
    assert table["texts"] == 3
    assert table["greedy texts"] == sum(score.is_greedy for score in expected)
    tokens, logprob = sum(s.num_tokens for s in expected), sum(s.logprob for s in expected)
    assert table["nats per token"] == pytest.approx(-logprob / tokens, abs=1e-4)
    written = files[1].read_bytes()
    status, again, err = cli(*arguments(files))
    assert (status, again, files[1].read_bytes()) == (0, out, written)
    assert "has 3 of 3 results already; resuming" in err


def test_lines_that_cannot_be_scored_have_an_error(files, cli):
    lines = ['{"txt": 1}', '{"text": "a", "continuation": [1]}', "[]", '{"text": ""}']
    lines += ['{"text": "a", "parse_control": 1}', '{"text": "<s>ab", "parse_control": true}']
    files[0].write_text("\n".join(lines))
    status, out, err = cli(*arguments(files, "--token_logprobs"))
    assert status == 2
    assert err.splitlines()[-1].startswith(f"error: 5 of 6 texts have an `error` in {files[1]};")
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    problems = [
        "the line is {'txt': 1}, expected an object with `text`",
        "text and continuation are of two kinds, expected two texts or two lists",
        "the line is [], expected an object with `text`",
        "the text is empty, expected at least 1 character or token id",
        "parse_control is 1, expected true or false",
    ]
    assert [row.get("error") for row in rows] == [*problems, None]
    assert rows[-1]["result"]["num_tokens"] == len(rows[-1]["result"]["tokens"]) == 1
    assert numbers(out)["texts"] == 1


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([], "score has no text, expected one of --prompt, --prompt_file, --prompt_tokens and"),
        (["--prompt=a", "--prompt_tokens=1,2"], "score has --prompt and --prompt_tokens, expected"),
        (["--prompt=a", "--token_logprobs"], "--token_logprobs is given without --output=json"),
        (["--prompt=a", "--output=x.jsonl"], "--output is 'x.jsonl', expected text or json"),
        (["--prompt=a", "--stride=0"], "stride is 0, expected an integer from 1 to 512"),
        (
            ["--prompt=a", "--seed=1"],
            "--seed is given with score, which generates nothing; drop it",
        ),
        (["--prompt=a", "--eos_tokens=2"], "--eos_tokens is given with score, which generates"),
        (
            ["--prompt_tokens=1,2", "--continuation=a"],
            "--continuation is given with --prompt_tokens",
        ),
        (["--input=a"], "score needs --output with --input: the file of results; name one"),
        (["--input=a", "--prompt=b"], "--prompt is given with --input, whose lines have the texts"),
    ],
)
def test_mistakes_are_one_line(mistake, given, problem):
    assert problem in mistake("score", *given)


def test_results_of_the_verb_batch_are_not_summed(files, cli):
    """Of the same lines, so that their beginnings are right."""
    files[0].write_text(json.dumps({"text": "Hi", "prompt": "Hi", "max_tokens": 1}))
    assert cli("batch", f"--input={files[0]}", f"--output={files[1]}")[0] == 0
    kept = files[1].read_bytes()
    status, out, err = cli(*arguments(files))
    assert (status, out) == (2, "")
    line = err.splitlines()[-1]
    assert line == f"error: {files[1]} has results that are no scores of texts; name a new file"
    assert files[1].read_bytes() == kept
