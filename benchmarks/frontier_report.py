"""What ``frontier.py`` found, as tables: ours beside the better of llama.cpp's types at equal bytes. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

OURS, LLAMA = "ours", "llama.cpp"
PARTS = {
    "experts": "Experts only; what is dense is the checkpoint's own on both sides.",
    "whole": "The whole file: what is dense is in few bits as well.",
}
CLEAR_RISE = 0.002
"""A rise of the loss below this, nats a token, is within the noise of the text: KL decides there."""
FEW_BITS, WANTED_BELOW, WANTED_ABOVE = 4.4, 0.5, 0.8
"""Most of llama.cpp's KL that ours may have: ``WANTED_BELOW`` with fewer bits than ``FEW_BITS``, else the other."""

Curve = list[tuple[float, float]]
"""(size, KL or rise), the size ascending and the value descending."""


@dataclass(frozen=True, slots=True)
class Point:
    """One arm with one calibration seed. ``size`` in bits: what its part takes over the original's weights of it."""

    part: str
    system: str
    name: str
    seed: int
    size: float
    experts_bytes: int
    file_bytes: int
    rise: float
    kl: float
    exact: float | None = None

    @classmethod
    def of(cls, key: str, row: Mapping[str, Any], weights: Mapping[str, int]) -> Point:
        """From the ledger; ``weights`` counts the original's by part."""
        part, system, name, seed = key.split("|")
        held = row["experts_bytes"] if part == "experts" else row["file_bytes"]
        return cls(
            part=part,
            system=system,
            name=name,
            seed=int(seed),
            size=held * 8 / weights[part],
            experts_bytes=row["experts_bytes"],
            file_bytes=row["file_bytes"],
            rise=row["loss"] - row["loss_original"],
            kl=row["kl"],
            exact=_share(row.get("exact_match", {}).get("words")),
        )


def _share(counts: Mapping[str, int] | None) -> float | None:
    return counts["right"] / counts["items"] if counts else None


def key_of(part: str, system: str, name: str, seed: int) -> str:
    """The name of an arm in the ledger."""
    return f"{part}|{system}|{name}|{seed}"


def points_of(data: Mapping[str, Any]) -> list[Point]:
    """All arms of a ledger that could be run."""
    return [
        Point.of(key, row, data["weights"])
        for key, row in sorted(data["arms"].items())
        if "refused" not in row
    ]


def curve(pairs: Sequence[tuple[float, float]]) -> Curve:
    """The best value at every size: an arm that a smaller one equals or beats is left out."""
    best: Curve = []
    for size, value in sorted(pairs):
        if best and best[-1][1] <= value:
            continue
        if best and best[-1][0] == size:
            best.pop()
        best.append((size, value))
    return best


def at(best: Curve, size: float) -> float | None:
    """The value at a size, linear in the size on the log scale of the value; ``None`` outside of the sizes."""
    if not best or not best[0][0] <= size <= best[-1][0]:
        return None
    for (left, low), (right, high) in pairwise(best):
        if left <= size <= right:
            share = (size - left) / (right - left)
            if min(low, high) <= 0:  # a rise may be; the scale has no place for it
                return low + share * (high - low)
            return math.exp((1 - share) * math.log(low) + share * math.log(high))
    return best[0][1]


@dataclass(frozen=True, slots=True)
class Beside:
    """One of our arms, and what llama.cpp loses at its size with the same seed."""

    own: Point
    kl: float | None
    rise: float | None

    @property
    def kl_ratio(self) -> float | None:
        return self.own.kl / self.kl if self.kl else None

    @property
    def rise_ratio(self) -> float | None:
        """``None`` where one of the two is not clear of the noise."""
        if self.rise is None or min(self.rise, self.own.rise) < CLEAR_RISE:
            return None
        return self.own.rise / self.rise


