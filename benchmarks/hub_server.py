"""A model hub on 127.0.0.1, for tests and measurements: the part of the hub's protocol that is used for reading.

    python benchmarks/hub_server.py org/name=FOLDER ...       serves folders
    python benchmarks/hub_server.py --generate qwen3-30b      serves a 61 GB repository that lies nowhere
    HF_ENDPOINT=http://127.0.0.1:PORT conmoe-edge fit org/name ...

What it speaks: model info, tree, ``resolve`` with HEAD and GET (``ETag``, ``X-Repo-Commit``, ``X-Linked-Size``,
``X-Linked-Etag``), redirects of large files to a "CDN" under another name of this host, ranges. Faults on demand
(``Faults``), and a count of what was served by file. It sends no byte anywhere but to who asks on the loopback.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

CHUNK = 1 << 20
COMMIT = "c0" * 20
LARGE = ("*.safetensors", "tokenizer.json")
"""What the hub keeps outside git, so that its ETag is a SHA-256 and a GET is redirected."""
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_PATHS = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_CDN = re.compile(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)")
_API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?")


@dataclass(frozen=True)
class ServedFile:
    """One file: its ``size``, its digest as the hub would name it, and its bytes from ``start`` to ``stop``."""

    size: int
    digest: str
    large: bool
    read: Callable[[int, int], Iterator[bytes | memoryview]]

    @property
    def etag(self) -> str:
        """As the hub quotes it."""
        return f'"{self.digest}"'


@dataclass
class Fault:
    """Something that goes wrong with files whose name matches ``files``, ``times`` times, for ``kinds`` of requests.

    Attributes:
        status: answered in the place of the file.
        cut_after: bytes of the body after which the connection is closed.
        wait: seconds before each MiB of the body.
        etag: said in the place of the right one.
        no_ranges: the whole file is sent whatever range was asked for.
        kinds: ``HEAD``, ``GET``.
        skip: requests that go well before it.
    """

    files: str
    times: int = 1 << 30
    status: int = 0
    cut_after: int | None = None
    wait: float = 0.0
    etag: str = ""
    no_ranges: bool = False
    kinds: tuple[str, ...] = ("GET",)
    skip: int = 0


@dataclass(frozen=True)
class Asked:
    """One request: ``sent`` bytes of a body."""

    method: str
    path: str
    host: str
    authorization: str | None
    range: str | None


@dataclass
class Hub:
    """What is served, what goes wrong, and what was asked.

    Attributes:
        repositories: id -> name -> file.
        cdn_host: the name that large files are redirected to; empty: the same host, another path; ``None``: no
            redirects.
        commit: that every repository is at.
        private: repositories that say so of themselves.
        token: asked for by the hub (not by its CDN), if set.
    """

    repositories: dict[str, Mapping[str, ServedFile]] = field(default_factory=dict)
    cdn_host: str | None = "localhost"
    token: str | None = None
    faults: list[Fault] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    asked: list[Asked] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    commit: str = COMMIT
    private: set[str] = field(default_factory=set)

    def write(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON answer to what would change something: this hub is for reading only."""
        return 405, {"error": "this hub is for reading only"}

    def fault(self, name: str, kind: str) -> Fault | None:
        """What goes wrong now, counted down."""
        with self.lock:
            for one in self.faults:
                if one.times > 0 and kind in one.kinds and fnmatchcase(name, one.files):
                    if one.skip > 0:
                        one.skip -= 1
                        continue
                    one.times -= 1
                    return one
        return None

    def count(self, name: str, nbytes: int) -> None:
        """Bytes of a body that were sent."""
        with self.lock:
            self.served[name] += nbytes

    def weight_bytes(self) -> int:
        """Served so far of files with weights."""
        with self.lock:
            return sum(n for name, n in self.served.items() if name.endswith(".safetensors"))

    def forget(self) -> None:
        """Begin to count anew."""
        with self.lock:
            self.served.clear()
            self.asked.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._write("POST")

    def do_PUT(self) -> None:
        self._write("PUT")

    def _write(self, method: str) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        body, authorization = self._received(), self.headers.get("Authorization")
        with hub.lock:
            hub.asked.append(Asked(method, path, self.headers.get("Host", ""), authorization, None))
        # As with the real one, the place for large files knows who may write by its address.
        if method == "POST" and hub.token is not None and authorization != f"Bearer {hub.token}":
            status, value = 401, {"error": "who are you?"}
        else:
            status, value = hub.write(method, path, body)
        self._plain(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _received(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, method: str) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        with hub.lock:
            hub.asked.append(
                Asked(
                    method,
                    path,
                    self.headers.get("Host", ""),
                    authorization,
                    self.headers.get("Range"),
                )
            )
        cdn = _CDN.fullmatch(path)
        if cdn is None and hub.token is not None and authorization != f"Bearer {hub.token}":
            self._plain(401, b"who are you?", {"X-Error-Code": "GatedRepo"})
        elif cdn is not None:
            self._file(method, cdn[1], cdn[3], redirect=False)
        elif (found := _PATHS.fullmatch(path)) is not None:
            self._file(method, found[1], found[3], redirect=hub.cdn_host is not None)
        elif (found := _API.fullmatch(path)) is not None:
            self._about(found[1], found[2])
        else:
            self._plain(404, b"no such path", {})

    def _about(self, repository: str, what: str | None) -> None:
        files = self.server.hub.repositories.get(repository)
        if files is None:
            self._plain(404, b"no such repository", {"X-Error-Code": "RepoNotFound"})
            return
        if what == "tree":
            value: Any = [_tree_entry(name, file) for name, file in sorted(files.items())]
        else:
            siblings = [{"rfilename": name} for name in sorted(files)]
            value = {
                "id": repository,
                "modelId": repository,
                "sha": self.server.hub.commit,
                "siblings": siblings,
            }
            value |= {
                "private": repository in self.server.hub.private,
                "gated": False,
                "tags": [],
                "downloads": 0,
            }
        self._plain(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, method: str, repository: str, name: str, *, redirect: bool) -> None:
        hub = self.server.hub
        files = hub.repositories.get(repository)
        if files is None:
            self._plain(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        file = files.get(name)
        if file is None:
            self._plain(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit})
            return
        moves = redirect and file.large
        fault = None if moves and method == "GET" else hub.fault(name, method)
        if fault is not None and fault.status:
            self._plain(fault.status, b"no", {})
            return
        etag = f'"{fault.etag}"' if fault is not None and fault.etag else file.etag
        headers = {"ETag": etag, "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
        if moves:
            host = hub.cdn_host or self.headers.get("Host", "").partition(":")[0]
            port = self.server.server_address[1]
            location = f"http://{host}:{port}/cdn/{repository}/{hub.commit}/{name}"
            linked = {"X-Linked-Size": str(file.size), "X-Linked-Etag": etag, "Location": location}
            self._plain(302, b"", headers | linked)
            return
        self._body(method, name, file, headers, fault)

    def _body(
        self,
        method: str,
        name: str,
        file: ServedFile,
        headers: dict[str, str],
        fault: Fault | None,
    ) -> None:
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        if fault is not None and fault.no_ranges:
            wanted = None
        start, stop = 0, file.size
        if wanted is not None:
            start = int(wanted[1])
            stop = min(file.size, int(wanted[2]) + 1) if wanted[2] else file.size
            if start >= stop:
                self._plain(416, b"", {"Content-Range": f"bytes */{file.size}"})
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
        self.send_response(200 if wanted is None else 206)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if method == "HEAD":
            return
        sent = 0
        for chunk in file.read(start, stop):
            if fault is not None and fault.wait:
                time.sleep(fault.wait)
            if fault is not None and fault.cut_after is not None:
                chunk = chunk[: fault.cut_after - sent]
            try:
                self.wfile.write(chunk)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
                return
            sent += len(chunk)
            self.server.hub.count(name, len(chunk))
            if fault is not None and fault.cut_after is not None and sent >= fault.cut_after:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return

    def _plain(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree_entry(name: str, file: ServedFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": file.size}
    entry["oid"] = hashlib.sha1(file.digest.encode()).hexdigest() if file.large else file.digest
    if file.large:
        entry["lfs"] = {"oid": file.digest, "size": file.size, "pointerSize": 134}
    return entry


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, hub: Hub, port: int) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Serving:
    """A hub that answers while the block runs; ``endpoint`` is what ``HF_ENDPOINT`` takes."""

    def __init__(self, hub: Hub, port: int = 0) -> None:
        self.hub = hub
        self._server = _Server(hub, port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.daemon = True

    @property
    def endpoint(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Serving:
        self._thread.start()
        return self

    def __exit__(self, *gone: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def folder_repository(folder: Path) -> dict[str, ServedFile]:
    """The files of a folder as a repository has them."""
    return {path.name: _folder_file(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _folder_file(path: Path) -> ServedFile:
    data, large = path.read_bytes(), any(fnmatchcase(path.name, one) for one in LARGE)
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def read(start: int, stop: int) -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(start)
            while start < stop:
                chunk = file.read(min(CHUNK, stop - start))
                start += len(chunk)
                yield chunk

    return ServedFile(len(data), hashlib.sha256(data).hexdigest() if large else git, large, read)


def bytes_file(data: bytes, *, large: bool = False) -> ServedFile:
    """A file in memory."""

    def read(start: int, stop: int) -> Iterator[memoryview]:
        for begin in range(start, stop, CHUNK):
            yield memoryview(data)[begin : min(begin + CHUNK, stop)]

    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return ServedFile(len(data), hashlib.sha256(data).hexdigest() if large else git, large, read)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", metavar="ORG/NAME=FOLDER")
    parser.add_argument("--generate", metavar="SHAPE", help="a shape of generated_checkpoint.py")
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    hub = Hub()
    for one in given.folders:
        name, _, folder = one.partition("=")
        hub.repositories[name] = folder_repository(Path(folder))
    if given.generate:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from benchmarks.generated_checkpoint import SHAPES, repository

        shape = SHAPES[given.generate]
        hub.repositories[f"generated/{given.generate}"] = repository(shape)
    with Serving(hub, given.port) as serving:
        print(f"HF_ENDPOINT={serving.endpoint}", flush=True)
        for name, files in hub.repositories.items():
            print(f"  {name}: {sum(file.size for file in files.values()):,} bytes", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("\n".join(f"{n:>16,}  {name}" for name, n in sorted(hub.served.items())))


if __name__ == "__main__":
    main()
