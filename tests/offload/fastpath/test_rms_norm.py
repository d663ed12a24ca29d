"""Norms by the operator: the same numbers as the module's own, only where they are, and hooks are heard."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.fastpath.rms_norm import FusedNorm, fused_norm
from conmoe_edge.offload.fastpath.supported import LISTED, Norm, Refusal
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
    if getattr(module, "bias", None) is not None:
        module.bias.data.copy_(torch.randn(width, generator=generator))
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
    fast = fused_norm(module, ENGINE)
    assert isinstance(fast, FusedNorm) and fast._norm.struct.plus_one == plus_one
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


def class_of(name: str) -> type[nn.Module]:
    family, _, kind = name.partition(".")
    if family == "torch":
        return nn.LayerNorm
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, kind)


@pytest.mark.parametrize(
    "name", sorted(n for n, (one, _) in LISTED.items() if isinstance(one, Norm))
)
def test_every_norm_on_the_list(name: str) -> None:
    assert ENGINE is not None
    module = norm_of(class_of(name), 96)
    fast = fused_norm(module, ENGINE)
    assert isinstance(fast, FusedNorm)
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    x = (x * torch.logspace(-2, 2, 64).unsqueeze(1)).bfloat16()
    with torch.no_grad():
        found, wanted = fast(x), module(x)
    assert torch.allclose(found.double(), wanted.double(), rtol=2.0**-7, atol=0.0)
    assert float((found == wanted).float().mean()) > 0.99, "only roundings on an edge differ"


class ScaledRMSNorm(LlamaRMSNorm):
    """A subclass of a listed class."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states)


def test_a_subclass_is_left_alone() -> None:
    assert ENGINE is not None
    assert isinstance(fused_norm(norm_of(ScaledRMSNorm, 32), ENGINE), Refusal)


def test_weights_in_fp32_are_left_alone() -> None:
    assert ENGINE is not None
    assert isinstance(fused_norm(norm_of(LlamaRMSNorm, 32).float(), ENGINE), Refusal)


def test_other_modules_are_left_alone() -> None:
    assert ENGINE is not None
    plain = nn.LayerNorm(8, bias=False), nn.LayerNorm((2, 8)), nn.Linear(8, 8), nn.Identity()
    for module in plain:
        assert isinstance(fused_norm(module.to(torch.bfloat16), ENGINE), Refusal)


def test_batches_strides_and_hooks_go_the_old_way() -> None:
    assert ENGINE is not None
    module = norm_of(LlamaRMSNorm, 64)
    fast = fused_norm(module, ENGINE)
    assert isinstance(fast, FusedNorm)
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
    fast = {path for path, one in packed.named_modules() if isinstance(one, FusedNorm)}
    own = {
        path
        for path, one in model.named_modules()
        if re.search("RMSNorm$|^LayerNorm$", type(one).__name__)
    }
    assert fast <= own and (fast or not own)
    assert packed.state_dict().keys() >= {f"{path}.weight" for path in fast}
    ids = torch.tensor([[5, 17, 33]])
    with torch.no_grad():
        wanted, found = model(ids).logits.float(), packed(ids).logits.float()
    assert torch.allclose(found, wanted, atol=0.06 * wanted.abs().max().item())
