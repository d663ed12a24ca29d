"""Fixtures of the plan's tests: models built by hand (shapes, no weights) and budgets.

The builders are handed out whole, so that a property test can call them with drawn numbers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import (
    DenseMatrix,
    ExpertPart,
    ExpertsAnatomy,
    KVLayer,
    LayerAnatomy,
    ModelAnatomy,
)
from conmoe_edge.units import parse_size

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def _experts(
    hidden: int, width: int, count: int, top_k: int, dtype: str = "bfloat16", index: int = 0
) -> ExpertsAnatomy:
    """Gated experts, fused as transformers keeps them."""
    shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    parts = tuple(
        ExpertPart(name, shape, dtype, shape[0] * shape[1] * _BYTES[dtype])
        for name, shape in shapes.items()
    )
    return ExpertsAnatomy(f"model.layers.{index}.mlp.experts", count, top_k, parts)


def build_model(
    *,
    layers: int = 4,
    hidden: int = 64,
    width: int = 32,
    count: int = 8,
    top_k: int = 2,
    vocab: int = 256,
    dtype: str = "bfloat16",
    dense_layers: tuple[int, ...] = (),
    max_context: int = 4096,
    window: int | None = None,
) -> ModelAnatomy:
    """A decoder with one kind of experts; ``dense_layers`` have none."""
    size = _BYTES[dtype]
    attention = 4 * hidden * hidden * size + 4 * hidden * size
    decoder = tuple(
        LayerAnatomy(
            index,
            attention + (0 if index in dense_layers else count * hidden * size),
            None if index in dense_layers else _experts(hidden, width, count, top_k, dtype, index),
        )
        for index in range(layers)
    )
    return ModelAnatomy(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        dtype=dtype,
        hidden_size=hidden,
        vocab_size=vocab,
        max_context=max_context,
        layers=decoder,
        outside_bytes=(2 * vocab * hidden + hidden) * size,
        kv=tuple(KVLayer(per_token=2 * hidden * size, window=window) for _ in range(layers)),
    )


def build_olmoe() -> ModelAnatomy:
    """The public shape: 16 layers of 64 experts, top-8, 16 key-value heads of 128, bf16."""
    return build_model(layers=16, hidden=2048, width=1024, count=64, top_k=8, vocab=50304)


def build_budget(asked: str, device: str = "cuda", **fields) -> Budget:
    """A budget of a size and nothing else known, unless ``fields`` say so."""
    size = parse_size(asked)
    assert size is not None
    assert device in ("cpu", "cuda")
    return Budget(device=device, device_bytes=size, asked=asked, source="test", **fields)


@pytest.fixture(scope="session")
def model():
    """``model(layers=4, hidden=64, ...)`` builds an anatomy."""
    return build_model


@pytest.fixture(scope="session")
def olmoe() -> ModelAnatomy:
    """OLMoE-1B-7B."""
    return build_olmoe()


@pytest.fixture
def with_matrices(olmoe: ModelAnatomy) -> ModelAnatomy:
    """OLMoE with its attention and its head as what may be quantised."""
    attention = tuple(
        DenseMatrix(layer.index, 2048, 2048, 2 * 2048 * 2048)
        for layer in olmoe.layers
        for _ in range(4)
    )
    head = DenseMatrix(None, 50304, 2048, 2 * 50304 * 2048, at_an_end=True)
    return replace(olmoe, dense_matrices=(*attention, head))


@pytest.fixture(scope="session")
def budget():
    """``budget("8GB", "cpu", device_bandwidth=...)`` builds a budget."""
    return build_budget
