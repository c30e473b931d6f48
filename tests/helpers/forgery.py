"""Receipts that a forger edits, and seals again so that their own digests hold."""

import base64
import copy
import json

from llama_jax.engine.environment import Environment
from llama_jax.provenance.canonical import digest, text_digest
from llama_jax.provenance.chain import last_link
from llama_jax.provenance.statement import chain_start
from llama_jax.receipt.reading import read_statement


def read(statement):
    """The receipt in a statement that went through JSON."""
    return read_statement(json.loads(json.dumps(statement)), "a test's receipt")


def parts(statement):
    """The request, and what was made of it."""
    definition = statement["predicate"]["buildDefinition"]
    return definition["externalParameters"], definition["internalParameters"]


def set_subject(statement, name, content):
    """Put in a subject's content and its digest."""
    subject = next(each for each in statement["subject"] if each["name"] == name)
    subject["content"] = base64.b64encode(content.encode()).decode()
    subject["digest"]["sha256"] = text_digest(content)


def sealed(statement):
    """The statement, with every digest computed again."""
    statement = copy.deepcopy(statement)
    external, internal = parts(statement)
    environment = internal["environment"]
    internal["fingerprint"] = Environment(environment).fingerprint
    digests = {
        "weights": environment["weights"],
        "tokenizer.model": environment["tokenizer"],
        "config": digest(environment["config"]),
        "llama_jax": environment["code"],
    }
    for each in statement["predicate"]["buildDefinition"]["resolvedDependencies"]:
        if each["name"] in digests:
            each["digest"] = {"sha256": digests[each["name"]]}
    internal["numPromptTokens"] = len(internal["promptTokens"])
    internal["chain"]["start"] = start = chain_start(external, internal)
    receipt = read(statement)
    internal["chain"]["end"] = last_link(start, receipt.draws)
    set_subject(statement, "tokens", json.dumps(receipt.tokens, separators=(",", ":")))
    assert read(statement).problems == []
    return statement
