"""A hub of one model on this machine, that can be slow, break off, lie, or be gone: what its clients then do is tested.

It answers what `huggingface_hub.snapshot_download` asks: the commit of a revision, the files of a commit, each file.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/small"


class Hub:
    """The files of the model, and what goes wrong with them."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "model.json"}
        self.asked: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.breaks_off: set[str] = set()  # files of which the first half comes, and then nothing more
        self.changes: set[str] = set()  # files of which one byte is another
        self.stalls_s = 0.0  # before the second half of a file
        self.url = ""

    def tree(self) -> list[dict[str, object]]:
        """The files of the commit, large ones with the checksum that the hub has for them."""
        entries = []
        for name, content in self.files.items():
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": _sha(content)[:40]}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"oid": _sha(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def etag(self, name: str) -> str:
        """As the hub has it: the SHA-256 of large files, git's checksum of others."""
        whole = _sha(self.files[name])
        return whole if name.endswith(".safetensors") else whole[:40]


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer for `hub` at `hub.url` while the body runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.asked[f"{self.command} {path}"] += 1
            if path.startswith(f"/api/models/{NAME}/revision/"):
                self._send(json.dumps({"id": NAME, "sha": COMMIT}).encode(), "", with_body)
            elif path == f"/api/models/{NAME}/tree/{COMMIT}":
                self._send(json.dumps(hub.tree()).encode(), "", with_body)
            elif path.removeprefix(f"/{NAME}/resolve/{COMMIT}/") in hub.files:
                self._send_file(path.rpartition("/")[2], with_body)
            else:
                self.send_error(404)

        def _send_file(self, name: str, with_body: bool) -> None:
            content = hub.files[name]
            if name in hub.changes:
                content = content[:-1] + bytes([content[-1] ^ 1])
            first = 0
            if asked := self.headers.get("Range"):
                hub.ranges.append(asked)
                first = int(asked.removeprefix("bytes=").partition("-")[0])
            self._send(content[first:], name, with_body, first)

        def _send(self, content: bytes, name: str, with_body: bool, first: int = 0) -> None:
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            if name:
                self.send_header("ETag", f'"{hub.etag(name)}"')
            if first:
                total = len(hub.files[name])
                self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
            self.end_headers()
            if not with_body:
                return
            half = 0 if name in hub.breaks_off and first else len(content) // 2
            self.wfile.write(content[:half])
            if name in hub.breaks_off:
                self.wfile.flush()
                self.connection.close()
                return
            if name:
                threading.Event().wait(hub.stalls_s)
            self.wfile.write(content[half:])

        def handle(self) -> None:
            try:
                super().handle()
            except (OSError, ValueError):  # a client that gave up, or a connection that was cut on purpose
                self.close_connection = True

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
