"""A checkpoint that OpenSSF Model Signing signs, by the commands of docs/checkpoints.md."""

import base64
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from llama_jax.demo import DEMO_CHECKPOINT, SELFTEST
from llama_jax.weights.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from llama_jax.weights.shards import tensors
from tests.helpers import ROOT

pytestmark = [pytest.mark.clients, pytest.mark.slow]

SECTION = (ROOT / "docs" / "checkpoints.md").read_text("utf-8").partition("## Signing a check")[2]
MAKE_KEY, PUBLISH, SIGN, VERIFY = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)[0].splitlines()


def run(command, folder):
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def folder(tmp_path, openssl):
    """A folder with a signed copy of the demo model."""
    shutil.copytree(DEMO_CHECKPOINT, tmp_path / "DST")
    for command in (MAKE_KEY, PUBLISH, SIGN, VERIFY):
        done = run(command, tmp_path)
        assert done.returncode == 0, done.stderr
    return tmp_path


def test_a_byte_of_the_weights_fails_the_verification(folder):
    weights = max((folder / "DST").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    done = run(VERIFY, folder)
    assert done.returncode == 1
    assert "Hash mismatch for" in _said(done)
    assert weights.relative_to(folder / "DST").as_posix() in _said(done)
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert run(VERIFY, folder).returncode == 0


def test_other_weights_with_a_manifest_of_their_own_fail_it_alone(folder):
    checkpoint = load_checkpoint(folder / "DST")
    tokenizer = checkpoint.tokenizer.read_bytes()
    shutil.rmtree(folder / "DST")
    other = checkpoint.params | {"lm_head": checkpoint.params["lm_head"] * 1.05}
    save_checkpoint(folder / "DST", tensors(other), checkpoint.config, tokenizer=tokenizer)
    verify_checkpoint(folder / "DST")
    done = run(VERIFY, folder)
    assert done.returncode == 1
    assert "Signature mismatch" in _said(done)


def test_another_key_fails_it(folder):
    run(f"{MAKE_KEY}; {PUBLISH}", folder)
    done = run(VERIFY, folder)
    assert done.returncode == 1
    assert "Verification failed" in _said(done)


def test_the_signed_manifest_has_the_root_that_a_receipt_names(folder):
    envelope = json.loads((folder / "DST.sig").read_text())["dsseEnvelope"]
    resources = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
    digests = {each["name"]: each["digest"] for each in resources}
    files = [path for path in (folder / "DST").rglob("*") if path.is_file()]
    assert digests.keys() == {path.relative_to(folder / "DST").as_posix() for path in files}
    manifest = (folder / "DST" / "manifest.json").read_bytes()
    assert digests["manifest.json"] == hashlib.sha256(manifest).hexdigest()
    receipt = json.loads(SELFTEST.read_text("utf-8").splitlines()[0])
    (weights, *_) = receipt["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert weights["digest"]["sha256"] == json.loads(manifest)["root"]


def _said(done):
    return done.stdout + done.stderr
