"""A model hub on this machine: the part of its HTTP interface that uploading a folder asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["FakeHub", "fake_hub"]


@dataclass
class FakeHub:
    """Branches of one repository: path -> content. asked: (method, path) of every request."""

    endpoint: str = ""
    repo: str = ""
    private: bool | None = None
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serves until the block ends."""
    hub = FakeHub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._note()
        parts = self.path.partition("?")[0].split("/")
        if "/tree/" in self.path or "/revision/" in self.path or self.path.count("/") == 4:
            files = self.hub.branches.get(parts[-1], self.hub.branches.get("main", {}))
            if "/tree/" in self.path:
                told = [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(c),
                        "oid": hashlib.sha1(c).hexdigest(),
                    }
                    for path, c in files.items()
                ]
                return self._answer(told)
            return self._answer(
                {
                    "id": self.hub.repo,
                    "sha": "0" * 40,
                    "siblings": [{"rfilename": p} for p in files],
                }
            )
        return self._answer({"error": "not here"}, 404)

    def do_POST(self) -> None:
        content = self._note()
        hub, path = self.hub, self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(content)
            hub.repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.private = asked.get("private", asked.get("visibility") == "private")
            hub.branches.setdefault("main", {".gitattributes": b"", "stale.bin": b"old"})
            return self._answer({"url": f"{hub.endpoint}/{hub.repo}", "name": hub.repo})
        if "/branch/" in path:
            hub.branches.setdefault(path.rpartition("/")[2], dict(hub.branches["main"]))
            return self._answer({})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            return self._answer(self._modes(json.loads(content)))
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{one['oid']}"}}}
                for one in json.loads(content)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            self._commit(hub.branches[path.rpartition("/")[2]], content)
            url = f"{hub.endpoint}/{hub.repo}/commit/{'1' * 40}"
            return self._answer({"commitUrl": url, "commitOid": "1" * 40})
        return self._answer({"error": "not here"}, 404)

    def do_PUT(self) -> None:
        content = self._note()
        oid = self.path.rpartition("/")[2]
        right = hashlib.sha256(content).hexdigest() == oid
        if right:
            self.hub.stored[oid] = content
        self._answer({}, 200 if right else 400)

    def _modes(self, asked: dict) -> dict:
        files = []
        for path in (one["path"] for one in asked["files"]):
            mode = "lfs" if path.endswith((".onnx", ".data")) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None})
        return {"files": files}

    def _commit(self, files: dict[str, bytes], content: bytes) -> None:
        for line in content.decode().splitlines():
            told = json.loads(line)
            about = told["value"]
            if told["key"] == "file":
                files[about["path"]] = base64.b64decode(about["content"])
            elif told["key"] == "lfsFile":
                files[about["path"]] = self.hub.stored[about["oid"]]
            elif told["key"] == "deletedFile":
                del files[about["path"]]

    def _note(self) -> bytes:
        self.hub.asked.append((self.command, self.path))
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, document: object, status: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
