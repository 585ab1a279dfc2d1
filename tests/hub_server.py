"""A Hugging Face hub on the loopback: serves directories to the real clients, so that tests need no network.

    with HubServer(models={"org/name": directory}, datasets={"org/data": other}) as server:
        subprocess.run([...], env=server.environment(cache_dir), check=True)
        assert server.downloads == ["org/name/config.json"]

Speaks what huggingface_hub 0.36, transformers 4.57 and datasets 5.0 ask for: repository information, trees, paths-info
and files with ETag, commit and ranges. Every repository has one revision, `main`, whose commit is a hash of the file
names and contents. Clients read `HF_ENDPOINT` when they are imported: run them in a subprocess.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<call>revision|tree|paths-info)/(?P<rest>.+))?"
)
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
RANGE = re.compile(r"bytes=(\d*)-(\d*)")
CLIENT_VARIABLES = ("HF_", "HUGGING", "TRANSFORMERS_")  # caches, tokens and offline switches of the caller
DATE = "2024-01-01T00:00:00.000Z"


class NotFound(Exception):
    """A 404; its argument is the hub's error code: RepoNotFound, RevisionNotFound or EntryNotFound."""


@dataclass(frozen=True)
class Repository:
    """A directory as the hub shows it; its files must not change while it is served."""

    repo_id: str
    directory: Path

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-1 of each file, by its path in the repository."""
        paths = sorted(path for path in self.directory.rglob("*") if path.is_file())
        return {
            path.relative_to(self.directory).as_posix(): hashlib.sha1(path.read_bytes()).hexdigest() for path in paths
        }

    @cached_property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps([self.repo_id, self.hashes]).encode()).hexdigest()

    def check_revision(self, revision: str) -> None:
        if revision not in ("main", self.commit):
            raise NotFound("RevisionNotFound")

    def file(self, path: str) -> Path:
        if path not in self.hashes:
            raise NotFound("EntryNotFound")
        return self.directory / path

    def information(self) -> dict[str, Any]:
        return {
            "_id": self.commit[:24],
            "id": self.repo_id,
            "sha": self.commit,
            "lastModified": DATE,
            "createdAt": DATE,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path} for path in self.hashes],
        }

    def entry(self, path: str) -> dict[str, Any] | None:
        """What the hub's tree says of a file or a folder; None where there is neither."""
        if path in self.hashes:
            return {"type": "file", "path": path, "oid": self.hashes[path], "size": self.file(path).stat().st_size}
        if any(name.startswith(f"{path}/") for name in self.hashes):
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
        return None

    def tree(self, folder: str, *, recursive: bool) -> list[dict[str, Any] | None]:
        prefix = f"{folder}/" if folder else ""
        below = [name for name in self.hashes if name.startswith(prefix)]
        if not below:
            raise NotFound("EntryNotFound")
        paths: set[str] = set()
        for name in below:
            parts = name[len(prefix) :].split("/")
            depths = range(1, len(parts) + 1) if recursive else (1,)
            paths |= {prefix + "/".join(parts[:depth]) for depth in depths}
        return [self.entry(path) for path in sorted(paths)]


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; `server` is the HubServer's."""

    server: _Server
    protocol_version = "HTTP/1.1"  # clients keep their connection open

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: tests read `requests`."""

    def _answer(self, respond: Any) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, path))
        try:
            respond(path, parse_qs(url.query), body)
        except NotFound as error:
            code = str(error)
            self._send(HTTPStatus.NOT_FOUND, json.dumps({"error": code}).encode(), {"X-Error-Code": code})

    def _get(self, path: str, query: Mapping[str, list[str]], body: bytes) -> None:
        if match := API.fullmatch(path):
            repository = self._repository(match["kind"], match["repo"])
            revision, _, folder = (match["rest"] or "main").partition("/")
            repository.check_revision(revision)
            if match["call"] == "tree":
                recursive = query.get("recursive", ["False"])[0].lower() in ("true", "1")
                self._send_json(repository.tree(folder, recursive=recursive))
            else:
                self._send_json(repository.information())
        elif match := FILE.fullmatch(path):
            repository = self._repository("datasets" if match["kind"] else "models", match["repo"])
            repository.check_revision(match["revision"])
            self._send_file(repository, match["path"])
        else:
            raise NotFound("RepoNotFound")

    def _post(self, path: str, query: Mapping[str, list[str]], body: bytes) -> None:
        match = API.fullmatch(path)
        if match is None or match["call"] != "paths-info":
            raise NotFound("RepoNotFound")
        repository = self._repository(match["kind"], match["repo"])
        repository.check_revision(match["rest"])
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        self._send_json([entry for entry in map(repository.entry, paths) if entry is not None])

    def _repository(self, kind: str, repo_id: str) -> Repository:
        try:
            return self.server.repositories[kind, repo_id]
        except KeyError:
            raise NotFound("RepoNotFound") from None

    def _send_file(self, repository: Repository, path: str) -> None:
        content = repository.file(path).read_bytes()
        headers = {
            "ETag": f'"{repository.hashes[path]}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        wanted = RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted is None or wanted.groups() == ("", ""):
            self._send(HTTPStatus.OK, content, headers)
            return
        start, stop = _range(*wanted.groups(), size=len(content))
        if start >= stop:
            headers["Content-Range"] = f"bytes */{len(content)}"
            self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", headers)
        else:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self._send(HTTPStatus.PARTIAL_CONTENT, content[start:stop], headers)

    def _send_json(self, value: object) -> None:
        self._send(HTTPStatus.OK, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: HTTPStatus, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _range(first: str, last: str, *, size: int) -> tuple[int, int]:
    """The half-open interval of `bytes=first-last`; `bytes=-n` means the last n bytes."""
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a client that keeps its connection open does not hold the test up

    def __init__(self, repositories: Mapping[tuple[str, str], Repository]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.requests: list[tuple[str, str]] = []


class HubServer:
    """Context manager that serves `models` and `datasets`, directories by repository id, on a free port.

    Attributes:
        requests: (method, path) of every request so far, in order of arrival; paths without their query.
    """

    def __init__(
        self, models: Mapping[str, Path | str] | None = None, datasets: Mapping[str, Path | str] | None = None
    ) -> None:
        repositories = {
            (kind, repo_id): Repository(repo_id, Path(directory))
            for kind, directories in (("models", models or {}), ("datasets", datasets or {}))
            for repo_id, directory in directories.items()
        }
        self._server = _Server(repositories)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def downloads(self) -> list[str]:
        """`repository/path` of every file whose content was asked for, in order of arrival."""
        matches = [FILE.fullmatch(path) for method, path in self.requests if method == "GET"]
        return [f"{match['repo']}/{match['path']}" for match in matches if match]

    @property
    def requests(self) -> list[tuple[str, str]]:
        return self._server.requests

    def environment(self, cache: Path | str) -> dict[str, str]:
        """This process's environment, for a client in a subprocess: this hub, an own `HF_HOME`, no proxy, no token."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(CLIENT_VARIABLES)}
        no_proxy = ",".join(filter(None, [inherited.get("NO_PROXY") or inherited.get("no_proxy"), "127.0.0.1"]))
        return {
            **inherited,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }
