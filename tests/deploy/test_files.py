"""The files of deploy/: each says that it was not run, and a page tells what it is for."""

import json

import pytest

from tests.helpers import ROOT
from tests.helpers.manifests import DEPLOY

FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
PAGES = "".join((ROOT / "docs" / name).read_text() for name in ("deploy.md", "scaling.md"))


def head(path):
    """Return the first words of a file, after what its format wants first."""
    text = path.read_text()
    if path.suffix == ".json":
        return f"# {json.loads(text)['description']}"
    return text.removeprefix("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_says_that_it_was_not_run(path):
    assert head(path).startswith("# NOT RUN")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_page_tells_what_a_file_is_for(path):
    assert path.relative_to(ROOT).as_posix() in PAGES
