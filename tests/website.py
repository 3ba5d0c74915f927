"""A web server on 127.0.0.1 for tests."""

import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOCAL = ("127.0.0.1",)


class Site(BaseHTTPRequestHandler):
    """What each path answers, `files` first; PUT keeps the body."""

    uploads: dict = {}
    asked: list = []
    files: dict = {}

    def do_GET(self):  # noqa: N802
        self.asked.append((self.path, self.headers["Host"]))
        path = self.path.split("?")[0]
        if path.startswith("/to/"):
            self._answer(302, b"", Location=path.removeprefix("/to/"))
        elif path == "/later" and len(self.asked) < 2:
            self._answer(503, b"")
        elif path == "/gone":
            self._answer(404, b"")
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while self.wfile.write(b"."):
                    time.sleep(0.01)
        elif path == "/cut":
            self._answer(200, b"abc", **{"Content-Length": "9"})
        else:
            self._answer(200, self.files.get(path, b"a photo"), **{"Content-Type": "image/png"})

    def do_PUT(self):  # noqa: N802
        self.uploads[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(403 if self.path.startswith("/no") else 200, b"")

    def _answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(files=()):
    """The address of a site that is up until the block ends."""
    Site.asked, Site.uploads, Site.files = [], {}, dict(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
