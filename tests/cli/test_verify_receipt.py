"""The flag --sign_key, the verb verify_receipt, and replays of signed receipts."""

import json
import os
import re
import sys
import threading

import pytest

from llama_jax import Llama
from llama_jax.demo import DEMO_CHECKPOINT, SELFTEST
from tests.helpers import ROOT, signing
from tests.helpers.commands import PARIS, PARIS_ANSWER, run_py
from tests.helpers.documents import run

SHORT = (PARIS, "--seed=3", "--max_tokens=3")


@pytest.fixture
def ours(tmp_path):
    return signing.Pair(tmp_path, "ours")


@pytest.fixture
def theirs(tmp_path):
    return signing.Pair(tmp_path, "theirs")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "receipts.jsonl"


@pytest.fixture
def findings(cli):
    """Verify a file; return the exit status and what is found of each receipt, in both outputs."""

    def call(path, *flags):
        status, out, err = cli("verify_receipt", str(path), "--output=json", *flags)
        rows = [json.loads(line) for line in out.splitlines()]
        again, text, note = cli("verify_receipt", str(path), *flags)
        assert (again, note) == (status, err)
        names = re.findall(rf"^{re.escape(str(path))}[^:]*: ([A-Z_]+) \|", text, re.MULTILINE)
        assert names == [row["finding"] for row in rows]
        assert len(text.splitlines()) == len(rows)
        return status, names

    return call


def sign(path, pair):
    return f"--receipt={path}", f"--sign_key={pair.private}"


def write(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


STATEMENT = json.loads(SELFTEST.read_text("utf-8").splitlines()[0])


def test_a_run_signs_its_receipt(cli, findings, path, ours, theirs):
    for pair in (ours, theirs):
        assert cli(*SHORT, *sign(path, pair))[0] == 0
    assert cli(*SHORT, f"--receipt={path}")[0] == 0
    key = f"--key={ours.public}"
    assert findings(path, key) == (1, ["VALID", "ANOTHER_KEY", "NOT_SIGNED"])
    status, out, err = cli("verify_receipt", str(path), key)
    first, second, third = out.splitlines()
    assert first.endswith(f"signed by key {ours.key_id}")
    assert f"signed by another key: {theirs.key_id}, expected {ours.key_id}" in second
    assert f"not signed, expected key {ours.key_id}" in third
    assert (status, err) == (1, "1 VALID, 1 ANOTHER_KEY, 1 NOT_SIGNED\n")


@pytest.mark.slow
def test_a_sweep_signs_each(cli, findings, path, ours):
    assert cli("sweep", "--seeds=0:3", PARIS, "--max_tokens=2", *sign(path, ours))[0] == 0
    assert findings(path, f"--key={ours.public}") == (0, ["VALID"] * 3)


@pytest.mark.slow
def test_a_batch_signs_each_and_is_continued_by_its_key_alone(
    cli, mistake, findings, path, ours, theirs, tmp_path
):
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    fields = {"prompt": "Hi", "max_tokens": 2}
    write(requests, fields | {"seed": 1}, fields | {"seed": -1}, fields | {"seed": 3})
    command = ("batch", f"--input={requests}", f"--output={results}")
    assert cli(*command, *sign(path, ours))[0] == 2  # one line has an error, and no receipt
    whole = path.read_text().splitlines()
    # Stopped after the first result, when the second receipt was written.
    results.write_text(results.read_text().splitlines(keepends=True)[0])
    write(path, *map(json.loads, whole[:2]))
    before = path.read_bytes()
    for other in ([f"--receipt={path}"], sign(path, theirs)):
        said = mistake(*command, *other)
        assert f"{path}, line 1, is signed by key {ours.key_id}, but this run's" in said
        assert path.read_bytes() == before
    assert cli(*command, *sign(path, ours))[0] == 2
    assert [len(json.loads(line)["receipts"]) for line in path.read_text().splitlines()] == [
        *(1, 0, 1)
    ]
    assert findings(path, f"--key={ours.public}") == (0, ["VALID"] * 2)


def test_each_finding_has_its_line(cli, findings, path, ours):
    edited = json.loads(json.dumps(STATEMENT))
    internal = edited["predicate"]["buildDefinition"]["internalParameters"]
    internal["draws"]["logprob"][0] = "-0x1p-9"
    signed = ours.signer(STATEMENT)
    changed = signing.with_payload(signed, lambda statement: statement.update(x=1))
    write(path, signed, changed, ours.signer(edited))
    assert findings(path, f"--key={ours.public}") == (1, ["VALID", "CHANGED", "EDITED"])
    _, out, _ = cli("verify_receipt", str(path), f"--key={ours.public}")
    assert "the payload or the signature was changed" in out
    assert "the chain over the draws does not end as recorded: a draw was changed" in out
    write(path, edited)
    assert findings(path) == (1, ["EDITED"])


def test_without_a_key_digests_alone_are_checked_and_that_is_said(cli, findings, path, ours):
    write(path, STATEMENT, ours.signer(STATEMENT))
    assert findings(path) == (0, ["UNAUTHENTICATED"] * 2)
    _, out, err = cli("verify_receipt", str(path))
    assert "no key was given: anyone can have written it" in out.splitlines()[0]
    assert err.endswith("warning: no signature was verified; give --key\n")


def test_a_file_that_was_cut_off_exits_2_at_that_line(cli, mistake, path, ours):
    write(path, ours.signer(STATEMENT), ours.signer(STATEMENT))
    path.write_bytes(path.read_bytes()[:-9])
    status, out, err = cli("verify_receipt", str(path), f"--key={ours.public}")
    assert (status, out.count("VALID")) == (2, 1)
    assert f"error: {path}, line 2: not JSON" in err
    path.write_bytes(path.read_bytes()[:900])
    assert f"{path}: not JSON" in mistake("verify_receipt", str(path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "No such file"), ("", "is empty, expected receipts"), ("{}", "is no receipt")],
)
def test_what_cannot_be_read_exits_2(mistake, path, content, expected):
    if content is not None:
        path.write_text(content)
    assert expected in mistake("verify_receipt", str(path))


