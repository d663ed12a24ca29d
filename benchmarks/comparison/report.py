"""From single runs to rows, ratios, claims and a text table. Arithmetic only.

A row is a cell with the medians of its repeats. Its bound is the least time
that this machine needs: the bytes that a token has to pass through (dense part, the chosen experts
in their number format, the key-value cache) over the memory's bandwidth, or the bytes that were read
from the disk over the disk's bandwidth, whichever is longer. The share of the bound is that over
the time that was taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.comparison.arms import CLAIMS, SYSTEMS, Cell, cap_name


@dataclass(frozen=True, slots=True)
class Row:
    """A cell's results; rates and times are ``None`` where no repeat came that far.

    Attributes:
        speed: tokens per second, the median of the repeats (each is its median step).
        lowest, highest: of the repeats.
        mean: steps over their seconds, the median of the repeats: what a reader of the
            whole answer gets. It is below ``speed`` where some steps wait for the disk.
        steps: fewest measured steps of a repeat.
        first: seconds to the first token of a prompt of ``prompt`` tokens.
        load: seconds until the prompt could begin.
        peak: most bytes charged to the cgroup, page cache included.
        read: bytes from the disk per token.
        hit: share of requested prototypes that were resident; ours only.
        bound: share of the bound.
        outcome: ``ok`` or why there is no figure.
    """

    system: str
    cap: int | None
    group: str
    outcome: str
    repeats: int
    speed: float | None = None
    lowest: float | None = None
    highest: float | None = None
    mean: float | None = None
    steps: int | None = None
    prompt: int | None = None
    first: float | None = None
    load: float | None = None
    peak: int | None = None
    read: float | None = None
    hit: float | None = None
    bound: float | None = None


def make_row(
    cell: Cell, runs: Sequence[Mapping[str, Any]], memory: float, disk: float, cache_bytes: float
) -> Row:
    """One row from the repeats of a cell.

    Args:
        runs: one a repeat: ``outcome``, ``peak`` and the arm's ``notes``.
        memory, disk: bytes a second.
        cache_bytes: of the key-value cache, read once a token.
    """
    good = [run for run in runs if run["notes"].get("step_seconds")]
    if not good:
        outcome = runs[-1]["outcome"] if runs else "not run"
        return Row(
            cell.system, cell.cap, cell.group, outcome, len(runs), peak=_median(runs, "peak")
        )
    notes = [run["notes"] for run in good]
    steps = [note["step_seconds"] for note in notes]
    speeds = [1 / statistics.median(seconds) for seconds in steps]
    read = _mean([_per_step(note, "steps_bytes") for note in notes])
    through = _mean([_token_bytes(note) for note in notes])
    speed = statistics.median(speeds)
    bound = None
    if through is not None:
        bound = max((through + cache_bytes) / memory, (read or 0.0) / disk) * speed
    return Row(
        system=cell.system,
        cap=cell.cap,
        group=cell.group,
        outcome="ok" if len(good) == len(runs) else f"ok in {len(good)} of {len(runs)}",
        repeats=len(good),
        speed=speed,
        lowest=min(speeds),
        highest=max(speeds),
        mean=statistics.median(len(seconds) / sum(seconds) for seconds in steps),
        steps=min(len(seconds) for seconds in steps),
        prompt=notes[0].get("prompt_tokens"),
        first=_median(notes, "first_token_seconds"),
        load=_median(notes, "load_seconds"),
        peak=_median(good, "peak"),
        read=read,
        hit=_median(notes, "hit"),
        bound=bound,
    )


def _median(items: Sequence[Mapping[str, Any]], key: str) -> Any:
    values = [item[key] for item in items if item.get(key) is not None]
    return statistics.median(values) if values else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _per_step(note: Mapping[str, Any], key: str) -> float | None:
    return None if note.get(key) is None else note[key] / len(note["step_seconds"])


def _token_bytes(note: Mapping[str, Any]) -> float | None:
    if note.get("dense_token_bytes") is None:
        return None
    return note["dense_token_bytes"] + note["routed_token_bytes"]


def ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Ours over every peer under the same cap: ``{"cap", "ours", "peer", "ratio"}``, where both have a speed."""
    found = []
    for ours in rows:
        for peer in rows:
            pair = ours.cap == peer.cap and SYSTEMS[ours.system].engine == "ours"
            if pair and SYSTEMS[peer.system].engine != "ours" and ours.speed and peer.speed:
                found.append(
                    {
                        "cap": cap_name(ours.cap),
                        "ours": ours.system,
                        "peer": peer.system,
                        "ratio": ours.speed / peer.speed,
                    }
                )
    return found


def claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What must be shown, and what was: ``measured`` is ``None`` where our cell or every peer has no speed.

    A peer that ran out of memory makes no ratio; it is named in ``peers_failed``.
    """
    at = {(row.system, row.cap): row for row in rows}
    found = []
    for claim in CLAIMS:
        ours = at.get((claim.ours, claim.cap))
        peers = [at[peer, claim.cap] for peer in claim.peers if (peer, claim.cap) in at]
        fast = [(peer.speed, peer.system) for peer in peers if peer.speed]
        measured = None
        if ours is not None and ours.speed and fast:
            measured = ours.speed / max(fast)[0]
        found.append(
            {
                "cap": cap_name(claim.cap),
                "ours": claim.ours,
                "peer": max(fast)[1] if fast else " / ".join(claim.peers),
                "wanted": claim.ratio,
                "measured": measured,
                "holds": None if measured is None else measured >= claim.ratio,
                "peers_failed": [peer.system for peer in peers if not peer.speed],
            }
        )
    return found


_HEAD = (
    f"{'cap':<6}{'system':<46}{'tokens/s':>9}{'spread':>14}{'mean':>7}{'steps':>6}{'prompt':>7}{'first s':>9}"
    f"{'load s':>8}{'peak GiB':>9}{'read MB/tok':>12}{'hit':>6}{'bound':>7}"
)


def table(rows: Sequence[Row]) -> list[str]:
    """Rows by cap, fastest first; those without a figure last, with the reason."""
    lines = [_HEAD]
    for cap in sorted({row.cap for row in rows}, key=lambda cap: (cap is None, cap or 0)):
        here = [row for row in rows if row.cap == cap]
        for row in sorted(here, key=lambda row: -(row.speed or 0.0)):
            lines.append(_line(row))
    return lines


def _line(row: Row) -> str:
    label = SYSTEMS[row.system].label
    head = f"{cap_name(row.cap):<6}{label:<46}"
    if row.speed is None:
        return f"{head}{row.outcome}"
    spread = f"{row.lowest:.2f}-{row.highest:.2f}"
    peak = None if row.peak is None else row.peak / 2**30
    read = None if row.read is None else row.read / 1e6
    cells = (
        f"{_number(row.speed, 9, 2)}{spread:>14}{_number(row.mean, 7, 2)}{row.steps:>6}{row.prompt or 0:>7}"
        f"{_number(row.first, 9, 2)}{_number(row.load, 8, 1)}{_number(peak, 9, 2)}"
        f"{_number(read, 12, 1)}{_share(row.hit, 6)}{_share(row.bound, 7)}"
    )
    note = "" if row.outcome == "ok" else f"  {row.outcome}"
    return f"{head}{cells}{note}"


def claim_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a claim."""
    lines = [f"{'cap':<6}{'ours':<18}{'against':<28}{'wanted':>8}{'measured':>10}"]
    for one in found:
        measured = "-" if one["measured"] is None else f"{one['measured']:.2f}"
        word = {None: "not measured", True: "holds", False: "MISSED"}[one["holds"]]
        lines.append(
            f"{one['cap']:<6}{one['ours']:<18}{one['peer']:<28}"
            f"{one['wanted']:>8.2f}{measured:>10}  {word}"
        )
    return lines


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def _share(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(100 * value, '.0f') + '%':>{width}}"
