"""Calibration text to token sequences. Unlabelled text in, ``TokenSet`` out; nothing is trained.

A text file is UTF-8, with or without a byte order mark. A line ``<|document domain=NAME|>`` begins a new document; a
file without such lines is one document. Windows of equal length are taken from every domain in turn, evenly spread
over the domain's text, so that a small number of tokens still sees all of it. A seed other than 0 draws each domain's
windows by chance instead; what is held out stays the same for every seed.

Peak memory: the text and its tokens. Raises ``CalibrationError``.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.fs.utf8_text import decode_utf8
from conmoe_edge.errors import CalibrationError
from conmoe_edge.model.tokenizers import encode

_MARK = re.compile(r"^<\|document(?:\s+domain=([\w.-]+))?\|>[ \t]*$", re.MULTILINE)
_HELD_OUT_EVERY = 5
_MIN_TOKENS = 64
_MIN_TEST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the domain that it belongs to (``text`` where none was named)."""

    domain: str
    text: str


@dataclass(frozen=True, slots=True)
class TokenSet:
    """Sequences of one length. ``ids`` [N, T] int64; ``mask`` [N, T] bool, true at real tokens; a domain for each."""

    ids: Tensor
    mask: Tensor
    domains: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.mask.sum())

    def some(self, count: int, after: int = 0) -> TokenSet:
        """At most ``count`` sequences, evenly spread; with ``after`` those that many places behind, where there are
        enough for others.
        """
        total = len(self.domains)
        count = min(count, total)
        rows = sorted({(i * total // count + after) % total for i in range(count)})
        domains = tuple(self.domains[row] for row in rows)
        return TokenSet(self.ids[rows], self.mask[rows], domains)

    def repeated(self, times: int) -> TokenSet:
        """The set so many times, one after another."""
        return TokenSet(self.ids.repeat(times, 1), self.mask.repeat(times, 1), self.domains * times)

    @property
    def padded(self) -> bool:
        """Whether any sequence has padding."""
        return not bool(self.mask.all())


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """The documents to calibrate on, those held out, and a hash of both."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...] | None
    sha256: str


def bundled_text() -> CalibrationText:
    """The text that ships with the package: six domains, and a held-out text from other sources of the same six."""
    folder = files("conmoe_edge") / "data" / "texts"
    train = (folder / "calibration.txt").read_bytes()
    held_out = (folder / "heldout.txt").read_bytes()
    digest = hashlib.sha256(train + b"\0" + held_out).hexdigest()
    return CalibrationText(_split(train.decode()), _split(held_out.decode()), digest)


def read_text(
    path: Path, flag: str = "--calibration", kind: str = "calibration text"
) -> CalibrationText:
    """A user's own text. Part of its windows is held out later (``token_sets``).

    ``flag`` and ``kind`` are what errors call it.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CalibrationError(
            f"The {kind} {path} cannot be read.",
            error.strerror or "",
            f"give another file with {flag}",
        ) from error
    try:
        text = decode_utf8(raw)
    except ValueError as error:
        raise CalibrationError(
            f"The {kind} {path} is not UTF-8 text.",
            str(error),
            f"save it as UTF-8, or leave {flag} out to use the text that comes with the program",
        ) from error
    if not text.strip():
        raise CalibrationError(f"The {kind} {path} is empty.", "", "give a file with text in it")
    return CalibrationText(_split(text), None, hashlib.sha256(raw).hexdigest())


def _split(text: str) -> tuple[Document, ...]:
    text = text.replace("\r\n", "\n")
    marks = list(_MARK.finditer(text))
    if not marks:
        return (Document("text", text),)
    documents = []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=True):
        body = text[mark.end() : end].strip("\n")
        if body.strip():
            documents.append(Document(mark.group(1) or "text", body))
    return tuple(documents)


def token_sets(
    text: CalibrationText,
    tokenizer: Any,
    *,
    length: int,
    tokens: int,
    held_out_tokens: int,
    seed: int = 0,
) -> tuple[TokenSet, TokenSet]:
    """Calibration and held-out sequences.

    Args:
        text: what to read.
        tokenizer: a transformers tokenizer.
        length: tokens of one sequence.
        tokens, held_out_tokens: how many to take at the most; less where the text is short.
        seed: which windows are calibrated on. 0 spreads them evenly, any other seed draws them, as
            many from each domain as 0 takes. A text that is used up has no other windows.

    Raises:
        CalibrationError: the text has too few tokens.
    """
    windows = _windows(text.train, tokenizer, length)
    if text.held_out is not None:
        held = _windows(text.held_out, tokenizer, length)
    else:
        held = {
            domain: rows[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY] for domain, rows in windows.items()
        }
        windows = {
            domain: [
                row
                for number, row in enumerate(rows)
                if number % _HELD_OUT_EVERY != _HELD_OUT_EVERY - 1
            ]
            for domain, rows in windows.items()
        }
        if not any(
            held.values()
        ):  # a text of a few windows: measured on what it was calibrated on, better than nothing
            held = windows
    total = sum(len(row) for rows in windows.values() for row in rows)
    if total < _MIN_TOKENS:
        raise CalibrationError(
            f"The calibration text has only {total} tokens.",
            f"at least {_MIN_TOKENS} are needed, some ten thousand are sensible",
            "give a longer text with --calibration, or leave it out to use the one that comes with the program",
        )
    pad = _pad_of(tokenizer)
    return (
        _take(windows, length, max(1, tokens // length), pad, seed),
        _take(held, length, max(1, held_out_tokens // length), pad),
    )


def evaluation_set(
    text: CalibrationText, tokenizer: Any, *, length: int, tokens: int, seed: int = 0
) -> TokenSet:
    """Sequences to measure on: what the text holds out, or all of a text that holds nothing out.

    Arguments as for ``token_sets``; with the bundled text and seed 0 these are the sequences of the
    receipt.

    Raises:
        CalibrationError: the text has too few tokens.
    """
    documents = text.train if text.held_out is None else text.held_out
    windows = _windows(documents, tokenizer, length)
    total = sum(len(row) for rows in windows.values() for row in rows)
    if total < _MIN_TEST_TOKENS:
        raise CalibrationError(
            f"The text has only {total} tokens.",
            f"at least {_MIN_TEST_TOKENS} are needed, some thousand are sensible",
            "give a longer text with --text, or leave it out to use the one that comes with the program",
        )
    return _take(windows, length, max(1, tokens // length), _pad_of(tokenizer), seed)


def _pad_of(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def _windows(
    documents: Sequence[Document], tokenizer: Any, length: int
) -> dict[str, list[list[int]]]:
    """domain -> its text cut into windows of ``length`` tokens; the last, shorter one is kept if
    nothing else is there.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    streams: dict[str, list[int]] = {}
    for document in documents:
        ids = encode(tokenizer, document.text)
        streams.setdefault(document.domain, []).extend([*ids, *end])
    result = {}
    for domain, ids in sorted(streams.items()):
        rows = [ids[start : start + length] for start in range(0, len(ids), length)]
        if len(rows) > 1 and len(rows[-1]) < length:
            rows.pop()
        result[domain] = rows
    return result


def _take(
    windows: dict[str, list[list[int]]], length: int, count: int, pad: int, seed: int = 0
) -> TokenSet:
    """Up to ``count`` windows, the domains in turn; evenly spread within each, or drawn by a seed."""
    domains = [domain for domain, rows in sorted(windows.items()) if rows]
    share = dict.fromkeys(domains, 0)
    while sum(share.values()) < count:
        open_domains = [domain for domain in domains if share[domain] < len(windows[domain])]
        if not open_domains:
            break
        for domain in open_domains[: count - sum(share.values())]:
            share[domain] += 1
    rows: list[list[int]] = []
    names: list[str] = []
    for domain in domains:
        available = windows[domain]
        for number in _chosen(len(available), share[domain], domain, seed):
            rows.append(available[number])
            names.append(domain)
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[number, : len(row)] = True
    return TokenSet(ids, mask, tuple(names))


def _chosen(available: int, count: int, domain: str, seed: int) -> list[int]:
    """Which of a domain's windows, in ascending order."""
    if seed == 0:
        return [number * available // count for number in range(count)]
    # The generator's seed is text, so that domains do not draw alike; sha512 of it is stable.
    return sorted(random.Random(f"{seed} {domain}").sample(range(available), count))
