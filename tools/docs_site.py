"""The hook of mkdocs.yml: what lies outside docs/, for a site of its pages.

In a checkout the pages link to each other, to pictures and to sources by relative paths. In the
site a link to one of PAGES, or to a picture, leads to its copy there. A link to another file
becomes its path as text. One to a file that does not exist is a warning: `--strict` fails by it.
"""

import logging
import pathlib
import posixpath
import re
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Pages outside docs/, by path: their names in the site."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks.docs_site")


def site_links(markdown: str, source: str) -> tuple[str, list[str]]:
    """Return a page with its links as the site has them, and those to files that do not exist.

    Args:
        markdown: of the page, as it is in the checkout.
        source: its path there.
    """
    missing = []

    def replace(link: re.Match[str]) -> str:
        mark, text, target, anchor = link.groups(default="")
        if ":" in target:  # an address
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("..") or not (ROOT / path).exists():
            missing.append(target)
            return link[0]
        place = _place(path, is_picture=bool(mark))
        if place is not None:
            return f"{mark}[{text}]({place}{anchor})"
        return f"`{path}`" if path.endswith(text.strip("`/")) else f"{text} (`{path}`)"

    return _LINK.sub(replace, markdown), missing


def pictures(markdown: str, source: str) -> list[str]:
    """Return the paths of the pictures that a page shows, from the checkout."""
    folder = posixpath.dirname(source)
    shown = [link[3] for link in _LINK.finditer(markdown) if link[1]]
    return [posixpath.normpath(posixpath.join(folder, target)) for target in shown]


def _place(path: str, *, is_picture: bool) -> str | None:
    """Return where a file is in the site; None: it is not there."""
    folder, _, name = path.partition("/")
    if folder == "docs" and path.endswith(".md"):
        return name
    return path if is_picture else PAGES.get(path)


def on_files(files: Any, *, config: Any) -> Any:
    """Add PAGES, and the pictures of all pages, to the files of the site."""
    from mkdocs.structure.files import File

    for path, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    shown: set[str] = set()
    for file in files.documentation_pages():
        markdown = pathlib.Path(file.abs_src_path).read_text("utf-8")
        shown.update(pictures(markdown, _source(file.src_uri)))
    for path in sorted(shown):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return a page's text for the site."""
    del config, files
    source = _source(page.file.src_uri)
    text, missing = site_links(markdown, source)
    for target in missing:
        _log.warning("%s links to %s, which does not exist", source, target)
    return text


def _source(name: str) -> str:
    """Return the path in the checkout of a page of the site."""
    return next((path for path, page in PAGES.items() if page == name), f"docs/{name}")
