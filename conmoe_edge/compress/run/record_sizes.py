"""What the plan's levers mean for one model: scopes and their pools, how many prototypes, in which records.

The plan's arithmetic (``plan/levers.py``, ``plan/width_levers.py``) for the model and levers of a job. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.manifest import ExpertId, RecordLayout
from conmoe_edge.compress.methods.interface import Method
from conmoe_edge.compress.run.job import Job
from conmoe_edge.compress.run.journal import StoredRecord
from conmoe_edge.model.anatomy import ExpertsAnatomy, ModelAnatomy
from conmoe_edge.plan.levers import (
    PRECISIONS,
    record_bytes,
    record_parts,
    scopes,
    shares_out,
    spread,
)
from conmoe_edge.plan.record_options import (
    RecordOption,
    layer_room,
    record_options,
    slot_bytes,
)
from conmoe_edge.plan.width_levers import (
    PARTS,
    alike,
    narrowed,
    pool_kept,
    steps,
    trimmed,
)


@dataclass(frozen=True, slots=True)
class RecordSizes:
    """Counts, widths and layouts of the prototypes of one job.

    Attributes:
        anatomy: of the model.
        narrow: of the model with the experts' width that all prototypes have, where they have the same.
        rate, precision: as planned.
        kinds: the kinds of record that the precision allows, the widest first.
        scopes: the layers of every scope; a layer stands in one.
        trims: whether prototypes may have fewer neurons than experts, all of them the same number.
        differs: whether the prototypes of a layer have different numbers of neurons.
        shares_out: whether layers get numbers of their own. In a mixed precision the plan counts with equal ones.
        wide: prototypes of the package in the wider kind, where there are two.
        every: whether every expert is kept, all as narrow as ``narrow`` says.
        pool_bytes: of all prototypes, where the plan gives bytes and prototypes have kinds of their own; else 0.
    """

    anatomy: ModelAnatomy
    narrow: ModelAnatomy
    rate: float
    precision: str
    kinds: tuple[str, ...]
    scopes: tuple[tuple[int, ...], ...]
    trims: bool
    differs: bool
    shares_out: bool
    wide: int
    every: bool = False
    pool_bytes: int = 0

    @classmethod
    def of(cls, job: Job, method: Method) -> RecordSizes:
        """For a job and its method."""
        kinds, free = PRECISIONS[job.precision].kinds, PRECISIONS[job.precision].free
        every = job.width > 0
        differs = method.trims and not alike(job.precision, equal=job.equal) and not every
        trims = method.trims and not differs and not every
        narrow = job.anatomy
        if every:
            narrow = narrowed(job.anatomy, job.width)
        elif trims:
            narrow = trimmed(job.anatomy, job.rate, job.precision)
        return cls(
            anatomy=job.anatomy,
            narrow=narrow,
            rate=job.rate,
            precision=job.precision,
            kinds=kinds,
            scopes=tuple(scopes(job.anatomy, job.scope)),
            trims=trims,
            differs=differs,
            shares_out=method.budgets and shares_out(job.precision, job.rate, job.width),
            wide=job.wide_prototypes,
            every=every,
            pool_bytes=job.decided.chosen.pool_bytes if free else 0,
        )

    @property
    def moe_layers(self) -> list[int]:
        """Decoder layers with routed experts, ascending."""
        return [layer.index for layer in self.anatomy.moe_layers]

    def scope_of(self, layer: int) -> tuple[int, ...]:
        """The layers that share prototypes with a MoE layer, itself among them."""
        return next(scope for scope in self.scopes if layer in scope)

    def pool(self, scope: Sequence[int]) -> tuple[ExpertId, ...]:
        """The routed experts of a scope, by layer, then expert (ConMoE, section 3.1)."""
        return tuple(
            ExpertId(layer, expert)
            for layer in scope
            for expert in range(self.experts(layer).count)
        )

    def experts(self, layer: int) -> ExpertsAnatomy:
        """The routed experts of a MoE layer."""
        return _experts(self.anatomy, layer)

    def widths(self, layer: int) -> tuple[int, ...]:
        """Numbers of neurons that a prototype of the package may have, ascending."""
        if self.free:
            return tuple(sorted({one.width for one in self.options(layer)}))
        if self.differs:
            return steps(self.experts(layer), self.precision)
        return (_experts(self.narrow, layer).width,)

    @property
    def free(self) -> bool:
        """Whether each prototype has the bits that it is worth."""
        return self.pool_bytes > 0

    @property
    def alike(self) -> bool:
        """Whether all records are of one kind."""
        return len(self.kinds) == 1

    def options(self, layer: int) -> tuple[RecordOption, ...]:
        """The records that a prototype may become, by bytes ascending; where each has the bits that it is worth."""
        return record_options(self.experts(layer), self.precision) if self.free else ()

    def gone(self, layer: int) -> int:
        """Bytes that an expert takes that goes, where each has the bits that it is worth: its slot's constant."""
        return slot_bytes(self.experts(layer)) if self.free else 0

    def sizes(self, layer: int) -> tuple[int, ...]:
        """Bytes of the smallest record of every width."""
        experts = self.experts(layer)
        return tuple(
            record_bytes(experts.narrowed(width), self.kinds[-1]) for width in self.widths(layer)
        )

    def layout(self, layer: int, kind: str, width: int) -> RecordLayout:
        """Of a record with so many neurons."""
        return make_layout(record_parts(self.experts(layer).narrowed(width), kind), kind)

    def unit(self, layer: int) -> int:
        """Bytes of what ``count`` counts: a prototype, or a part of one where widths differ."""
        if self.free:
            room = layer_room(self.anatomy, layer, self.pool_bytes)
            return max(1, room // (PARTS * self.experts(layer).count))
        return self.sizes(layer)[-1] // (PARTS if self.differs else 1)

    def uniform(self, scope: Sequence[int]) -> int:
        """Units of a scope where all scopes get the same."""
        if self.every:
            return sum(self.experts(layer).count for layer in scope)
        if self.free:
            return PARTS * sum(self.experts(layer).count for layer in scope)
        count = pool_kept(self.anatomy, scope, self.rate, self.precision, trims=self.trims)
        return count * PARTS if self.differs else count

    def same_for_all(self) -> dict[str, int]:
        """``Journal.budgets`` where every layer gets the same."""
        return {str(scope[0]): self.uniform(scope) for scope in self.scopes}

    def count(self, scope: Sequence[int], budgets: Mapping[str, int]) -> int:
        """Units of a scope, by ``Journal.budgets`` where layers have numbers of their own."""
        given = budgets.get(str(scope[0]))
        return self.uniform(scope) if given is None else given

    def wide_count(self, scope: Sequence[int], budgets: Mapping[str, int]) -> int:
        """Prototypes of a scope in the wider of two kinds."""
        counts = [self.count(one, budgets) for one in self.scopes]
        return spread(self.wide, counts)[self.scopes.index(tuple(scope))]

    def room(
        self,
        scope: Sequence[int],
        budgets: Mapping[str, int],
        stored: Mapping[ExpertId, StoredRecord],
    ) -> int:
        """Bytes for the prototypes of a scope: its own, and what scopes before it have left."""
        given = sum(
            self.count(one, budgets) * self.unit(one[0])
            for one in self.scopes
            if one <= tuple(scope)
        )
        taken = sum(
            self.layout(expert.layer, record.kind, record.width).nbytes
            for expert, record in stored.items()
            if expert.layer < scope[0]
        )
        for layer in (one for one in self.moe_layers if one < scope[0]):
            kept = sum(expert.layer == layer for expert in stored)
            taken += (self.experts(layer).count - kept) * self.gone(layer)
        return given - taken


def _experts(anatomy: ModelAnatomy, layer: int) -> ExpertsAnatomy:
    experts = anatomy.layers[layer].experts
    assert experts is not None
    return experts
