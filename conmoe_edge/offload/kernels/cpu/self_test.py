"""A compiler's mistake must not become a model's mistake: every function of a freshly loaded operator is tried once.

Small random numbers (fixed seed) go through each function, and through the same in plain torch (``reference.py``). What
is a chain of other functions (``block``, ``decoder``) has to give the bits of the chain. A few milliseconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import Grid
from conmoe_edge.checkpoint.format.quantise import Kind, Matrix, quantise
from conmoe_edge.checkpoint.format.slot_map import NONE, SlotMap
from conmoe_edge.model.kv_rows import pack_rows, unpack_rows
from conmoe_edge.offload.kernels.cpu import reference
from conmoe_edge.offload.kernels.cpu.attention_tables import (
    AttentionTable,
    Cached,
    LatentTable,
    Positions,
)
from conmoe_edge.offload.kernels.cpu.decoder_tables import (
    BlockTable,
    RouterTable,
)
from conmoe_edge.offload.kernels.cpu.operator import Operator
from conmoe_edge.offload.kernels.cpu.structs import (
    GRID_CODES,
    ExpertGate,
    Form,
    LayerTable,
    MlpTable,
    Prepared,
    PrototypeTable,
    RmsNorm,
)
from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable

_BF16 = torch.bfloat16
_HIDDEN, _WIDTH, _HEADS, _GROUPS, _HEAD, _HELD, _EXPERTS, _CHOSEN = 96, 64, 4, 2, 24, 5, 6, 3
_EPSILON = 1e-5
MANY_TOKENS = 8
"""More than a tile of them has (``csrc/strips.h``)."""


def check(made: Operator) -> None:
    """Try every function of ``made``.

    Raises:
        Unavailable: one gives a wrong result; the text names it.
    """
    try:
        _Check(made).run()
    except (
        ValueError,
        MemoryError,
    ) as error:  # what a function says that does not take what it should
        raise Unavailable(f"the compiled operator fails its test: {error}") from error


class _Check:
    def __init__(self, made: Operator) -> None:
        self.made = made
        self.generator = torch.Generator().manual_seed(0)

    def run(self) -> None:
        for kind in ("plain", "int8", "int4", "mxfp4", "q6", "q4", "q3", "q2"):
            self.products(kind)
        for dtype, zeros in GRID_CODES:
            self.products("grid4", Grid(32, dtype, zeros))
        self.two_kinds()
        self.gates()
        self.prompts()
        self.combine()
        self.dense()
        self.norms()
        self.attend()
        self.latent()
        self.layers()

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        # The first call may come while transformers has set a default device and format of its own.
        made = torch.randn(*shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return made.to(dtype)

    def narrow(self, *shape: int) -> Tensor:
        return self.random(*shape, dtype=_BF16)

    def matrix(
        self, rows: int, columns: int, kind: Kind = "plain", grid: Grid | None = None
    ) -> tuple[Matrix, Prepared]:
        weight = self.random(rows, columns) * 0.1
        matrix = quantise(weight.to(_BF16) if kind == "plain" else weight, kind, grid)
        prepared = self.made.prepare(matrix)
        if prepared is None:
            raise Unavailable(f"the compiled operator does not take {kind} weights")
        return matrix, prepared

    def products(self, kind: Kind, grid: Grid | None = None) -> None:
        made, x = self.made, self.random(1, 2, _HIDDEN)
        up, one = self.matrix(2 * _WIDTH, _HIDDEN, kind, grid)
        wanted = reference.product(up, x[0])
        # An activation in 8 bits may fall to either side where it lies between two numbers.
        near = 1e-4 if kind == "plain" else 2e-3
        _same(f"few_rows, {kind}", made.few_rows([one], x)[0], wanted, near)
        _same(f"one_row, {kind}", made.one_row(one, x[0, :1]), wanted[:1], near)
        wide = up.dequantise()
        _same(f"expand, {kind}", made.expand(one, torch.empty_like(wide)), wide, 1e-6)
        down, other = self.matrix(2 * _WIDTH, _WIDTH, kind, grid)  # int4 takes 64 rows at a time
        up, one = self.matrix(2 * _WIDTH, 2 * _WIDTH, kind, grid)
        x = self.random(1, 2 * _WIDTH)
        near = 1e-4 if kind == "plain" else 2e-2  # and here more of them, one behind the other
        found = made.gated_experts([one], [other], x)
        _same(f"gated_experts, {kind}", found, reference.gated(up, down, x), near)
        several = torch.cat([self.random(5, 2 * _WIDTH), x])
        asking = [0, 2, 3, 4, 5, 1]
        alone = [made.gated_experts([one], [other], several[row : row + 1]) for row in asking]
        together = made.gated_together([one, one], [other, other], several, [asking[:5], [1]])
        _equal(f"gated_together, {kind}", together, torch.cat(alone))

    def two_kinds(self) -> None:
        """Gate and up rows in fewer bits than down rows."""
        made, size = self.made, 2 * _WIDTH
        pairs: tuple[tuple[Kind, Kind], ...] = (("q3", "q4"), ("q2", "int8"), ("int8", "q3"))
        for first, second in pairs:
            (up, one), (down, other) = (
                self.matrix(2 * size, size, first),
                self.matrix(size, size, second),
            )
            x = self.random(1, size)
            found = made.gated_experts([one], [other], x)
            name = f"gated_experts, {first} and {second}"
            _same(name, found, reference.gated(up, down, x), 2e-2)

    def gates(self) -> None:
        """gpt-oss's gate, with biases."""
        made, size = self.made, 2 * _WIDTH
        how = ExpertGate(alpha=1.7, limit=1.0, interleaved=True)
        for kind in ("int8", "int4", "mxfp4", "q6", "q4", "q3", "q2"):
            (up, one), (down, other) = (
                self.matrix(2 * size, size, kind),
                self.matrix(size, size, kind),
            )
            x, biases = self.random(1, size), (self.narrow(2 * size), self.narrow(size))
            found = made.gated_experts([one], [other], x, how, [biases])
            wanted = reference.gated(up, down, x, how, biases)
            _same(f"gated_experts with a limit, {kind}", found, wanted, 2e-2)

    def prompts(self) -> None:
        """Many tokens: the same numbers as of few rows, and whole experts."""
        made, size = self.made, 2 * _WIDTH
        kinds: tuple[Kind, ...] = ("int8", "int4", "mxfp4", "q6", "q4", "q3", "q2")
        how = ExpertGate(alpha=1.7, limit=1.0, interleaved=True)
        tokens = 2 * MANY_TOKENS - 1
        for kind in kinds:
            (up, one), (down, other) = (
                self.matrix(2 * size, size, kind),
                self.matrix(size, size, kind),
            )
            x = self.random(tokens, size)
            few = made.few_rows([one], x.unsqueeze(0))[0]
            _same(f"many_rows, {kind}", made.many_rows(one, x), few, 1e-5)
            biases = self.narrow(2 * size), self.narrow(size)
            rows, weights = torch.arange(1, tokens, device="cpu"), self.random(tokens - 1)
            for gate, added in ((ExpertGate(), None), (how, biases)):
                before = self.random(tokens, size)
                wanted, routed = before.double(), ([0, tokens - 1], rows, weights)
                given = None if added is None else [added]
                parts = reference.gated(up, down, x[1:], gate, added)
                wanted[1:] += weights.double().unsqueeze(1) * parts
                for few in (0, tokens):
                    out = before.clone()
                    made.many_experts([one], [other], x, routed, out, gate, given, few)
                    _same(f"many_experts, {kind}, {few}", out, wanted, 2e-2)

    def dense(self) -> None:
        first, second = [self.matrix(_WIDTH, _HIDDEN) for _ in range(2)]
        third, share = self.matrix(_HIDDEN, _WIDTH), self.matrix(1, _HIDDEN)
        self.mlp = MlpTable(first[1], second[1], third[1], share=share[1])
        x = self.narrow(1, _HIDDEN)
        found = self.made.dense(self.mlp, x)
        several = self.narrow(3, _HIDDEN)
        alone = [self.made.dense(self.mlp, row) for row in several.split(1)]
        _equal("dense_together", self.made.dense_together(self.mlp, several), torch.cat(alone))
        _same("dense", found, reference.dense(first[0], second[0], third[0], share[0], x), 2e-2)

    def latent(self) -> None:
        """Compressed keys and values, against keys and values that are expanded."""
        heads, still, turned, rank, values = 2, 16, 8, 32, 24
        query, compress = (
            self.matrix(heads * (still + turned), _HIDDEN),
            self.matrix(rank + turned, _HIDDEN),
        )
        expand, output = (
            self.matrix(heads * (still + values), rank),
            self.matrix(_HIDDEN, heads * values),
        )
        norm = RmsNorm(self.narrow(rank), _EPSILON, False, True)
        table = LatentTable(
            *(query[1], (compress[1], None), norm, expand[1], (output[1], None)),
            **{"heads": heads, "turned": turned, "value_width": values, "scaling": 0.3},
            turn="halves",
        )
        x, past, angles = (
            self.narrow(1, _HIDDEN),
            self.narrow(1, 1, _HELD + 1, rank),
            self.narrow(1, 1, _HELD + 1, turned),
        )
        cos, sin = self.narrow(1, turned), self.narrow(1, turned)
        found = self.made.attention(table, x, Positions(cos, sin), Cached.of(past, angles, _HELD))
        state = reference.product(compress[0], x).to(_BF16)
        new = reference.rms_norm(state[:, :rank], norm.weight, _EPSILON, False, True)
        _same("latent, its cache", past[0, 0, _HELD:], new, 2e-2)
        turns = reference.rotate(state[:, rank:], cos, sin)
        _same("latent, its cache", angles[0, 0, _HELD:], turns, 2e-2)
        both = reference.product(expand[0], past[0, 0]).view(_HELD + 1, heads, still + values)
        fixed = angles[0, 0].double().unsqueeze(1).expand(-1, heads, -1)
        keys = torch.cat([both[..., :still], fixed], -1)
        asked = reference.product(query[0], x).to(_BF16).view(heads, still + turned)
        asked[:, still:] = reference.rotate(asked[:, still:], cos, sin)
        mixed = reference.attend(
            asked, keys.transpose(0, 1), both[..., still:].transpose(0, 1), 0.3
        )
        wanted = reference.product(output[0], mixed.to(_BF16).view(1, -1))
        _same("latent", found, wanted, 3e-2)

    def combine(self) -> None:
        rows, constant = self.random(2, 40), self.random(40)
        found = self.made.combine(rows, [0.5, -2.0], torch.float32, [(constant, 0.25)])
        wanted = 0.5 * rows[:1] - 2.0 * rows[1:] + 0.25 * constant
        _same("combine", found, wanted, 1e-5)

    def norms(self) -> None:
        for plus_one, early in ((False, True), (True, False)):
            weight, x = self.narrow(_HIDDEN), self.narrow(3, _HIDDEN)
            found = self.made.rms_norm(RmsNorm(weight, _EPSILON, plus_one, early), x)
            wanted = reference.rms_norm(x, weight, _EPSILON, plus_one, early)
            _same("rms_norm", found, wanted, 2e-2)

    def attend(self) -> None:
        query = self.narrow(1, _HEADS, 1, _HEAD)
        key, value = [self.narrow(1, _GROUPS, _HELD, _HEAD) for _ in range(2)]
        found = self.made.attend(query, key, value, 0.3)
        if found is None:
            raise Unavailable("the compiled operator does not take a cache")
        wanted = reference.attend(query[0, :, 0], key[0], value[0], 0.3)
        _same("attend", found[0, 0], wanted, 2e-2)

    def layers(self) -> None:
        """A decoder layer, part by part and in one call."""
        made, width = self.made, _HEADS * _HEAD
        norms = [
            RmsNorm(self.narrow(size), _EPSILON, False, True) for size in (_HIDDEN, _HIDDEN, _HEAD)
        ]
        before, after, head = norms
        rows = (width, _GROUPS * _HEAD, _GROUPS * _HEAD)
        linears = [self.matrix(count, _HIDDEN) for count in rows]
        linears.append(self.matrix(_HIDDEN, width))
        bias = self.narrow(width)
        biases = (bias, None, None, None)
        table = AttentionTable(
            [(one, its) for (_, one), its in zip(linears, biases, strict=True)],
            (head, None),
            _HEAD,
            0.2,
        )
        x = self.narrow(1, _HIDDEN)
        cos, sin = [self.narrow(1, 16) for _ in range(2)]
        past = [self.narrow(1, _GROUPS, _HELD + 1, _HEAD) for _ in range(2)]
        positions = Positions(cos, sin)

        def cached(tensors: list[Tensor]) -> Cached:
            return Cached.of(tensors[0], tensors[1], _HELD)

        normed = made.rms_norm(before, x)
        own = [one.clone() for one in past]
        attended = made.attention(table, normed, positions, cached(own))
        states = [reference.product(matrix, normed) for matrix, _ in linears[:3]]
        states[0] += bias
        query, key, value = [one.to(_BF16).view(-1, _HEAD) for one in states]
        query = reference.rms_norm(query, head.weight, _EPSILON, False, True)
        query, key = [reference.rotate(one, cos, sin) for one in (query, key)]
        for tensor, new in zip(past, (key, value), strict=True):
            tensor[0, :, _HELD] = new
        for name, mine, its in zip(("keys", "values"), own, past, strict=True):
            _same(name, mine, its, 2e-2)
        mixed = reference.attend(query, past[0][0], past[1][0], 0.2).to(_BF16)
        wanted = reference.product(linears[3][0], mixed.view(1, -1))
        _same("attention", attended, wanted, 3e-2)

        rows = [pack_rows(one) for one in past]
        packed = Cached.of(rows[0], rows[1], _HELD, (_HEAD, _HEAD))
        attended_again = made.attention(table, normed, positions, packed)
        for name, row, its in zip(("keys", "values"), rows, own, strict=True):
            _equal(f"{name} in 8 bits", row[:, :, _HELD], pack_rows(its[:, :, _HELD]))
        wide = [unpack_rows(row, _HEAD, _BF16)[0] for row in rows]
        mixed = reference.attend(query, wide[0], wide[1], 0.2).to(_BF16)
        wanted = reference.product(linears[3][0], mixed.view(1, -1))
        _same("attention over 8 bits", attended_again, wanted, 3e-2)

        again = [one.clone() for one in own]
        block = BlockTable(table, before, after)
        summed, normed = made.block(block, x, positions, cached(again))
        _equal("block", summed, x + attended)
        _equal("block", normed, made.rms_norm(after, summed))
        _equal("block", again[0], own[0])

        router, prepared = self.matrix(_EXPERTS, _HIDDEN)
        routing = RouterTable(prepared, _CHOSEN, normed=True, narrow=True)
        logits, gates, slots = made.route(routing, normed)
        _same("route", logits, reference.product(router, normed), 2e-2)
        top = logits.float().softmax(-1).topk(_CHOSEN)
        _same("route", logits.float().softmax(-1).gather(1, slots), top.values, 1e-6)
        _same("route", gates, top.values / top.values.sum(), 1e-2)

        pairs = [(self.matrix(2 * _WIDTH, _HIDDEN), self.matrix(_HIDDEN, _WIDTH)) for _ in range(4)]
        prototypes = PrototypeTable(len(pairs))
        targets = [0, 1, 2, 3, 0, -1]
        forms = pairs[0][0][1].form, pairs[0][1][1].form
        layer = _layer(prototypes, forms, targets)

        def whole() -> tuple[Tensor, int] | None:
            return made.decoder(block, routing, layer, x, positions, cached(again))

        if whole() is not None:
            raise Unavailable("the compiled operator computes with prototypes that are not there")
        for number, ((_, up), (_, down)) in enumerate(pairs):
            prototypes.put(number, up, down)
        found = made.layer(layer, slots, gates, normed, summed)
        parts = torch.zeros(1, _HIDDEN, dtype=torch.float64)
        for slot, gate in zip(slots[0].tolist(), gates[0].tolist(), strict=True):
            if targets[slot] >= 0:
                (up, _), (down, _) = pairs[targets[slot]]
                parts += gate * reference.gated(up, down, normed)
        all_of_it = whole()
        if found is None or all_of_it is None:
            raise Unavailable("the compiled operator does not find prototypes")
        _same("layer", found[0], summed.double() + parts.to(_BF16), 2e-2)
        _equal("decoder", all_of_it[0], found[0])
        half = made.feed_forward(block, routing, layer, summed)
        more = made.decoder(*(block, routing, layer, x, positions, cached(again)), dense=self.mlp)
        alone = made.layer(layer, slots, gates, normed)
        if half is None or more is None or alone is None:
            raise Unavailable("the compiled operator does not find prototypes")
        _equal("feed_forward", half[0], found[0])
        _equal("decoder", more[0], summed + (alone[0] + made.dense(self.mlp, normed)))
        other, others = self.narrow(1, _HIDDEN), [one.clone() for one in past]
        its = made.decoder(block, routing, layer, other, positions, cached(others))
        caches = [[one.clone() for one in past], [one.clone() for one in past]]
        where = [(positions, cached(tensors)) for tensors in caches]
        both = made.decoder_together(block, routing, layer, torch.cat([x, other]), where)
        if its is None or both.out is None:
            raise Unavailable("the compiled operator does not find prototypes")
        _equal("decoder_together", both.out, torch.cat([all_of_it[0], its[0]]))
        for mine, wanted in zip(caches, (again, others), strict=True):
            _equal("decoder_together", mine[0], wanted[0])


def _layer(prototypes: PrototypeTable, forms: tuple[Form, Form], targets: list[int]) -> LayerTable:
    """A layer whose router slots have no scales and no constants."""
    count = len(targets)
    slots = SlotMap(0, tuple(targets), (1.0,) * count, (NONE,) * count)
    return LayerTable(prototypes, [forms], slots, None)


def _same(name: str, found: Tensor, wanted: Tensor, near: float) -> None:
    """Equal within ``near`` of the largest number."""
    room = near * max(1e-6, float(wanted.abs().max()))
    if (
        found.shape != wanted.shape
        or not float((found.double() - wanted.double()).abs().max()) <= room
    ):
        raise Unavailable(f"the compiled operator computes {name} wrongly")


def _equal(name: str, found: Tensor, wanted: Tensor) -> None:
    if not torch.equal(found, wanted):
        raise Unavailable(
            f"the compiled operator computes {name} in one call otherwise than in parts"
        )
