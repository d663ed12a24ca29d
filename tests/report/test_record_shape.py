"""Neurons and forms, read from records of every kind: plain either way round, in few bits, narrowed, of low rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import tiny_model
from hand_packages import identity, write_package

from conmoe_edge.checkpoint.format.forms import factored_parts
from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.report.package_summary import summarise
from conmoe_edge.report.page import page
from conmoe_edge.report.record_shape import form_of, neurons_of

WIDE: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 128, "intermediate_size": 128}


@pytest.mark.parametrize("kind", ["plain", "int8", "int4", "q3", "mxfp4"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_every_form_tells_its_neurons(family: str, kind: Any, tmp_path: Path) -> None:
    model = tiny_model(family, **WIDE)
    facts = summarise(write_package(model, tmp_path / "package", identity(model), kind=kind))
    assert {(one.neurons, one.whole) for one in facts.prototypes} == {(128, 128)}
    assert {one.form for one in facts.prototypes} == {"fp32" if kind == "plain" else kind}
    bits = {"plain": 32, "int8": 8, "int4": 4, "q3": 3, "mxfp4": 4}[kind]
    assert all(bits <= (one.bits or 0) < bits + 3 for one in facts.prototypes)
    assert facts.reduction.narrower == 0 and facts.reduction.kept == facts.reduction.experts
    assert page(facts).count('class="expert"') >= len(facts.prototypes)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_narrower_ones_are_counted(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **WIDE)
    some = {ExpertId(layer, 1): 32 for layer in range(3)}
    folder = write_package(model, tmp_path / "package", identity(model), widths=some)
    facts = summarise(folder)
    assert {one.id: one.neurons for one in facts.prototypes if one.narrower} == some
    assert facts.reduction.narrower == 3
    gone = 3 * (128 - 32) / (len(facts.prototypes) * 128)
    assert facts.reduction.weights_share == pytest.approx(1 - gone)


def test_low_rank_and_mixed_forms_have_words() -> None:
    parts = [
        *factored_parts("gate_up_proj", 256, 64, "bfloat16"),
        *factored_parts("down_proj", 64, 128, "bfloat16"),
    ]
    assert neurons_of(make_layout(parts, "lowrank")) == 128
    assert form_of(make_layout(parts, "lowrank")) == "lowrank"
    assert form_of(make_layout(parts, "q2-q3")) == "q2 (down q3)"
    assert neurons_of(make_layout([("gate_up_proj", (4, 4), "float32")])) == 0
