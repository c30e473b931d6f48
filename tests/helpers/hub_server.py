"""A small Hugging Face hub on loopback: what huggingface_hub calls to download a model."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "org/tiny-llama"


class Hub:
    """One repository, a folder's files, and the faults that a test sets."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.name = folder, NAME
        self.commit = COMMIT
        self.gated = False
        self.status: int | None = None
        """Answer every request so."""
        self.cut_after: int | None = None
        """Close the connection after so many bytes of a weights file."""
        self.cuts = 0
        """How many more times."""
        self.log: list[tuple[str, str, str | None]] = []
        """Method, path and Range of each request."""
        self.authorizations: set[str | None] = set()
        """Headers of that name, of all requests."""

    @property
    def downloaded(self) -> list[str]:
        """The files that were sent, or begun."""
        paths = [path for method, path, _ in self.log if method == "GET" and "/resolve/" in path]
        return sorted({path.rpartition("/")[2] for path in paths})

    def files(self) -> list[pathlib.Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, urllib.parse.unquote(self.path.partition("?")[0])
        hub.log.append((self.command, path, self.headers.get("Range")))
        hub.authorizations.add(self.headers.get("Authorization"))
        if hub.status:
            self._error(hub.status, "")
        elif path == "/api/models":
            self._json([{"id": hub.name}])
        elif not path.removeprefix("/api/models").startswith(f"/{hub.name}/"):
            self._error(404, "RepoNotFound")
        elif path.endswith("/refs"):
            refs = [{"name": "main", "ref": "refs/heads/main", "targetCommit": hub.commit}]
            self._json({"branches": refs, "tags": [], "converts": []})
        elif match := re.search(r"/(revision|tree|resolve)/([^/]+)/?(.*)", path):
            self._of_revision(*match.groups())
        else:
            self._error(404, "EntryNotFound")

    def _of_revision(self, what: str, revision: str, name: str) -> None:
        hub = self.hub
        if revision not in ("main", hub.commit):
            self._error(404, "RevisionNotFound")
        elif what == "revision":
            names = [path.relative_to(hub.folder).as_posix() for path in hub.files()]
            self._json(
                {"id": hub.name, "sha": hub.commit, "siblings": [{"rfilename": n} for n in names]}
            )
        elif what == "tree":
            self._json([self._entry(path) for path in hub.files()])
        elif hub.gated:
            self._error(403, "GatedRepo")
        else:
            self._file(hub.folder / name)

    def _entry(self, path: pathlib.Path) -> dict[str, Any]:
        name = path.relative_to(self.hub.folder).as_posix()
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _oid(path)}

    def _file(self, path: pathlib.Path) -> None:
        content = path.read_bytes()
        start = int(re.sub(r"bytes=(\d+)-", r"\1", self.headers.get("Range", "bytes=0-")))
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_oid(path)}"')
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts and path.suffix == ".safetensors":
            self.hub.cuts -= 1
            self.wfile.write(content[start:][: self.hub.cut_after])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def _json(self, values: Any) -> None:
        self._send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(path: pathlib.Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serve(folder: pathlib.Path) -> Iterator[tuple[Hub, str]]:
    """Serve a folder as the repository `hub.name`; yield the hub and its address."""
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
