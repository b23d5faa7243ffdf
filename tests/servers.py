"""Servers on this machine alone, in a thread: files over HTTP that may change and break off, and an object store."""

from __future__ import annotations

import contextlib
import email.utils
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """`files` by path, as they are now, answered with `status`.

    `cut` and `refused` count down: answers that break off in the middle, or are a 503.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    has_etags: bool = True
    cut: int = 0
    refused: int = 0
    status: int = 200
    requests: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def web() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self._answer(False)

        def do_GET(self):
            self._answer(True)

        def _answer(self, with_body):
            path = self.path.partition("?")[0]
            site.requests[f"{self.command} {path}"] += 1
            data = site.files.get(path)
            site.refused -= (refused := with_body and site.refused > 0)
            status = 503 if refused else 404 if data is None else site.status
            if status != 200:
                self.send_error(status)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            if site.has_etags:
                self.send_header("ETag", f'"{hash(data) & 0xFFFFFFFF:x}"')
                self.send_header("Last-Modified", email.utils.formatdate(0, usegmt=True))
            self.end_headers()
            if with_body and site.cut:
                site.cut -= 1
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif with_body:
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def object_store() -> Iterator[str]:
    """The address of a store that speaks S3; whatever it holds is gone afterwards."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()
