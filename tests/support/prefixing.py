"""A reverse proxy that serves another server under a path prefix."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from tests.support.scripted import in_thread


@contextmanager
def prefixing(url: str, prefix: str, strip: bool) -> Iterator[str]:
    """Serve `url` under a prefix, which is stripped or passed on; yield the new URL.

    It has no slash at the end.
    """
    target = urlsplit(url)
    assert target.hostname is not None

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path
            if path.partition("?")[0] != prefix and not path.startswith(f"{prefix}/"):
                self.send_error(404)
                return
            if strip:
                path = "/" + path.removeprefix(prefix).lstrip("/")
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            with closing(http.client.HTTPConnection(target.hostname or "", target.port)) as server:
                server.request(self.command, path, body or None, headers)
                answer = server.getresponse()
                content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            with suppress(ConnectionError):  # a browser that leaves a page cancels its downloads
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = _forward  # noqa: N815  # http.server's names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with in_thread(Handler) as outside:
        yield f"{outside}{prefix}"
