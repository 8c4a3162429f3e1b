"""A small Hugging Face hub on loopback: the endpoints that huggingface_hub asks, over folders of
this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_loopback"


class Hub:
    """Serves `root/ORG/NAME`, each with the revisions `main` and `v1`. Organisation `private` asks
    for `TOKEN`.

    Attributes:
      asked: method and path of every request.
      breaks: file names whose connection breaks once, half way.
    """

    def __init__(self, root: Path):
        self.root, self.asked, self.breaks = root, [], set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def fetched(self) -> list[str]:
        """Names of the files whose contents were asked for."""
        return [
            path.partition(f"/resolve/{SHA}/")[2]
            for method, path in self.asked
            if method == "GET" and "/resolve/" in path
        ]


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Hub]:
    hub = Hub(root)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        patterns = (
            r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)",
            r"/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)",
        )
        found = next((m for p in patterns if (m := re.fullmatch(p, path))), None)
        folder = self.hub.root / found[1] if found else None
        private = (
            found
            and found[1].startswith("private/")
            and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        )
        if folder is None or not folder.is_dir() or private:
            self._refuse(401, "RepoNotFound")
        elif found[3] not in (SHA, "main", "v1"):
            self._refuse(404, "RevisionNotFound")
        elif found[2] == "resolve":
            self._file(folder / found[4])
        else:
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            names = [str(file.relative_to(folder)) for file in files]
            info = {
                "id": found[1],
                "sha": SHA,
                "siblings": [{"rfilename": name} for name in names],
                "private": False,
                "tags": [],
            }
            rows = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)}
                for name, file in zip(names, files, strict=True)
            ]
            self._send(
                json.dumps(info if found[2] == "revision" else rows).encode(),
                {"Content-Type": "application/json"},
            )

    def _file(self, file: Path) -> None:
        if not file.is_file():
            self._refuse(404, "EntryNotFound")
            return
        data, status = file.read_bytes(), 200
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if (given := self.headers.get("Range")) and (start := re.fullmatch(r"bytes=(\d+)-", given)):
            at, status = int(start[1]), 206
            headers["Content-Range"] = f"bytes {at}-{len(data) - 1}/{len(data)}"
            data = data[at:]
        broken = self.command == "GET" and file.name in self.hub.breaks
        if broken:
            self.hub.breaks.remove(file.name)
        self._send(data, headers, status, cut=broken)

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def _send(
        self, data: bytes, headers: dict[str, str], status: int = 200, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
