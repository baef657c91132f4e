"""A Hugging Face hub on this machine: the part of its HTTP interface by which huggingface_hub makes
repositories, uploads a folder and downloads a snapshot. Repositories are dicts of bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40  # the one revision of every repository


class StubHub(ThreadingHTTPServer):
    """Within `with`: serves `repositories`, {"OWNER/NAME": {path: content}}, at `address`."""

    def __init__(self, repositories: dict[str, dict[str, bytes]] | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories or {}
        self.requests: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> StubHub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubHub

    def log_message(self, *words: object) -> None:
        """Nothing to the terminal."""

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _absent(self, code: str) -> None:
        self._answer({"error": code}, 404, X_Error_Code=code)

    def do_GET(self) -> None:
        """Files of a repository, its list of files, and what it is."""
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path)
        if match:
            self._file(match[1], match[2])
            return
        match = re.fullmatch(r"api/models/([\w.-]+/[\w.-]+)(?:/(tree|revision)/(\w+))?", path)
        files = self.server.repositories.get(match[1]) if match else None
        if match is None or files is None:
            self._absent("RepoNotFound")
        elif match[3] not in (None, "main", COMMIT):
            self._absent("RevisionNotFound")
        elif match[2] == "tree":
            self._answer([_entry(name, content) for name, content in files.items()])
        else:
            siblings = [{"rfilename": name} for name in files]
            self._answer({"id": match[1], "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_GET

    def _file(self, repository: str, name: str) -> None:
        files = self.server.repositories.get(repository)
        if files is None:
            self._absent("RepoNotFound")
        elif name not in files:
            self._absent("EntryNotFound")
        else:
            tag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            self._answer(files[name], ETag=tag, X_Repo_Commit=COMMIT)

    def do_POST(self) -> None:
        """A new repository, the question of how to upload a file, and a commit."""
        path = unquote(urlsplit(self.path).path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"POST {path}")
        if path == "api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.server.repositories.setdefault(name, {})
            self._answer({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer({"files": [{"path": f["path"], **plain} for f in files]})
        elif "/commit/" in path:
            self._commit(path.split("/commit/")[0].removeprefix("api/models/"), body)
        elif path.startswith("api/"):
            self._answer({})
        else:
            self._absent("RepoNotFound")

    def _commit(self, repository: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.server.repositories[repository][entry["value"]["path"]] = content
        url = f"{self.server.address}/{repository}/commit/{COMMIT}"
        self._answer({"success": True, "commitOid": COMMIT, "commitUrl": url})


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """A file as the list of a repository names it."""
    return {
        "type": "file", "path": name, "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }  # fmt: skip
