"""Parts of the weights files of a hub model, over the hub's own client: no file is ever fetched whole.

What a file is, its size and ETag, is asked once and fixed. Every later answer must agree with it, and come from the
same commit. A connection that breaks goes on where it broke; the client's own backoff answers 429 and 5xx. The token
goes to the hub alone: where the hub sends the reader on to another host, it is left out, as the client does it.

Peak memory: one piece of 1 MiB. Raises ``CheckpointError`` (changed, cannot be read in parts), ``ModelNotFound``.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from conmoe_edge.checkpoint.sources.hub import hub_errors
from conmoe_edge.errors import CheckpointError

_PIECE = 1 << 20
_TRIES = 6
"""Answers in a row that bring nothing, before it is given up."""
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 8.0
_TIMEOUT = 30.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_MOVED = frozenset({401, 403, 404, 410})
"""What a storage host says to a signed address that has run out."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of the hub as it was when the run began. ``etag`` is its SHA-256 where the hub keeps it outside git."""

    name: str
    size: int
    etag: str

    @property
    def sha256(self) -> str | None:
        """The hub's own digest, where it has one."""
        return self.etag if _SHA256.fullmatch(self.etag) else None


class HubRanges:
    """The weights files of one commit. Reads from several threads are safe.

    Args:
        hub_id: ``org/name``.
        commit: the commit; never a branch, which moves.

    Attributes:
        received: bytes of bodies so far.
    """

    def __init__(self, hub_id: str, commit: str) -> None:
        self.hub_id = hub_id
        self.commit = commit
        self.received = 0
        self._files: dict[str, RemoteFile] = {}
        self._places: dict[str, str] = {}
        self._lock = threading.Lock()

    def file(self, name: str) -> RemoteFile:
        """What ``name`` is; asked at the first call.

        Raises:
            CheckpointError: there is no such file, or the hub does not say what it is.
        """
        with self._lock:
            known = self._files.get(name)
        return known or self._ask(name)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop``."""
        return b"".join(self.pieces(name, start, stop))

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fill ``view`` from ``start`` on."""
        done = 0
        for piece in self.pieces(name, start, start + len(view)):
            view[done : done + len(piece)] = piece
            done += len(piece)

    def pieces(
        self, name: str, start: int, stop: int, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[bytes]:
        """The bytes from ``start`` to ``stop`` in pieces; ends early where ``stopped`` says so.

        Raises:
            CheckpointError: the file has changed, or the server has no parts of files.
            ModelNotFound: the hub cannot be reached, or refuses.
        """
        file, tries = self.file(name), 0
        while start < stop and not stopped():
            got = 0
            for piece in self._once(file, start, stop):
                got += len(piece)
                yield piece
                if stopped():
                    return
            start += got
            tries = 0 if got else tries + 1
            if tries >= _TRIES:
                raise CheckpointError(
                    f"The hub does not give {name} of {self.hub_id}.",
                    f"{_TRIES} answers in a row broke off before the first byte.",
                    "Run the same command again later: it goes on where it stopped.",
                )
            if start < stop:
                time.sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2**tries))

    def _once(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        """What one connection gives of a range: perhaps not all of it."""
        from huggingface_hub import errors, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        get_session()
        with self._lock:
            place = self._places[file.name]
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        headers["Range"] = f"bytes={start}-{stop - 1}"
        if not self._is_hub(place):
            headers.pop("authorization", None)
        with hub_errors(self.hub_id, self.commit, offline=False):
            answer = http_stream_backoff(
                "GET", place, headers=headers, follow_redirects=True, timeout=_TIMEOUT
            )
            with answer as response:
                if response.status_code in _MOVED and not self._is_hub(place):
                    moved = self._ask(
                        file.name, known=file
                    )  # also says what is wrong, if it is more than that
                    assert moved == file
                    return
                hf_raise_for_status(response)
                self._check(file, start, stop, response)
                done = start
                try:
                    for piece in response.iter_raw(_PIECE):
                        wanted = piece[: stop - done]
                        done += len(wanted)
                        with self._lock:
                            self.received += len(wanted)
                        yield wanted
                except errors.HTTPError:  # pyright: ignore[reportPrivateImportUsage]
                    return  # it broke; the caller goes on behind what came

    def _ask(self, name: str, known: RemoteFile | None = None) -> RemoteFile:
        """What the hub says of a file now, and where its bytes are.

        Raises:
            CheckpointError: it is not ``known`` any more.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.hub_id, name, revision=self.commit)
        with hub_errors(self.hub_id, self.commit, offline=False):
            said = get_hf_file_metadata(url, retry_on_errors=True)
        if not said.etag or said.size is None:
            raise CheckpointError(
                f"The hub does not say what {name} of {self.hub_id} is.",
                "It gives no ETag or no size.",
                "--keep-source downloads the whole model first.",
            )
        if said.commit_hash not in (None, self.commit):
            raise self._changed(name, f"the commit is {said.commit_hash} and was {self.commit}")
        found = RemoteFile(name, said.size, said.etag)
        if known is not None and found != known:
            raise self._changed(name, _difference(known, found))
        with self._lock:
            self._files[name] = found
            self._places[name] = said.location
        return found

    def _check(self, file: RemoteFile, start: int, stop: int, response: Any) -> None:
        """Whether an answer is a part of the file that was there when the run began.

        A storage host has ETags of its own kind; one of the same kind, or one from the hub itself, must be the same.
        """
        headers: Mapping[str, str] = response.headers
        etag = headers.get("ETag", "").removeprefix("W/").strip('"')
        same_kind = bool(_SHA256.fullmatch(etag)) == bool(file.sha256)
        if (
            etag
            and etag != file.etag
            and ("X-Repo-Commit" in headers or (same_kind and file.sha256))
        ):
            raise self._changed(file.name, f"its ETag is {etag[:64]} and was {file.etag}")
        commit = headers.get("X-Repo-Commit")
        if commit not in (None, self.commit):
            raise self._changed(file.name, f"the commit is {commit} and was {self.commit}")
        said = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        if response.status_code != 206 or said is None:
            raise CheckpointError(
                f"{file.name} of {self.hub_id} cannot be read in parts.",
                "The server sends whole files only.",
                "--keep-source downloads the whole model first.",
            )
        first, last, size = map(int, said.groups())
        if size != file.size:
            raise self._changed(file.name, f"it has {size} bytes and had {file.size}")
        if first != start or last >= stop:
            raise CheckpointError(
                f"The server sent another part of {file.name} than was asked for.",
                f"bytes {first} to {last} in the place of {start} to {stop - 1}",
                "--keep-source downloads the whole model first.",
            )

    def _is_hub(self, url: str) -> bool:
        from huggingface_hub import constants

        ours, theirs = urlsplit(constants.ENDPOINT), urlsplit(url)
        return (ours.scheme, ours.netloc) == (theirs.scheme, theirs.netloc)

    def _changed(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"{name} of {self.hub_id} has changed on the hub while it was read.",
            why,
            "Run the same command with --fresh.",
        )


def _difference(known: RemoteFile, found: RemoteFile) -> str:
    if found.size != known.size:
        return f"it has {found.size} bytes and had {known.size}"
    return f"its ETag is {found.etag[:64]} and was {known.etag[:64]}"
