"""The pages of docs/ as a site: it builds, and every link and anchor in it leads somewhere."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tools.docs_site import pictures, site_links


@pytest.mark.docs
def test_the_site_builds_without_a_warning(tmp_path):
    """Strictly: a page that the navigation lacks, a link or an anchor without its place fails."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(
        [*command, f"--config-file={ROOT / 'mkdocs.yml'}", f"--site-dir={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        folder = tmp_path if page.stem == "index" else tmp_path / page.stem
        assert (folder / "index.html").exists()
    start = (tmp_path / "index.html").read_text("utf-8")
    assert 'href="overview/#command-line"' in start
    assert "<code>notebooks/quickstart.ipynb</code>" in start
    assert (tmp_path / "benchmarks/results/gpu-7b.png").exists()


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("docs/api.md", "[a](design.md#exactness)", "[a](design.md#exactness)"),
        ("docs/api.md", "[a](#errors)", "[a](#errors)"),
        ("docs/api.md", "[a](https://a.example/b#c)", "[a](https://a.example/b#c)"),
        ("docs/api.md", "[a](../README.md#speed)", "[a](overview.md#speed)"),
        ("docs/api.md", "[run.py](../run.py)", "`run.py`"),
        ("docs/api.md", "[`file.py`](../llama_jax/batch/file.py)", "`llama_jax/batch/file.py`"),
        ("docs/api.md", "[shapes](../configs)", "shapes (`configs`)"),
        ("README.md", "[a](docs/api.md#errors)", "[a](api.md#errors)"),
        ("README.md", "[convert/](convert)", "`convert`"),
        ("benchmarks/README.md", "[a](../docs/api.md)", "[a](api.md)"),
        (
            "docs/api.md",
            "![Speed](../benchmarks/results/gpu-7b.png)",
            "![Speed](benchmarks/results/gpu-7b.png)",
        ),
    ],
)
def test_a_link_leads_to_its_place_in_the_site_or_is_text(source, link, expected):
    assert site_links(f"See {link}.", source) == (f"See {expected}.", [])


@pytest.mark.parametrize("target", ["gone.md", "../llama_jax/gone.py", "../../outside.md"])
def test_a_link_to_a_file_that_does_not_exist_is_missing(target):
    assert site_links(f"[a]({target})", "docs/api.md") == (f"[a]({target})", [target])


def test_the_pictures_of_a_page_are_found():
    text = "![a](../benchmarks/results/gpu-7b.png) and [b](../benchmarks/results/gpu-7b.json)"
    assert pictures(text, "docs/performance.md") == ["benchmarks/results/gpu-7b.png"]
