"""The cells of ``quality.py`` as a table, and what they say about ``auto``. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

OWN = "auto"
"""The method of this project, which is held against the published ones."""
WANTED = {0.25: 0.5, 0.5: 0.7, 0.75: 0.6}
"""Rate -> most of the best published method's rise that ``auto`` may have."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One fit. ``rise`` and ``kl`` in nats a token."""

    method: str
    title: str
    rate: float
    scope: int
    seed: int
    rise: float
    kl: float
    top1: float
    prototype_bytes: int
    package_bytes: int
    seconds: float
    published: bool = True

    @classmethod
    def of(cls, key: str, row: Mapping[str, Any]) -> Cell:
        method, rate, scope, seed = key.split("|")
        return cls(
            method=method,
            title=row["title"],
            rate=float(rate),
            scope=int(scope),
            seed=int(seed),
            rise=row["rise"],
            kl=row["kl"],
            top1=row["top1_agreement"],
            prototype_bytes=row["prototype_bytes"],
            package_bytes=row["package_bytes"],
            seconds=row["seconds"],
            published=row["published"],
        )


def key_of(method: str, rate: float, scope: int, seed: int) -> str:
    """The name of a cell in the ledger."""
    return f"{method}|{rate:g}|{scope}|{seed}"


def groups(cells: Sequence[Cell]) -> dict[tuple[float, int, str], list[Cell]]:
    """(rate, scope, method) -> its seeds, in order."""
    found: dict[tuple[float, int, str], list[Cell]] = {}
    for cell in sorted(cells, key=lambda c: (c.rate, c.scope, c.method, c.seed)):
        found.setdefault((cell.rate, cell.scope, cell.method), []).append(cell)
    return found


def lines(cells: Sequence[Cell], data: Mapping[str, Any]) -> Iterator[str]:
    """The whole report."""
    yield f"Model {data['model']}. Rise of the held-out loss in nats a token, mean of the seeds,"
    yield "lowest and highest beside it; sizes in MB; seconds of one fit."
    yield ""
    head = f"{'rate':>4} {'scope':>5}  {'method':14} {'rise':>8} {'low':>8} {'high':>8} "
    yield (
        head
        + f"{'KL':>7} {'same top-1':>10} {'prototypes':>10} {'package':>8} {'s':>5} {'seeds':>5}"
    )
    found = groups(cells)
    order = sorted(found, key=lambda k: (k[0], k[1], mean(c.rise for c in found[k]), k[2]))
    before = None
    for key in order:
        rows = found[key]
        if before not in (None, key[:2]):
            yield ""
        before = key[:2]
        rises = [c.rise for c in rows]
        yield (
            f"{100 * key[0]:3.0f}% {key[1]:>5}  {key[2]:14} {mean(rises):+8.4f} {min(rises):+8.4f} "
            f"{max(rises):+8.4f} {mean(c.kl for c in rows):7.4f} "
            f"{100 * mean(c.top1 for c in rows):9.1f}% "
            f"{mean(c.prototype_bytes for c in rows) / 1e6:10.2f} "
            f"{mean(c.package_bytes for c in rows) / 1e6:8.2f} "
            f"{mean(c.seconds for c in rows):5.0f} {len(rows):>5}"
        )
    refused = {}
    for key, why in sorted(data["cells"].items()):
        if "refused" in why:
            method, _, scope, _ = key.split("|")
            refused[method, scope] = why["refused"]
    for (method, scope), why in refused.items():
        yield f"{method}, scope {scope}: {why}"
    verdict = list(claim_lines(cells))
    if verdict:
        yield ""
        yield from verdict


def claim_lines(cells: Sequence[Cell]) -> Iterator[str]:
    """For every rate and seed: the best published method of any scope, and what ``auto`` has of its rise."""
    rates = sorted({cell.rate for cell in cells if cell.method == OWN})
    for rate in rates:
        ratios = []
        for seed in sorted(
            {cell.seed for cell in cells if cell.method == OWN and cell.rate == rate}
        ):
            here = [c for c in cells if c.rate == rate and c.seed == seed]
            own = [c for c in here if c.method == OWN]
            others = sorted(
                (c for c in here if c.published and c.method != OWN),
                key=lambda c: (c.rise, c.method),
            )
            if not own or not others:
                continue
            best = others[0]
            # A rise of nothing cannot be undercut: equal is 1, more is worse.
            ratio = own[0].rise / best.rise if best.rise > 0 else float(own[0].rise > best.rise) + 1
            ratios.append(ratio)
            yield (
                f"{100 * rate:.0f} %, seed {seed}: best published {best.method}{_shared(best.scope)} {best.rise:+.4f}; "
                f"{OWN} {own[0].rise:+.4f}, ratio {ratio:.2f}"
            )
        if not ratios:
            continue
        worst = max(ratios)
        yield f"{100 * rate:.0f} %: {OWN} at or below the best single method: {_word(worst <= 1.0)}"
        if rate in WANTED:
            most = WANTED[rate]
            yield f"{100 * rate:.0f} %: at most {most:g} x its rise: {_word(worst <= most)} ({worst:.2f} at worst)"


def _shared(scope: int) -> str:
    return "" if scope == 1 else f" over {scope} layers"


def _word(true: bool) -> str:
    return "HOLDS" if true else "MISSED"