def test_flags_without_effect_are_refused(mistake, path, theirs):
    said = mistake("verify_receipt", str(path), "--checkpoint=x")
    assert "--checkpoint is given with verify_receipt, which runs no model; drop it" in said
    assert "--output is 'yaml', expected" in mistake("verify_receipt", str(path), "--output=yaml")
    assert "--sign_key is given without --receipt" in mistake(PARIS, "--sign_key=x")
    said = mistake(PARIS, "--print_prompt_tokens", "--sign_key=x")
    assert "--sign_key is given with --print_prompt_tokens, which runs no model" in said
    said = mistake(PARIS, f"--key={path}")
    assert "--key is given without --resume; add it" in said
    sides = str(DEMO_CHECKPOINT), str(DEMO_CHECKPOINT)
    said = mistake("compare", *sides, "--input=x", f"--key={theirs.public}")
    assert "--key is given, and no side is a file of receipts; drop it" in said


def test_neither_a_device_nor_other_processes_are_needed(path, ours):
    """Those that a launcher started are not waited for."""
    write(path, ours.signer(STATEMENT))
    environment = os.environ | {"JAX_PLATFORMS": "none-such", "OMPI_COMM_WORLD_SIZE": "2"}
    done = run_py("verify_receipt", str(path), f"--key={ours.public}", env=environment)
    assert (done.returncode, done.stderr) == (0, "1 VALID\n")


@pytest.mark.parametrize("arguments", [SHORT, ("sweep", "--seeds=1", PARIS), ("batch",)])
def test_the_key_is_read_before_the_model(mistake, monkeypatch, path, ours, tmp_path, arguments):
    if arguments == ("batch",):
        write(tmp_path / "in.jsonl", {"prompt": "Hi"})
        arguments += (f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}")
    monkeypatch.setattr(Llama, "load", None)
    for key, expected in {
        ours.public: "is a public key, expected the private one, which signs",
        tmp_path: "Is a directory; name a file",
        tmp_path / "none": "No such file or directory; name a file",
    }.items():
        said = mistake(*arguments, f"--receipt={path}", f"--sign_key={key}")
        assert f"--sign_key={key}" in said
        assert expected in said
    assert not path.exists()


def test_a_key_may_come_through_a_pipe(cli, findings, path, ours, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    key = ours.private.read_bytes()
    writer = threading.Thread(target=pipe.write_bytes, args=[key], daemon=True)
    writer.start()
    assert cli(*SHORT, f"--receipt={path}", f"--sign_key={pipe}")[0] == 0
    writer.join(timeout=60)
    assert findings(path, f"--key={ours.public}") == (0, ["VALID"])


@pytest.mark.slow
def test_a_replay_takes_envelopes_and_verifies_them_first(
    cli, mistake, monkeypatch, path, ours, theirs
):
    assert cli(*SHORT, *sign(path, ours))[0] == 0
    for flags in ([], [f"--key={ours.public}"], ["--prefill"]):
        status, out, _ = cli("replay", str(path), *flags)
        assert (status, out.split(" | ")[0].split(": ")[1]) == (0, "EXACT")
    monkeypatch.setattr(Llama, "load", None)
    said = mistake("replay", str(path), f"--key={theirs.public}")
    assert f"{path}: signed by another key: {ours.key_id}, expected {theirs.key_id}" in said
    write(path, STATEMENT)
    assert f"{path}: not signed" in mistake("replay", str(path), f"--key={theirs.public}")


def test_a_signed_run_is_continued_and_compared(cli, mistake, path, ours, theirs):
    assert cli(*SHORT, *sign(path, ours))[0] == 0
    for key in ([], [f"--key={ours.public}"]):
        status, out, _ = cli(f"--resume={path}", "--max_tokens=20", *key)
        assert (status, out) == (0, PARIS_ANSWER)
        assert cli("compare", str(path), str(path), *key)[0] == 0
    for command in ([f"--resume={path}"], ["compare", str(path), str(path)]):
        said = mistake(*command, f"--key={theirs.public}")
        assert f"{path}: signed by another key: {ours.key_id}, expected {theirs.key_id}" in said


@pytest.mark.slow
def test_the_examples_of_the_documentation(openssl, tmp_path):
    """Every block of the section on signatures, in order, in one folder."""
    texts = ["\n" + file.read_text("utf-8") for file in (ROOT / "docs").glob("receipts*.md")]
    (text,) = (text for text in texts if "\n## Signatures\n" in text)
    section = text.partition("\n## Signatures\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(sh|python)\n(.*?)```", section, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "sh", "python", "sh"]
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    said = []
    for kind, block in blocks:
        command = ["bash", "-euo", "pipefail", "-c"] if kind == "sh" else [sys.executable, "-c"]
        said.append(run([*command, block], tmp_path))
    assert re.search(r"^receipt.json: VALID \| run [-0-9a-f]{36} \| signed by key", said[1], re.M)
    assert said[2] == "https://slsa.dev/provenance/v1\n"
    assert said[3] == "Signature Verified Successfully\n"
