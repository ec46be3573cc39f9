"""A local server with the API of the Hugging Face hub, as far as downloads use it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "5" * 40


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, model: str, downloads: list[str], *given: Any) -> None:
        self.folder, self.model, self.downloads = folder, model, downloads
        super().__init__(*given)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = sorted(p.relative_to(self.folder) for p in self.folder.rglob("*") if p.is_file())
        prefix, api = f"/{self.model}/resolve/{COMMIT}/", f"/api/models/{self.model}"
        if path == f"{api}/revision/main":
            siblings = [{"rfilename": str(file)} for file in files]
            self._send(json.dumps({"id": self.model, "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"{api}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": str(file), "oid": COMMIT, "size": size}
                for file in files
                for size in [(self.folder / file).stat().st_size]
            ]
            self._send(json.dumps(tree).encode())
        elif path.startswith(prefix) and Path(path.removeprefix(prefix)) in files:
            name = path.removeprefix(prefix)
            if self.command == "GET":
                self.downloads.append(name)
            content = (self.folder / name).read_bytes()
            etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
            self._send(content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(b"", status=404)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def hub_of(folder: Path, model: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as the files of a model, such as "org/name".

    Yields:
        The URL of the hub, and the names of the files that were downloaded so far.
    """
    downloads: list[str] = []
    handler = partial(_Handler, folder, model, downloads)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", downloads
        server.shutdown()
        thread.join()
