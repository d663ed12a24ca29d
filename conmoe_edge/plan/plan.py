"""What will be done, and why: the dataclasses of the plan. Arithmetic only, no torch, no files.

A ``Plan`` is made by ``planner.make_plan`` from a ``ModelAnatomy`` and a ``Budget``, shown by the
command line, obeyed by ``compress`` and ``offload``, and written into the manifest. Every byte
count is of the target's device tier unless said.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from conmoe_edge.memory.budget import Budget

Preference = Literal["quality", "speed"]


@dataclass(frozen=True, slots=True)
class Term:
    """One named summand of what is needed on the device."""

    name: str
    nbytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One combination of the levers and what the plan thinks of it.

    ``record_bytes`` is the largest record's. ``resident_share`` is the share of the prototypes that the slots hold at
    once; ``verdict`` is one word (``chosen``, ``fits``, ``slow``, ``too big``), ``reason`` a sentence for the user.
    ``wide_prototypes`` of the prototypes have the wider kind of a mixed precision (``levers.spread`` says which scopes
    they belong to), 0 in every other precision. ``width``: neurons of every prototype where all experts are kept and
    are narrowed alike; 0 where the rate says how many are kept. ``bits``: bits a weight of the original's routed
    experts, where each prototype gets the neurons and bits that it is worth; else 0. ``prototypes`` counts all experts
    then: how many stay is found by the fit.
    """

    precision: str
    rate: float
    scope: int
    prototypes: int
    record_bytes: int
    pool_bytes: int
    slots: int
    resident_share: float
    tokens_per_second: float | None
    verdict: str
    reason: str
    wide_prototypes: int = 0
    width: int = 0
    bits: float = 0.0

    @property
    def resident_bytes(self) -> int:
        """Bytes of the slots: all records where each has one, else slots of the largest; their share of all bytes where
        every prototype has a size of its own.
        """
        if self.bits:
            return -(-self.pool_bytes * self.slots // self.prototypes)
        return min(self.slots * self.record_bytes, self.pool_bytes)


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision with everything that led to it.

    Attributes:
        budget: what was given.
        context: tokens of context that the cache is planned for.
        prefill_chunk: most tokens that one forward takes.
        terms: the named needs without the prototypes; they and the slots add up to ``device_bytes_used``.
        left_for_prototypes: ``budget.device_bytes`` less the terms.
        chosen: the levers that were taken.
        candidates: every combination that was looked at, mildest first, the chosen one among them.
        unchanged: true where the model fits as it is (rate 0, every expert resident).
        disk_bytes: size of the package's weights.
        scratch_bytes: disk that the run needs beside them while it works, constants and predictor of the package
            included.
        prefer: what ties and the floor of residency were decided by.
        dense_precision: how the matrices outside the routed experts are stored.
        kv_precision: how the key-value cache is kept, ``source`` or ``int8``.
    """

    budget: Budget
    context: int
    prefill_chunk: int
    terms: tuple[Term, ...]
    left_for_prototypes: int
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    unchanged: bool
    disk_bytes: int
    scratch_bytes: int
    prefer: Preference
    dense_precision: str = "source"
    kv_precision: str = "source"

    @property
    def device_bytes_used(self) -> int:
        """The terms plus the slots of the chosen candidate."""
        return sum(term.nbytes for term in self.terms) + self.chosen.resident_bytes

    def without_measurements(self) -> Plan:
        """What was decided, apart from the machine that it was decided on: no decision rests on a rate, so only the
        figures go. This is what a package says of itself.
        """
        if not self.budget.measured:
            return self
        return replace(
            self,
            budget=self.budget.without_measurements(),
            chosen=replace(self.chosen, tokens_per_second=None),
            candidates=tuple(replace(one, tokens_per_second=None) for one in self.candidates),
        )
