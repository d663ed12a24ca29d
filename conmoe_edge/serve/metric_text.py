"""Metrics of several processes as those of one: each sample gets a label with its model's name. No torch.

A process that ended takes its counters with it. What they had come to is kept here and added to those of the next
process of the same model, so that counters only grow. Source: Prometheus' text exposition format 0.0.4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from conmoe_edge.serve.prometheus import escaped

_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
_GROWS = ("counter", "histogram")
_THE_SERVERS = frozenset(
    {
        "conmoe_bodies",
        "conmoe_model_info",
        "conmoe_ready",
        "conmoe_request_bytes",
        "conmoe_requests",
        "conmoe_requests_total",
    }
)
"""What the server of several says itself."""

Samples = dict[tuple[str, str], float]
"""By name and labels."""


@dataclass
class Family:
    """Samples of one name; ``head`` are its HELP and TYPE lines."""

    head: list[str]
    kind: str
    samples: Samples = field(default_factory=dict)


class ModelMetrics:
    """What the processes of all models said."""

    def __init__(self) -> None:
        self._now: dict[str, dict[str, Family]] = {}
        self._before: dict[str, dict[str, Family]] = {}

    def heard(self, model: str, text: str) -> None:
        """What the process of ``model`` says now."""
        self._now[model] = families(text)

    def gone(self, model: str) -> None:
        """Its process is over: counters stay, and what it held is no more."""
        before = self._before.setdefault(model, {})
        for name, family in self._now.pop(model, {}).items():
            if family.kind in _GROWS:
                before[name] = _sum(family, before.get(name))

    def text(self) -> Iterable[str]:
        """All samples, each with its model."""
        found: dict[str, dict[str, Family]] = {}
        for model in dict.fromkeys((*self._before, *self._now)):
            now, before = self._now.get(model, {}), self._before.get(model, {})
            for name in dict.fromkeys((*now, *before)):
                one = now.get(name)
                whole = before[name] if one is None else _sum(one, before.get(name))
                found.setdefault(name, {})[model] = whole
        for of_models in found.values():
            yield from next(iter(of_models.values())).head
            for model, family in of_models.items():
                label = f'model="{escaped(model)}"'
                for (name, labels), value in family.samples.items():
                    both = f"{label},{labels}" if labels else label
                    yield f"{name}{{{both}}} {_number(value)}"


def families(text: str) -> dict[str, Family]:
    """The families in a text of one process, but for those that are the server's own."""
    found: dict[str, Family] = {}
    family = Family([], "")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            family = Family([line], "")
            if name not in _THE_SERVERS:
                found[name] = family
        elif line.startswith("# TYPE "):
            family.head.append(line)
            family.kind = line.rsplit(" ", 1)[1]
        elif match := _SAMPLE.fullmatch(line):
            family.samples[match[1], match[2] or ""] = float(match[3])
    return found


def _sum(family: Family, before: Family | None) -> Family:
    """Of a family that grows; any other stays as it is."""
    if before is None or family.kind not in _GROWS:
        return family
    samples = dict(before.samples)
    for key, value in family.samples.items():
        samples[key] = samples.get(key, 0) + value
    return Family(family.head, family.kind, samples)


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else f"{value:.6f}"
