"""A small HTTP server with the endpoints of the Hugging Face hub for uploads."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the server was asked: repositories, branches, and the files of commits by branch and name."""

    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """The answer to a POST."""
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.address}/someone/student", "name": "someone/student"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        _, _, kind, revision = path.removeprefix("/api/models/").split("/", 3)
        if kind == "branch":
            self.branches.append(revision)
            return {}
        if kind == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        assert kind == "commit", path
        files = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
        stored = {file["path"]: base64.b64decode(file["content"]) for file in files}
        self.commits.setdefault(revision, {}).update(stored)
        return {
            "success": True,
            "commitOid": "0" * 40,
            "commitUrl": f"{self.address}/someone/student/commit/{'0' * 40}",
        }


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the base class
        del format, args

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        content = json.dumps(self.hub.answer(self.path.partition("?")[0], body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A hub on this machine, for HF_ENDPOINT."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
