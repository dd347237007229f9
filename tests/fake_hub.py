"""A hub on this machine: as much of the Hugging Face Hub's interface as small files need."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Hub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.tokens: list[str | None] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str) -> str:
        content = repr(sorted(self.files.get(name, {}).items())).encode()
        return hashlib.sha1(content, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: _Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._reply(status, json.dumps(value).encode(), Content_Type="application/json")

    def _missing(self) -> None:
        self._reply(404, b"{}", X_Error_Code="RepoNotFound")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"]:
            name = "/".join(path[2:4])
            files = self.server.files.get(name)
            if files is None:
                self._missing()
                return
            if "tree" in path:
                entries = [
                    {"type": "file", "path": key, "size": len(content), "oid": _oid(content)}
                    for key, content in files.items()
                ]
                self._json(entries)
                return
            siblings = [{"rfilename": key} for key in files]
            self._json({"id": name, "modelId": name, "sha": self.server.commit(name), "siblings": siblings,
                        "private": False, "downloads": 0, "likes": 0, "tags": []})  # fmt: skip
            return
        name, file = "/".join(path[:2]), "/".join(path[4:])
        content = self.server.files.get(name, {}).get(file)
        if content is None:
            self._missing()
            return
        self._reply(200, content, ETag=f'"{_oid(content)}"', X_Repo_Commit=self.server.commit(name))

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.append(self.headers.get("Authorization"))
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[-2:] == ["repos", "create"]:
            asked = json.loads(body)
            name = asked["name"] if "/" in asked["name"] else f"{asked['organization']}/{asked['name']}"
            if name.startswith("forbidden/"):
                self._json({"error": "you may not write here"}, 403)
                return
            self.server.files.setdefault(name, {})
            self._json({"url": f"{self.server.address}/{name}", "id": name})
        elif "preupload" in path:
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for each in json.loads(body)["files"]]  # fmt: skip
            self._json({"files": files})
        elif "commit" in path:
            name = "/".join(path[2:4])
            for line in body.splitlines():
                each = json.loads(line)
                if each["key"] == "file":
                    content = base64.b64decode(each["value"]["content"])
                    self.server.files[name][each["value"]["path"]] = content
            commit = self.server.commit(name)
            self._json(
                {
                    "commitUrl": f"{self.server.address}/{name}/commit/{commit}",
                    "commitOid": commit,
                    "success": True,
                }
            )
        else:
            self._json({})


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def hub() -> Iterator[tuple[str, _Hub]]:
    """Its address, and what it holds."""
    server = _Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.address, server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
