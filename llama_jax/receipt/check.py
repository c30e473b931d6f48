"""Check: whether the receipts of a file are signed, and not edited; without a model."""

import dataclasses
import enum
import pathlib
from collections.abc import Iterator
from typing import Any

from llama_jax.receipt.envelope import parse_envelope
from llama_jax.receipt.keys import PublicKey
from llama_jax.receipt.reading import read_rows, read_statement


class Finding(enum.Enum):
    """What a check of one receipt found."""

    VALID = "signed by the key, and its digests hold"
    UNAUTHENTICATED = "its digests hold, and no key was given: anyone can have written it"
    NOT_SIGNED = "it has no signature"
    ANOTHER_KEY = "it is signed by other keys"
    CHANGED = "it is not what the key signed"
    EDITED = "its own digests fail"


@dataclasses.dataclass(frozen=True)
class Checked:
    """A receipt that was checked."""

    source: str
    """The file and the line."""
    finding: Finding
    key_ids: tuple[str, ...]
    """Whose its signatures say that they are, which nothing proves."""
    signed_by: str | None
    """The key id of the key that was found to have signed it."""
    invocation: str | None
    """The name of the run; None: it was not read, since its signature is not true."""
    problems: tuple[str, ...] = ()
    """What is wrong."""

    @property
    def is_valid(self) -> bool:
        """Whether nothing is wrong, as far as it was checked."""
        return self.finding in (Finding.VALID, Finding.UNAUTHENTICATED)

    def __str__(self) -> str:
        run = [] if self.invocation is None else [f"run {self.invocation}"]
        if self.signed_by is not None:
            run.append(f"signed by key {self.signed_by}")
        elif self.finding is Finding.UNAUTHENTICATED:
            run.append(self.finding.value)
        return " | ".join([f"{self.source}: {self.finding.name}", *run, *self.problems])

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "source": self.source,
            "finding": self.finding.name,
            "invocationId": self.invocation,
            "keyIds": list(self.key_ids),
            "signedBy": self.signed_by,
            "problems": list(self.problems),
        }


def check_receipts(path: str | pathlib.Path, key: PublicKey | None) -> Iterator[Checked]:
    """Yield what is found of each receipt of a file.

    Nothing in an envelope is read before its signature is found true.

    Args:
        path: as `read_receipts` takes it.
        key: that each is to be signed by; None: signatures are not verified.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    for source, row in read_rows(path):
        envelope = parse_envelope(row, source)
        ids = () if envelope is None else tuple(filter(None, envelope.key_ids))
        if key is not None and (fault := key.fault(envelope)) is not None:
            yield Checked(source, Finding[fault.name], ids, None, None, (fault.text,))
            continue
        statement = row if envelope is None else envelope.statement(source)
        receipt = read_statement(statement, source)
        found = Finding.VALID if key is not None else Finding.UNAUTHENTICATED
        if problems := tuple(receipt.problems):
            found = Finding.EDITED
        signed_by = None if key is None else key.key_id
        yield Checked(source, found, ids, signed_by, receipt.invocation, problems)
