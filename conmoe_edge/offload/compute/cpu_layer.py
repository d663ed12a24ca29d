"""A layer's experts for one token on a CPU, in one call of the operator wherever all that it asks for is there.

Between two tokens a layer's weights push everything else out of the processor's caches, so every step in Python and
every small tensor operation costs many times what it costs in a loop. One call takes the router's choice, adds up what
meets on a prototype, looks up where the prototypes lie, computes, and adds the constants. It does nothing where one of
them has to be read first: then ``forward_with_misses`` merges a handful of numbers in Python, and all prototypes that
are there compute in one call while the others are being read. The bits are the same.

What was computed with is told to the residency afterwards, and what the next layer will probably ask for is read ahead
then. In a layer whose prototypes all stay, only their number is.

Memory: a few addresses a router slot; the outputs of one token's prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.offload.compute.prototype_source import PrototypeSource
from conmoe_edge.offload.compute.torch_backend import Arithmetic, expert_gate, gates_in_one_call
from conmoe_edge.offload.compute.torch_layer import TorchBackend, TorchLayer
from conmoe_edge.offload.kernels.cpu.bindings import (
    BlockTable,
    Cached,
    FoundTogether,
    LayerTable,
    MlpTable,
    Operator,
    Positions,
    PrototypeTable,
    RouterTable,
    operator,
)
from conmoe_edge.offload.storage.place import Place
from conmoe_edge.offload.storage.stored_expert import StoredExpert

_FORMATS = (torch.bfloat16, torch.float32)


class HostAddresses:
    """A view of the address table for the operator.

    ``table``: the present prototypes that one call takes (``StoredExpert.matrices``).
    """

    def __init__(self, residency: PrototypeSource) -> None:
        self.table = PrototypeTable(residency.count)
        self._pools = residency.pools  # not the residency, which would never be dropped
        residency.table.watch(self)

    def put(self, number: int, place: Place) -> None:
        expert = self._pools[place[0]].parts(place[1])
        if expert.matrices is not None:
            self.table.put(number, *expert.matrices, expert.biases)

    def remove(self, number: int) -> None:
        self.table.remove(number)


class CpuLayer(TorchLayer):
    """``LayerExperts`` by the operator.

    Attributes:
        table: the layer as the operator reads it; ``None`` where it does not take the layer in one call.
        formats: of the activations that it takes.
        stays: whether all its prototypes are there for good.
    """

    def __init__(
        self,
        residency: PrototypeSource,
        arithmetic: Arithmetic,
        slots: SlotTensors,
        engine: Operator | None,
        table: LayerTable | None,
        formats: tuple[torch.dtype, ...],
    ) -> None:
        super().__init__(residency, arithmetic, slots)
        self.engine, self.table, self.formats = engine, table, formats
        self.stays = residency.table.stay(slots.slot_map.prototypes)
        self._constants = () if slots.constants is None else slots.constants.unbind()

    def one_token(
        self, module: nn.Module, hidden: Tensor, slots: Tensor, gates: Tensor
    ) -> Tensor | None:
        found = self.output(hidden, slots, gates)
        return self.forward_with_misses(module, hidden, slots, gates) if found is None else found

    def output(
        self, hidden: Tensor, slots: Tensor, gates: Tensor, residual: Tensor | None = None
    ) -> Tensor | None:
        """[1, H], [1, K], [1, K] -> [1, H], added to ``residual`` (H values) where there is one; ``None`` where the
        operator does not take it, or a prototype is not there.
        """
        if self.table is None or self.engine is None or hidden.dtype not in self.formats:
            return None
        if slots.dtype != torch.int64 or gates.dtype not in _FORMATS:
            return None
        self._notice()
        found = self.engine.layer(
            self.table, slots.contiguous(), gates.contiguous(), hidden.contiguous(), residual
        )
        return self._counted(found, hidden)

    def decoder(
        self,
        block: BlockTable,
        router: RouterTable,
        x: Tensor,
        positions: Positions | None,
        cached: Cached,
        dense: MlpTable | None = None,
    ) -> Tensor | None:
        """The whole decoder layer around these experts; arguments and result as of ``Operator.decoder``.

        Raises:
            RuntimeError: there is no ``table``.
        """
        if self.table is None or self.engine is None:
            raise RuntimeError("the operator does not take this layer")
        self._notice()
        found = self.engine.decoder(block, router, self.table, x, positions, cached, dense)
        return self._counted(found, router.between.normed)

    def forward_with_misses(
        self, module: nn.Module, hidden: Tensor, slots: Tensor, gates: Tensor
    ) -> Tensor:
        """[1, H], [1, K], [1, K] -> [1, H], prototypes being read where they are not there: the same bits as of
        ``output``.
        """
        chosen, given = slots[0].tolist(), gates[0].tolist()
        merged = self.slots.slot_map.merge(chosen, given)
        numbers = list(merged)
        residency, arithmetic = self.residency, self.arithmetic
        turns: list[int] = []
        rows: list[Tensor] = []  # [n, H] each, in the order of the turns

        def compute(positions: Sequence[int], some: Sequence[StoredExpert]) -> None:
            turns.extend(positions)
            rows.append(arithmetic.one_token(module, some, hidden))

        residency.visit(numbers, compute, ahead=residency.likely_next(self.number, hidden))
        out = _in_order(rows, turns)
        constants: Sequence[tuple[Tensor, float]] = ()
        if self._constants:
            pairs = self.slots.slot_map.gated_constants(chosen, given)
            constants = [(self._constants[row], gate) for row, gate in pairs]
        return arithmetic.combine(out, list(merged.values()), hidden.dtype, constants)

    def decoder_together(
        self,
        block: BlockTable,
        router: RouterTable,
        x: Tensor,
        where: Sequence[tuple[Positions | None, Cached]],
        dense: MlpTable | None = None,
    ) -> FoundTogether:
        """``decoder`` for one token each of several answers; arguments and result as of ``Operator.decoder_together``.

        Raises:
            RuntimeError: there is no ``table``.
        """
        if self.table is None or self.engine is None:
            raise RuntimeError("the operator does not take this layer")
        self._notice()
        found = self.engine.decoder_together(block, router, self.table, x, where, dense)
        if found.out is not None:
            self._used(found.count)
            if self.residency.prefetcher is not None:
                self.residency.prefetch(self._next_of(found.normed))
        return found

    def together_with_misses(
        self, module: nn.Module, hidden: Tensor, slots: Tensor, gates: Tensor
    ) -> Tensor:
        """``forward_with_misses`` for one token each of several answers, [T, H], [T, K], [T, K] -> [T, H]: a prototype
        that is not there is read once for all that ask for it.
        """
        chosen, given = slots.tolist(), gates.tolist()
        slot_map, arithmetic = self.slots.slot_map, self.arithmetic
        merged = [slot_map.merge(*one) for one in zip(chosen, given, strict=True)]
        asking: dict[int, list[int]] = {}
        for token, weights in enumerate(merged):
            for number in weights:
                asking.setdefault(number, []).append(token)
        numbers = sorted(asking)
        rows: dict[int, Tensor] = {}

        def compute(positions: Sequence[int], some: Sequence[StoredExpert]) -> None:
            mine = [numbers[position] for position in positions]
            found = arithmetic.several_tokens(module, some, hidden, [asking[one] for one in mine])
            rows.update(zip(mine, found, strict=True))

        if numbers:
            self.residency.visit(numbers, compute, ahead=self._next_of(hidden))
        out = torch.empty_like(hidden)
        for token, weights in enumerate(merged):
            parts = [rows[number][asking[number].index(token)] for number in weights]
            y = torch.stack(parts) if parts else torch.empty(0, hidden.shape[1])
            constants: Sequence[tuple[Tensor, float]] = ()
            if self._constants:
                pairs = slot_map.gated_constants(chosen[token], given[token])
                constants = [(self._constants[row], gate) for row, gate in pairs]
            out[token] = arithmetic.combine(y, list(weights.values()), hidden.dtype, constants)[0]
        return out

    def _next_of(self, hidden: Tensor) -> Sequence[int]:
        """What the next layer will probably ask for, for all rows of ``hidden``: the likeliest of each first."""
        if self.residency.prefetcher is None:
            return ()
        likely = [self.residency.likely_next(self.number, row) for row in hidden.split(1)]
        return list(
            dict.fromkeys(n for rank in zip_longest(*likely) for n in rank if n is not None)
        )

    def _notice(self) -> None:
        if self.residency.prefetcher is not None:
            self.residency.collect()

    def _counted(self, found: tuple[Tensor, int] | None, hidden: Tensor) -> Tensor | None:
        if found is None or self.table is None:
            return None
        out, count = found
        self._used(count)
        if self.residency.prefetcher is not None:
            self.residency.prefetch(self.residency.likely_next(self.number, hidden))
        return out

    def _used(self, count: int) -> None:
        """So many prototypes, which the table names, were computed with."""
        assert self.table is not None, "they were found by it"
        if self.stays:
            self.residency.used(count)
        else:
            self.residency.asked(self.table.asked(count))


def _in_order(rows: list[Tensor], turns: Sequence[int]) -> Tensor:
    """The rows of several calls by position, where ``turns`` says the position of each."""
    every = rows[0] if len(rows) == 1 else torch.cat(rows)
    where = sorted(range(len(turns)), key=turns.__getitem__)
    return every if where == list(range(len(turns))) else every[where]


class CpuBackend(TorchBackend):
    """``ExpertBackend`` by the operator; where there is no compiler, by torch one expert after the other."""

    def __init__(
        self, device: torch.device, residency: PrototypeSource, arithmetic: Arithmetic
    ) -> None:
        super().__init__(device, residency, arithmetic)
        self._engine = operator()
        self._addresses = HostAddresses(residency)

    def layer(self, slots: SlotTensors, module: nn.Module) -> CpuLayer:
        formats, table = (), None
        kinds = self.residency.kinds(slots.slot_map.prototypes)
        if self._engine is not None:
            formats = tuple(one for one in _FORMATS if gates_in_one_call(module, kinds, one))
        if formats:
            forms = [(one.matrices[0].form, one.matrices[1].form) for one in kinds if one.matrices]
            table = LayerTable(self._addresses.table, forms, slots.slot_map, slots.constants)
            gate = expert_gate(module)
            assert gate is not None, "gates_in_one_call has looked"
            table.with_gate(gate)
        return CpuLayer(self.residency, self.arithmetic, slots, self._engine, table, formats)
