"""Which prototypes get more bits: the sample, and the gain against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_model

from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.compress.stats import mixed_precision
from conmoe_edge.compress.stats.mixed_precision import RowSample, gains, widest
from conmoe_edge.compress.stream.scope_weights import LoadedLayer, ScopeWeights, matrix_views
from conmoe_edge.model.experts import expert_forward, find_experts, part_names
from conmoe_edge.model.probe import probe
from conmoe_edge.plan.levers import record_parts

HIDDEN = 32


def test_the_first_real_rows_of_a_slot_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_precision, "ROWS", 5)
    sample = RowSample(3, 2)
    rows = torch.arange(16.0).view(8, 2)
    gates = torch.arange(8.0)
    keep = torch.tensor([True, False, True, True])
    sample.add(1, gates[:4], rows[:4], keep)
    sample.add(1, gates[4:], rows[4:], None)
    sample.add(2, gates[:1], rows[:1], None)
    found = sample.tensors()
    assert found["kept"].tolist() == [0, 5, 1] and found["seen"].tolist() == [0, 7, 1]
    assert found["gates"].tolist() == [0, 2, 3, 4, 5, 0]
    assert torch.equal(found["rows"], rows[[0, 2, 3, 4, 5, 0]])


def test_an_empty_sample_has_its_shape() -> None:
    assert RowSample(3, 2).tensors()["rows"].shape == (0, 2)


def test_ties_go_to_the_lowest() -> None:
    assert widest([1.0, 3.0, 3.0, 3.0, 0.0], 2) == {1, 2}
    assert widest([0.0, 0.0], 0) == frozenset()
    assert widest([-1.0, -2.0], 1) == {0}


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_gain_equals_plain_loops(family: str) -> None:
    """Two layers, prototypes shared over both, one slot with a scale, one without a prototype, one without rows."""
    model: Any = tiny_model(family, intermediate_size=64)
    anatomy = probe(model.config)
    experts = anatomy.moe_layers[0].experts
    assert experts is not None
    modules = {layer: module for layer, (_, module) in find_experts(model).items() if layer < 2}
    module: Any = modules[1]
    weights = ScopeWeights({n: LoadedLayer(m) for n, m in modules.items()}, matrix_views(module))
    generator = torch.Generator().manual_seed(3)
    samples = {}
    for layer in modules:
        sample = RowSample(8, HIDDEN)
        for slot in range(7):
            count = 3 + 30 * slot
            sample.add(
                slot,
                torch.rand(count, generator=generator),
                torch.randn(count, HIDDEN, generator=generator),
                None,
            )
        samples[layer] = sample.tensors()
    pool = [ExpertId(layer, expert) for layer in modules for expert in range(8)]
    prototypes = [ExpertId(0, 1), ExpertId(0, 7), ExpertId(1, 2)]
    slots = [SlotRecord(prototypes[0 if i % 3 else 2], 1.0 + 0.5 * (i == 4)) for i in range(16)]
    slots[6] = SlotRecord(None)
    slots[7] = slots[15] = SlotRecord(prototypes[1])
    layouts = [make_layout(record_parts(experts, kind), kind) for kind in ("int8", "int4")]
    with torch.no_grad():
        found = gains(
            module,
            prototypes,
            slots,
            pool,
            samples,
            weights.parts,
            (layouts[0], layouts[1]),
            torch.float32,
            torch.device("cpu"),
        )
        wanted = [brute_gain(modules, module, p, slots, pool, samples) for p in prototypes]
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found[0] > 0 and found[2] > 0 and found[1] == 0.0


def brute_gain(modules: Any, module: Any, prototype: Any, slots: Any, pool: Any, samples: Any):
    members = [i for i, slot in enumerate(slots) if slot.prototype == prototype]
    own = {
        name: getattr(modules[prototype.layer], name)[prototype.expert]
        for name in part_names(module)
    }
    total = 0.0
    for i in members:
        sample, slot = samples[pool[i].layer], pool[i].expert
        start = int(sample["kept"][:slot].sum())
        taken = min(int(sample["kept"][slot]), mixed_precision.ROWS // len(members))
        for row in range(start, start + taken):
            x, gate = sample["rows"][row : row + 1], float(sample["gates"][row]) * slots[i].scale
            error = {}
            for kind in ("int8", "int4"):
                stored = {
                    name: through(weight, kind, module.is_transposed)
                    if weight.dim() == 2
                    else weight
                    for name, weight in own.items()
                }
                off = expert_forward(module, x, stored) - expert_forward(module, x, own)
                error[kind] = float(off.double().square().sum())
            share = int(sample["seen"][slot]) / taken
            total += share * gate**2 * (error["int4"] - error["int8"])
    return total


def through(weight: torch.Tensor, kind: Any, transposed: bool) -> torch.Tensor:
    if transposed:
        return quantise(weight.T, kind).dequantise().T
    return quantise(weight, kind).dequantise()
