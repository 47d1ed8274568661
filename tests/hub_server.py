"""A small Hugging Face Hub on loopback: what ``huggingface_hub`` asks for, and who asked.

Routes: the list of a model's files (``/api/models/ORG/NAME/revision/REV`` and ``…/tree/…``)
and the files (``/ORG/NAME/resolve/REV/FILE``), with the headers and error codes of the Hub.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


def commit(name: str) -> str:
    """A commit's hash."""
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class Hub:
    """Models by name: revision → files; a branch is a name of a commit."""

    models: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requested: list[str] = field(default_factory=list)  # "METHOD path" of each request
    failing: bool = False
    url: str = ""

    def add(self, name: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.models.setdefault(name, {})[revision] = files

    def downloaded(self) -> set[str]:
        """Names of the files whose content was sent."""
        paths = [r.removeprefix("GET ") for r in self.requested if "/resolve/" in r]
        gets = [r for r in self.requested if r.startswith("GET ") and "/resolve/" in r]
        assert len(paths) >= len(gets)
        return {get.split("/resolve/")[1].split("/", 1)[1] for get in gets}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path."""
        if self.failing:
            return 503, {}, b""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            return self._api(parts[2:])
        name = "/".join(parts[:2])
        if name not in self.models:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        sha, files = self._revision(name, parts[3])
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        file = "/".join(parts[4:])
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        tag = hashlib.sha256(files[file]).hexdigest()
        return 200, {"X-Repo-Commit": sha, "ETag": f'"{tag}"'}, files[file]

    def _api(self, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
        name = "/".join(parts[:2])
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if name not in self.models:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        revision = parts[3] if len(parts) > 3 else "main"
        sha, files = self._revision(name, revision)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        body: Any = {"id": name, "sha": sha, "siblings": [{"rfilename": f} for f in files]}
        if parts[2:3] == ["tree"]:
            body = [
                {"type": "file", "path": f, "size": len(data), "oid": commit(f)}
                for f, data in files.items()
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()

    def _revision(self, name: str, revision: str) -> tuple[str, dict[str, bytes] | None]:
        for branch, files in self.models[name].items():
            if revision in (branch, commit(name + branch)):
                return commit(name + branch), files
        return "", None


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers on a free port of loopback until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, body: bool) -> None:
            path = urlsplit(self.path).path
            hub.requested.append(f"{self.command} {unquote(path)}")
            status, headers, data = hub.answer(path)
            wanted = self.headers.get("Range", "")
            if wanted.startswith("bytes=") and status == 200:
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                data = data[start:]
                status = 206
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
