"""Models whose forward reads numbers, or whose layers exchange more than one tensor, looked at without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import _BASE, _MLA, tiny_config, tiny_model

from conmoe_edge.compat import cache_of
from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model import bridge
from conmoe_edge.model.meta_forward import _KnownShapes
from conmoe_edge.model.probe import probe
from conmoe_edge.model.router import find_routers

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LONGROPE_PHI = {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.2}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
READS = [("phimoe", LONGROPE_PHI), ("olmoe", DYNAMIC), ("mixtral", LONGROPE)]


@pytest.mark.parametrize(("kind", "rope"), READS, ids=[f"{k}-{r['rope_type']}" for k, r in READS])
def test_a_forward_that_reads_positions_is_weighed(kind: str, rope: dict[str, Any]) -> None:
    config = tiny_config(kind, rope_parameters=rope, dtype=torch.float32)
    cells = probe(config).kv
    model = tiny_model(kind, rope_parameters=rope)
    with torch.no_grad():
        cache = cache_of(model(input_ids=torch.ones(1, 10, dtype=torch.long), use_cache=True))
    real = [2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers]
    assert [cell.per_token * 10 + cell.constant for cell in cells] == real
    assert sorted(find_routers(bridge.build_meta(config, torch.float32))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "extra", "why"),
    [
        (
            "glm_moe_dsa",
            {
                **_MLA,
                "q_lora_rank": 16,
                "n_group": 1,
                "index_n_heads": 2,
                "index_head_dim": 8,
                "index_topk": 4,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
            },
            "decoder layer 0 gives 2 values",
        ),
        ("deepseek_v4", {"q_lora_rank": 16}, "decoder layer 0 gives [1, 12, 4, 32]"),
    ],
)
def test_layers_that_exchange_more_are_refused_by_plan(
    kind: str, extra: dict[str, Any], why: str
) -> None:
    from transformers import AutoConfig

    settings = {name: one for name, one in {**_BASE, **extra}.items() if one is not None}
    with pytest.raises(UnsupportedModel, match="cannot be consolidated layer by layer") as found:
        probe(AutoConfig.for_model(kind, **settings))
    assert why in str(found.value)


def test_known_shapes_are_those_that_torch_gives() -> None:
    """Views, changes in place, several outputs, numbers and names in the place of tensors: the same answer again."""
    shapes = _KnownShapes()
    aten = torch.ops.aten
    x = torch.empty(3, 4, 6, device="meta").transpose(0, 2)
    half = torch.empty(6, 4, 3, device="meta", dtype=torch.float16)
    whole = torch.empty(6, 4, 3, device="meta", dtype=torch.long)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten.add.Tensor, (x, half), {}),
        (aten.add.Tensor, (whole, 1), {}),
        (aten.add.Tensor, (whole, 1.0), {}),  # equal numbers of another type: another dtype
        (aten.add.Tensor, (whole, True), {}),
        (aten.cat.default, ([x, x], 1), {}),
        (aten.cat.default, ([x, x], 2), {}),
        (aten._to_copy.default, (x,), {"dtype": torch.bfloat16}),
        (aten._to_copy.default, (x,), {"dtype": torch.float64}),
        (aten.topk.default, (x, 2), {}),
        (aten.view.default, (half, [12, 6]), {}),
        (aten.mm.default, (half[0], half[0].t()), {}),
    ]
    for func, args, kwargs in calls * 2:
        wanted, found = func(*args, **kwargs), shapes.call(func, args, kwargs)
        for one, other in zip(_tensors(wanted), _tensors(found), strict=True):
            assert (one.shape, one.stride(), one.dtype) == (
                other.shape,
                other.stride(),
                other.dtype,
            )
            assert other.is_meta
    assert len(shapes._found) == 9  # all but the views and what has several outputs


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)
