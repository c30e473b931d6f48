"""Receipts are what others' packages take for in-toto, SLSA and DSSE; who signed them shows."""

import base64
import json
import subprocess
import sys

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from google.protobuf.json_format import ParseDict, ParseError
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from securesystemslib import dsse
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from llama_jax.demo import SELFTEST
from llama_jax.errors import InputError
from llama_jax.receipt import PublicKey, Signer, read_receipts
from llama_jax.receipt.check import Finding, check_receipts
from llama_jax.receipt.envelope import open_envelope, parse_envelope
from llama_jax.receipt.file import ReceiptFile
from llama_jax.replay import replay
from tests.helpers import forgery, signing
from tests.helpers.demo import load_demo

RECORDED = [json.loads(line) for line in SELFTEST.read_text("utf-8").splitlines()]
STATEMENT = RECORDED[0]


@pytest.fixture(scope="module")
def llm():
    return load_demo()


@pytest.fixture(scope="module")
def result(llm):
    return llm.generate(prompt="What is a fox?", seed=2**64 - 1, temperature=2.0, max_tokens=9)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return signing.Pair(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return signing.Pair(tmp_path_factory.mktemp("keys"), "theirs")


def check(row, key, folder):
    """What is found of one receipt, by a key's file or none."""
    path = folder / "receipt.json"
    path.write_text(json.dumps(row))
    (found,) = check_receipts(path, key and key.verifier)
    return found


# Others' packages.


def assert_in_toto(statement):
    """It is one by the bindings of the in-toto attestation framework; unknown fields are errors."""
    message = ParseDict(json.loads(json.dumps(statement)), statement_pb2.Statement())
    Statement.copy_from_pb(message).validate()
    for subject in message.subject:
        ResourceDescriptor.copy_from_pb(subject).validate()
        assert set(subject.digest) == {"sha256"}


def assert_slsa(statement):
    assert_in_toto(statement)
    message = ParseDict(statement["predicate"], provenance_pb2.Provenance())
    definition, details = message.build_definition, message.run_details
    # SLSA's required fields, which its protobuf cannot require.
    assert definition.build_type
    assert definition.external_parameters.fields
    assert details.builder.id
    assert details.metadata.started_on.seconds <= details.metadata.finished_on.seconds
    assert [each.name for each in definition.resolved_dependencies][:3] == [
        "weights",
        "config",
        "llama_jax",
    ]
    for dependency in definition.resolved_dependencies:
        ResourceDescriptor.copy_from_pb(dependency).validate()
        assert dependency.digest or dependency.uri


@pytest.mark.parametrize("private", [False, True])
def test_a_receipt_is_an_in_toto_statement_with_slsa_provenance(result, private):
    assert_slsa(result.receipt(private=private))


def test_so_is_that_of_a_continued_run(llm, result):
    request = forgery.read(result.receipt()).continuation(4, seed=7)
    stream = llm.start(request)
    for _ in stream:
        pass
    assert_slsa(stream.result.receipt())


def test_so_are_the_shipped_ones():
    for statement in RECORDED:
        assert_slsa(statement)


def test_the_bindings_refuse_what_is_none():
    statement = json.loads(json.dumps(STATEMENT))
    statement["predicate"]["runDetails"]["x"] = 1
    with pytest.raises(ParseError, match='no field named "x"'):
        assert_slsa(statement)
    with pytest.raises(ValueError, match="At least one subject"):
        assert_in_toto(STATEMENT | {"subject": []})


def test_a_verdict_is_an_in_toto_statement(llm, result):
    edited = result.receipt()
    forgery.parts(edited)[1]["draws"]["token"][3] ^= 1
    statements = [result.receipt(), edited, result.receipt(private=True)]
    outcomes = []
    for verdict in replay(llm, map(forgery.read, statements)):
        outcomes.append(verdict.outcome.name)
        statement = verdict.to_statement()
        assert_in_toto(statement)
        # Simple Verification Result v0.1, which has no bindings.
        assert statement["predicateType"] == "https://in-toto.io/attestation/svr/v0.1"
        assert statement["predicate"].keys() >= {"verifier", "timeCreated", "properties"}
    assert outcomes == ["EXACT", "DIVERGED", "NOT_REPLAYABLE"]


@pytest.mark.clients
def test_sigstore_takes_it_for_a_statement(result):
    from sigstore.dsse import Statement as SigstoreStatement

    SigstoreStatement(json.dumps(result.receipt()).encode())


# DSSE, by others' verifiers.


def test_securesystemslib_verifies_an_envelope(result, ours, theirs):
    envelope = dsse.Envelope.from_dict(ours.signer(result.receipt()))
    key, other = (SSlibKey.from_crypto(pair.key.public_key()) for pair in (ours, theirs))
    assert envelope.verify([key], 1) == {ours.key_id: key}
    assert json.loads(envelope.payload) == result.receipt()
    with pytest.raises(VerificationError):
        envelope.verify([other], 1)
    envelope.payload += b" "
    with pytest.raises(VerificationError):
        envelope.verify([key], 1)


def test_so_does_the_specification_written_down_here(result, ours, theirs):
    envelope = ours.signer(result.receipt())
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    payload = base64.b64decode(envelope["payload"])
    (signature,) = envelope["signatures"]
    value = base64.b64decode(signature["sig"])
    signed = signing.pae(envelope["payloadType"], payload)
    ours.key.public_key().verify(value, signed)
    for key, content in ((theirs, signed), (ours, payload)):
        with pytest.raises(InvalidSignature):
            key.key.public_key().verify(value, content)


def test_so_does_openssl(openssl, result, ours, theirs, tmp_path):
    envelope = ours.signer(result.receipt())
    payload = base64.b64decode(envelope["payload"])
    (tmp_path / "signed").write_bytes(signing.pae(envelope["payloadType"], payload))
    (tmp_path / "signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = [openssl, "pkeyutl", "-verify", "-rawin", "-in", "signed", "-sigfile", "signature"]
    for pair, status in ((ours, 0), (theirs, 1)):
        key = ["-pubin", "-inkey", str(pair.public)]
        assert subprocess.run([*command, *key], cwd=tmp_path, check=False).returncode == status


def test_keys_of_openssl_sign_and_verify(openssl, tmp_path):
    private, public = tmp_path / "key.pem", tmp_path / "public.pem"
    for command in (
        ["genpkey", "-algorithm", "ed25519", "-out", private],
        ["pkey", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run([openssl, *map(str, command)], check=True)
    signer = Signer(private.read_bytes(), "it")
    key = PublicKey(public.read_bytes(), "it")
    assert key.key_id == signer.key_id
    assert key.fault(parse_envelope(signer(STATEMENT), "it")) is None


def test_envelopes_of_another_signer_are_verified(ours, tmp_path):
    """The specification lets an envelope have no key id, and either base64."""
    # Of this payload the two alphabets differ.
    payload = json.dumps(STATEMENT | {"x": "~~~???" * 9}, ensure_ascii=False).encode()
    envelope = ours.envelope(payload)
    assert check(envelope, ours, tmp_path).finding is Finding.VALID
    url_safe = base64.urlsafe_b64encode(payload).decode()
    assert url_safe != envelope["payload"]
    assert check(envelope | {"payload": url_safe}, ours, tmp_path).finding is Finding.VALID


# What a check finds.


def test_a_signed_receipt_is_valid_by_its_key_alone(result, ours, theirs, tmp_path):
    envelope = ours.signer(result.receipt())
    found = check(envelope, ours, tmp_path)
    assert (found.finding, found.signed_by, found.problems) == (Finding.VALID, ours.key_id, ())
    assert found.invocation == result.record.invocation
    found = check(envelope, theirs, tmp_path)
    assert (found.finding, found.signed_by) == (Finding.ANOTHER_KEY, None)
    (problem,) = found.problems
    assert problem == f"signed by another key: {ours.key_id}, expected {theirs.key_id}"


def test_one_that_another_key_signed_again_is_told(result, ours, theirs, tmp_path):
    envelope = ours.signer(result.receipt())
    again = theirs.signer(open_envelope(envelope, "it"))
    assert check(again, ours, tmp_path).finding is Finding.ANOTHER_KEY


def test_a_changed_payload_is_told(ours, tmp_path):
    envelope = ours.signer(STATEMENT)
    changed = signing.with_payload(envelope, lambda statement: statement.update(x=1))
    found = check(changed, ours, tmp_path)
    assert (found.finding, found.invocation) == (Finding.CHANGED, None)
    assert "the payload or the signature was changed" in str(found)
    # What is not signed is not read.
    garbage = envelope | {"payload": base64.b64encode(b"{").decode()}
    assert check(garbage, ours, tmp_path).finding is Finding.CHANGED


def test_a_changed_signature_is_told(ours, tmp_path):
    envelope = ours.signer(STATEMENT)
    for value in (b"", b"\x00" * 64, b"\x00" * 63):
        envelope["signatures"][0]["sig"] = base64.b64encode(value).decode()
        assert check(envelope, ours, tmp_path).finding is Finding.CHANGED


def test_what_is_not_signed_is_told(ours, tmp_path):
    assert check(STATEMENT, ours, tmp_path).finding is Finding.NOT_SIGNED
    emptied = ours.signer(STATEMENT) | {"signatures": []}
    assert check(emptied, ours, tmp_path).finding is Finding.NOT_SIGNED


def test_an_edited_receipt_is_told_though_it_is_signed(ours, tmp_path):
    statement = json.loads(json.dumps(STATEMENT))
    forgery.parts(statement)[1]["draws"]["token"][0] ^= 1
    found = check(ours.signer(statement), ours, tmp_path)
    assert (found.finding, found.signed_by) == (Finding.EDITED, ours.key_id)
    assert "a draw was changed" in str(found)
    assert check(statement, None, tmp_path).finding is Finding.EDITED


def test_without_a_key_nothing_is_valid(ours, tmp_path):
    for row in (STATEMENT, ours.signer(STATEMENT)):
        found = check(row, None, tmp_path)
        assert (found.finding, found.signed_by) == (Finding.UNAUTHENTICATED, None)
        assert "no key was given" in str(found)


def test_a_key_id_decides_nothing(ours, theirs, tmp_path):
    """Anyone can write one."""
    payload = json.dumps(STATEMENT).encode()
    found = check(ours.envelope(payload, keyid=theirs.key_id), ours, tmp_path)
    assert (found.finding, found.signed_by) == (Finding.VALID, ours.key_id)
    assert theirs.key_id not in str(found)
    forged = theirs.envelope(payload, keyid=ours.key_id)
    assert check(forged, ours, tmp_path).finding is Finding.CHANGED


def test_one_true_signature_of_several_is_enough(ours, theirs, tmp_path):
    first, second = ours.signer(STATEMENT), theirs.signer(STATEMENT)
    both = first | {"signatures": second["signatures"] + first["signatures"]}
    assert check(both, ours, tmp_path).finding is Finding.VALID


def test_a_signature_of_another_type_of_payload_is_none(ours, tmp_path):
    payload = json.dumps(STATEMENT).encode()
    envelope = ours.envelope(payload, signed_as="application/json")
    assert check(envelope, ours, tmp_path).finding is Finding.CHANGED


def test_reading_by_a_key_refuses_what_it_has_not_signed(result, ours, theirs, tmp_path):
    path = tmp_path / "receipts.jsonl"
    with ReceiptFile(path, signer=ours.signer) as file:
        file.append(result)
        file.append_row({"line": 1}, [result, result])
    for key in (None, ours.verifier):
        receipts = list(read_receipts(path, key))
        assert [receipt.draws for receipt in receipts] == [result.record.draws] * 3
    with ReceiptFile(path, signer=theirs.signer) as file:
        file.append_row({"line": 2}, [result, result])
    with pytest.raises(InputError, match="line 3, receipt 1: signed by another key"):
        list(read_receipts(path, ours.verifier))


def test_a_batch_goes_on_by_the_key_that_it_began_with(result, ours, theirs, tmp_path):
    path = tmp_path / "receipts.jsonl"
    with ReceiptFile(path, signer=ours.signer) as file:
        file.append_row({"line": 1}, [])
        file.append_row({"line": 2}, [result])
    before = path.read_bytes()
    for signer, name in ((theirs.signer, f"signed by key {theirs.key_id}"), (None, "not signed")):
        expected = f"line 2, is signed by key {ours.key_id}, but .* would be {name}; give the"
        with ReceiptFile(path, signer=signer) as file, pytest.raises(InputError, match=expected):
            file.resume(2)
        assert path.read_bytes() == before
    with ReceiptFile(path, signer=ours.signer) as file:
        file.resume(2)
    with ReceiptFile(path) as file:
        file.resume(1)
        file.append_row({"line": 2}, [result])
    with (
        ReceiptFile(path, signer=ours.signer) as file,
        pytest.raises(InputError, match="line 2, is not signed, but"),
    ):
        file.resume(2)


# Bad input.

ENVELOPE = {"payload": "e30=", "payloadType": signing.PAYLOAD_TYPE, "signatures": []}
MALFORMED = {
    "payload is not base64": {"payload": "%"},
    "payload is not base64; write": {"payload": 3},
    "payloadType is 'text/plain', expected application": {"payloadType": "text/plain"},
    "payloadType is None": {"payloadType": None},
    "signatures are 3, expected objects": {"signatures": 3},
    r"signatures are \[3\], expected objects": {"signatures": [3]},
    "a signature is not base64": {"signatures": [{"keyid": "x"}]},
    "keyid is 3, expected a text": {"signatures": [{"keyid": 3, "sig": ""}]},
}


@pytest.mark.parametrize("expected", MALFORMED)
def test_a_malformed_envelope_is_one_clear_line(expected):
    with pytest.raises(InputError, match=f"^it: .*{expected}"):
        parse_envelope(ENVELOPE | MALFORMED[expected], "it")


def test_a_payload_of_something_else_is_refused(ours, tmp_path):
    for payload, expected in ((b"{", "the payload: not JSON"), (b"{}", "is no receipt")):
        with pytest.raises(InputError, match=expected):
            check(ours.envelope(payload), ours, tmp_path)


@pytest.fixture(scope="module")
def pems(ours):
    curve = ec.generate_private_key(ec.SECP256R1())
    return {
        "ed25519": signing.private_pem(ours.key),
        "public": signing.public_pem(ours.key),
        "encrypted": signing.private_pem(ours.key, b"secret"),
        "RSA": signing.private_pem(rsa.generate_private_key(65537, 2048)),
        "EC": signing.private_pem(curve),
        "public EC": signing.public_pem(curve),
        "Ed448": signing.private_pem(ed448.Ed448PrivateKey.generate()),
        "garbage": b"\xff\x00garbage",
        "empty": b"",
        "cut off": signing.private_pem(ours.key)[:60],
        "cut off public": signing.public_pem(ours.key)[:60],
    }


REFUSED = {
    ("sign", "public"): "is a public key, expected the private one",
    ("sign", "encrypted"): "is encrypted, expected a key without a password; decrypt it",
    ("sign", "RSA"): "is a key for RSA, expected Ed25519; make one by `openssl genpkey",
    ("sign", "EC"): "is a key for EC, expected Ed25519",
    ("sign", "Ed448"): "is a key for Ed448, expected Ed25519",
    ("sign", "garbage"): r"is no private key in PEM \(PKCS #8\); make one",
    ("sign", "empty"): "is no private key in PEM",
    ("sign", "cut off"): "is no private key in PEM",
    ("verify", "ed25519"): "is a private key, expected the public one; write its public part",
    ("verify", "encrypted"): "is a private key, expected the public one",
    ("verify", "public EC"): "is a key for EC, expected Ed25519, which receipts",
    ("verify", "garbage"): "is no public key in PEM; write its public part by `openssl pkey",
    ("verify", "empty"): "is no public key in PEM",
    ("verify", "cut off public"): "is no public key in PEM",
}


@pytest.mark.parametrize("case", REFUSED, ids=" ".join)
def test_another_key_file_is_one_clear_line(pems, case):
    use, name = case
    with pytest.raises(InputError, match=f"^--k=x {REFUSED[case]}"):
        (Signer if use == "sign" else PublicKey)(pems[name], "--k=x")


@pytest.mark.parametrize("package", ["securesystemslib", "cryptography"])
def test_a_missing_extra_is_named(monkeypatch, pems, ours, package):
    monkeypatch.setitem(sys.modules, package, None)
    expected = rf"need {package}, which is not installed; pip install 'llama_jax\[receipts\]'"
    for make, name in ((Signer, "ed25519"), (PublicKey, "public")):
        with pytest.raises(InputError, match=expected):
            make(pems[name], "it")
    # Reading needs neither.
    assert open_envelope(ours.envelope(b"{}"), "it") == {}