def beside(points: Sequence[Point], part: str) -> dict[str, list[Beside]]:
    """Our arms of a part, largest first, each with its seeds."""
    found: dict[str, list[Beside]] = {}
    here = [point for point in points if point.part == part]
    for own in sorted((p for p in here if p.system == OURS), key=lambda p: (-p.size, p.seed)):
        theirs = [p for p in here if p.system == LLAMA and p.seed == own.seed]
        kl = at(curve([(p.size, p.kl) for p in theirs]), own.size)
        rise = at(curve([(p.size, p.rise) for p in theirs]), own.size)
        found.setdefault(own.name, []).append(Beside(own, kl, rise))
    return found


Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Head and rows."""

_HEAD = ("", "arm", "bits", "experts MB", "file MB", "rise", "KL", "low", "high", "words", "seeds")


def arms_table(points: Sequence[Point], part: str) -> Table:
    """Every arm, the largest first: mean over seeds, KL with its lowest and highest."""
    grouped: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        if point.part == part:
            grouped.setdefault((point.system, point.name), []).append(point)
    rows = []
    for (system, name), own in sorted(grouped.items(), key=lambda g: -mean(p.size for p in g[1])):
        exact = [p.exact for p in own if p.exact is not None]
        rows.append(
            (
                system,
                name,
                f"{mean(p.size for p in own):.3f}",
                f"{mean(p.experts_bytes for p in own) / 1e6:.2f}",
                f"{mean(p.file_bytes for p in own) / 1e6:.2f}",
                f"{mean(p.rise for p in own):+.4f}",
                f"{mean(p.kl for p in own):.5f}",
                f"{min(p.kl for p in own):.5f}",
                f"{max(p.kl for p in own):.5f}",
                f"{100 * mean(exact):.1f} %" if exact else "",
                str(len(own)),
            )
        )
    return _HEAD, rows


def ratios_table(points: Sequence[Point], part: str) -> Table:
    """Ours over the better of llama.cpp's types at the same bytes."""
    head = ("ours", "bits", "KL", "llama.cpp", "ratio", "worst", "rise", "llama.cpp", "ratio", "")
    rows = []
    for name, pairs in beside(points, part).items():
        size = mean(one.own.size for one in pairs)
        ratios = [one.kl_ratio for one in pairs if one.kl_ratio is not None]
        if len(ratios) < len(pairs):
            missing = "no type of this size"
            own = (f"{mean(o.own.kl for o in pairs):.5f}", "", "", "")
            rows.append(
                (
                    name,
                    f"{size:.3f}",
                    *own,
                    f"{mean(o.own.rise for o in pairs):+.4f}",
                    "",
                    "",
                    missing,
                )
            )
            continue
        wanted = WANTED_BELOW if size < FEW_BITS else WANTED_ABOVE
        verdict = "HOLDS" if max(ratios) <= wanted else "MISSED"
        clear = [one.rise_ratio for one in pairs]
        rise = mean([r for r in clear if r is not None]) if None not in clear else None
        rows.append(
            (
                name,
                f"{size:.3f}",
                f"{mean(one.own.kl for one in pairs):.5f}",
                f"{mean([one.kl for one in pairs if one.kl is not None]):.5f}",
                f"{mean(ratios):.2f}",
                f"{max(ratios):.2f}",
                f"{mean(one.own.rise for one in pairs):+.4f}",
                f"{mean([one.rise for one in pairs if one.rise is not None]):+.4f}",
                "KL decides" if rise is None else f"{rise:.2f}",
                f"at most {wanted:g}: {verdict}",
            )
        )
    return head, rows


def as_text(table: Table) -> Iterator[str]:
    """Columns aligned: words left, numbers right."""
    head, rows = table
    every = [head, *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]
    words = [
        any(row[i][:1].isalpha() or row[i][:1] == "-" for row in rows) for i in range(len(head))
    ]
    for row in every:
        cells = [
            cell.ljust(width) if word and number != "ratio" else cell.rjust(width)
            for cell, width, word, number in zip(row, widths, words, head, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def as_markdown(table: Table) -> Iterator[str]:
    """The same as a table of Markdown."""
    head, rows = table
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield (
            "| " + " | ".join(f"`{cell}`" if cell.startswith("--") else cell for cell in row) + " |"
        )


def lines(data: Mapping[str, Any], *, markdown: bool) -> Iterator[str]:
    """The whole report."""
    points = points_of(data)
    shown = as_markdown if markdown else as_text
    about = f"Model {data['model']}; {data['tokens']:,} held-out tokens"
    yield f"{about}; loss of the original {data['loss']:.4f} nats a token."
    yield "Bits: bytes x 8 over the weights of the original. Means over calibration seeds;"
    yield "KL with its lowest and highest. Losses and KL in nats a token. Words: exact match of eval."
    for part, said in PARTS.items():
        if not any(point.part == part for point in points):
            continue
        yield ""
        yield said
        yield ""
        yield from shown(arms_table(points, part))
        head, rows = ratios_table(points, part)
        if rows:
            yield ""
            yield "Ours beside the better of llama.cpp's types, interpolated on the log scale at our size:"
            yield ""
            yield from shown((head, rows))
    refused = {
        key.rpartition("|")[0]: row["refused"]
        for key, row in data["arms"].items()
        if "refused" in row
    }
    for key, why in sorted(refused.items()):
        yield ""
        yield f"{key.replace('|', ', ')}: {why}"
