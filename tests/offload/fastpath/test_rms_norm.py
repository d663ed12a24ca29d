"""Norms by the operator: the same numbers as the module's own, only where they are, and hooks are heard."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.fastpath.rms_norm import EdgeNorm, fast_norm
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.families import BY_NAME, tiny_model
from tests.hand_packages import identity, write_package

ENGINE = operator()
pytestmark = pytest.mark.skipif(ENGINE is None, reason="no compiler here")


def norm_of(kind: type[nn.Module], width: int) -> nn.Module:
    """A norm in bf16 with weights that are no ones."""
    module: Any = kind(width, eps=1e-5).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(width)
    module.weight.data.copy_(torch.randn(width, generator=generator))
    return module


def plain(x: torch.Tensor, weight: torch.Tensor, plus_one: bool) -> torch.Tensor:
    """The formula in fp64."""
    wide = x.double()
    scaled = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * (weight.double() + (1.0 if plus_one else 0.0))


@pytest.mark.parametrize("width", [8, 20, 96, 2048])
@pytest.mark.parametrize(("kind", "plus_one"), [(LlamaRMSNorm, False), (GemmaRMSNorm, True)])
def test_against_the_formula_and_the_module(
    kind: type[nn.Module], plus_one: bool, width: int
) -> None:
    assert ENGINE is not None
    module = norm_of(kind, width)
    fast = fast_norm(module, ENGINE)
    assert fast is not None and fast._norm.struct.plus_one == plus_one
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(1)).bfloat16() * 30
    found = fast(x)
    assert found.shape == x.shape and found.dtype == x.dtype
    wanted = plain(x, fast.weight.detach(), plus_one)
    assert torch.allclose(found.double(), wanted, rtol=2.0**-7, atol=1e-6)
    with torch.no_grad():
        same = (found == module(x)).float().mean()
    assert float(same) > 0.98, "only roundings on an edge differ"
    alone = torch.cat([fast(x[:, i : i + 1]) for i in range(3)], 1)
    assert torch.equal(alone, found), "a row is the same bits in any company"


class ScaledRMSNorm(LlamaRMSNorm):
    """Its name says one thing, its numbers another."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states)


class PickyRMSNorm(LlamaRMSNorm):
    """Takes more than rows."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(hidden_states * gate)


@pytest.mark.parametrize("kind", [ScaledRMSNorm, PickyRMSNorm])
def test_what_computes_something_else_is_left_alone(kind: type[nn.Module]) -> None:
    assert ENGINE is not None
    assert fast_norm(norm_of(kind, 32), ENGINE) is None


def test_other_modules_are_left_alone() -> None:
    assert ENGINE is not None
    for module in (nn.LayerNorm(8), nn.Linear(8, 8), nn.Identity()):
        assert fast_norm(module.to(torch.bfloat16), ENGINE) is None


def test_batches_strides_and_hooks_go_the_old_way() -> None:
    assert ENGINE is not None
    module = norm_of(LlamaRMSNorm, 64)
    fast = fast_norm(module, ENGINE)
    assert fast is not None
    many = torch.randn(1, 1024, 64).bfloat16()
    turned = torch.randn(1, 64, 5).bfloat16().transpose(1, 2)
    with torch.no_grad():
        assert torch.equal(fast(many), module(many))
        assert torch.equal(fast(turned), module(turned))
        assert torch.equal(fast(many[:, :2].double()), module(many[:, :2].double()))
    seen: list[str] = []
    fast.register_forward_pre_hook(lambda *_: seen.append("before"))
    fast.register_forward_hook(lambda *_: seen.append("after"))
    fast(many[:, :1])
    assert seen == ["before", "after"]


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_loaded_package_has_them_and_says_the_same(name: str, tmp_path: Path) -> None:
    model: Any = tiny_model(name, dtype=torch.bfloat16)
    packed: Any = load_package(write_package(model, tmp_path, identity(model)))
    fast = {path for path, one in packed.named_modules() if isinstance(one, EdgeNorm)}
    own = {path for path, one in model.named_modules() if re.search("RMSNorm$", type(one).__name__)}
    assert fast <= own and (fast or not own)
    assert packed.state_dict().keys() >= {f"{path}.weight" for path in fast}
    ids = torch.tensor([[5, 17, 33]])
    with torch.no_grad():
        wanted, found = model(ids).logits.float(), packed(ids).logits.float()
    assert torch.allclose(found, wanted, atol=0.06 * wanted.abs().max().item())
