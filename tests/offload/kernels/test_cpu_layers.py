"""Whole decoder layers by the operator against transformers' own, many tokens one by one, in every family.

A model runs as transformers runs it; what each of its layers is given goes to the operator as well, which keeps a cache
of its own. So an error shows in the layer that makes it, and in every later token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import Kind
from conmoe_edge.offload.compute.torch_backend import Machine
from conmoe_edge.offload.fastpath.attention_function import suit_attention
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.families import tiny_model
from tests.offload.kernels.operator_layers import Builder, Tables, cached, positions_of

ENGINE = operator()
pytestmark = pytest.mark.skipif(ENGINE is None, reason="no compiler here")

FAMILIES = (
    *("afmoe", "deepseek", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe"),
    *("flex_olmo", "glm4_moe", "gpt_oss", "granitemoe", "granitemoeshared", "hunyuan_v1_moe"),
    *("lfm2_moe", "mimo_v2_flash", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe"),
    *("qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "solar_open"),
)
AROUND = ("afmoe", "flex_olmo")  # whose norms are behind attention and experts
CLOSE = ("deepseek_v2", "deepseek_v3", "exaone_moe", "mixtral")
"""Whose attention is not the same bits: it is summed in another order, or torch's own once a window is full."""
TOKENS = 24
SETTINGS: dict[str, dict[str, Any]] = {
    "granitemoe": {"residual_multiplier": 0.7, "attention_multiplier": 0.3},
    "granitemoeshared": {"residual_multiplier": 0.7, "attention_multiplier": 0.3},
    "gpt_oss": {"attention_bias": True},
    "glm4_moe": {"attention_bias": True, "use_qk_norm": True},
    "phimoe": {"attention_bias": True},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "mixtral": {"sliding_window": 8},
    "ernie4_5_moe": {"use_bias": True},
}


def layers_of(model: Any) -> list[Any]:
    return list(model.model.layers)


class Watch:
    """What every layer was given and gave, of the last token."""

    def __init__(self, model: Any) -> None:
        self.seen: list[tuple[Tensor, Any, Tensor]] = []
        self.middle: dict[int, Tensor] = {}
        for number, layer in enumerate(layers_of(model)):
            layer.register_forward_hook(self.layer, with_kwargs=True)
            for name in ("post_attention_layernorm", "ffn_norm"):
                norm = getattr(layer, name, None)
                if norm is not None:
                    norm.register_forward_pre_hook(self.before(number))

    def layer(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        given = output if isinstance(output, Tensor) else output[0]
        self.seen.append((x.clone(), kwargs.get("position_embeddings"), given.clone()))

    def before(self, number: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            self.middle[number] = args[0].clone()

        return hook


def random_parts(model: Any) -> None:
    """Norms, biases, sinks and corrections that are not what they are made with."""
    generator = torch.Generator().manual_seed(3)
    for name, one in [*model.named_parameters(), *model.named_buffers()]:
        with torch.no_grad():
            if "norm" in name and one.ndim == 1 and name.endswith("weight"):
                one.add_(torch.randn(one.shape, generator=generator) * 0.2)
            elif name.endswith(("bias", "sinks")):
                one.copy_(torch.randn(one.shape, generator=generator) * 0.3)


def compare(name: str, found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The largest difference beside the largest number, and the share of numbers that are the same bits."""
    far = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    return far, float((found == wanted).float().mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_many_tokens(name: str) -> None:
    same, sums = run(name, "plain", 0.03)
    # Experts are summed in fp32, and by transformers in bf16, so the last bits may be others.
    assert sum(same) / len(same) > (0.3 if name in AROUND else 0.6)
    if name not in AROUND:
        assert sum(sums) / len(sums) > (0.8 if name in CLOSE else 0.99)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "qwen2_moe", "afmoe"])
def test_weights_in_eight_bits(name: str) -> None:
    """All but the router's; the model has its own weights, so results are close."""
    run(name, "int8", 0.12)


def run(name: str, kind: Kind, near: float) -> tuple[list[float], list[float]]:
    """The shares of equal bits, token by token and layer by layer: of outputs, and of sums behind attention."""
    assert ENGINE is not None
    model = tiny_model(name, dtype=torch.bfloat16, **SETTINGS.get(name, {}))
    if name in ("gpt_oss", "mimo_v2_flash"):
        assert model.config._attn_implementation == "eager"
    else:  # torch's fused attention rounds its probabilities
        assert suit_attention(model, Machine.here(torch.device("cpu")))
    random_parts(model)
    builder = Builder(ENGINE, name, model, kind)
    tables = [builder.layer(layer) for layer in layers_of(model)]
    watch = Watch(model)
    cache, same, sums, halves, wholes = None, [], [], 0, 0
    ids = torch.randint(3, 90, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    for held in range(TOKENS):
        watch.seen.clear()
        with torch.no_grad():
            out = model(ids[:, held : held + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        for number, (one, (x, given, wanted)) in enumerate(zip(tables, watch.seen, strict=True)):
            if one.cache is None:
                found = ENGINE.feed_forward(
                    *(one.block, one.router, one.experts, watch.middle[number]), dense=one.dense
                )
                halves += 1
            else:
                found = whole(name, one, x, given, held)
                wholes += 1
                if name not in AROUND:
                    summed, _ = ENGINE.block(
                        one.block, x.contiguous(), positions_of(name, given), cached(one, held)
                    )
                    sums.append(compare(name, summed, watch.middle[number])[1])
            assert found is not None
            far, equal = compare(name, found[0], wanted)
            assert far < near, f"layer {number}, token {held}: {far}"
            same.append(equal)
    assert wholes
    assert bool(halves) == (name in ("lfm2_moe", "qwen3_next", "qwen3_5_moe_text"))
    return same, sums


def whole(name: str, one: Tables, x: Tensor, given: Any, held: int) -> Any:
    assert ENGINE is not None
    return ENGINE.decoder(
        *(one.block, one.router, one.experts, x.contiguous()),
        *(positions_of(name, given), cached(one, held)),
        dense=one.dense,
    )
