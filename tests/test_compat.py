"""Names that differ between releases of transformers: each is found on the release that is installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn
from transformers import DynamicCache

from conmoe_edge import compat
from conmoe_edge.checkpoint.format.forms import SCALE
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.compat import (
    CACHE_ARGUMENTS,
    TRANSFORMERS,
    Arguments,
    cache_argument,
    cache_of,
)
from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model.experts import find_experts, part_names
from conmoe_edge.offload.compute import torch_backend
from conmoe_edge.offload.compute.fused_linear import DenseProducts
from conmoe_edge.offload.compute.torch_backend import Arithmetic, Machine
from conmoe_edge.offload.storage.stored_expert import StoredExpert
from tests.families import BY_NAME, tiny_model

CPU = torch.device("cpu")
KERNELS = ("INT8_PRODUCT", "INT4_PRODUCT")
IDS = torch.tensor([[5, 17, 33]])
PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def _range() -> Requirement:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    found = [one for one in map(Requirement, project["dependencies"]) if one.name == "transformers"]
    return found[0]


def test_the_range_is_told_as_it_is_declared() -> None:
    assert Requirement(f"transformers{TRANSFORMERS}").specifier == _range().specifier
    assert transformers.__version__ in _range().specifier


def test_the_ends_of_the_range_are_the_ones_that_are_tested() -> None:
    root = PROJECT.parent
    bounds = {one.operator: one.version for one in _range().specifier}
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    assert f"LOWEST := transformers=={bounds['>=']}.0\n" in makefile
    pins = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    newest = next(Requirement(one) for one in pins if one.startswith("transformers=="))
    upper, tested = (Version(v) for v in (bounds["<"], next(iter(newest.specifier)).version))
    assert (tested.major, tested.minor + 1) == (upper.major, upper.minor)


def test_the_cache_is_found_under_each_name() -> None:
    cache = object()
    for name in CACHE_ARGUMENTS:
        assert cache_of({name: cache, "use_cache": True}) is cache
    assert cache_of({"use_cache": True, "past_key_values": None}) is None


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_cache_goes_in_and_comes_out(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(name)
    with torch.no_grad():
        first = model(IDS, use_cache=True)
        cache = cache_of(first)
        assert cache is not None
        second = model(IDS[:, :1], use_cache=True, **cache_argument(model, cache))
    assert cache_of(second) is cache
    assert not [record for record in caplog.records if "deprecated" in record.message]


def test_generate_names_the_cache_as_the_model_does() -> None:
    model = tiny_model("olmoe")
    found: list[object] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(cache_of(kwargs)), with_kwargs=True
    )
    model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert [type(one) for one in found] == [DynamicCache] * 3


@pytest.mark.parametrize("part", ["model", "model.layers.0", "model.layers.0.self_attn"])
def test_the_parts_of_a_model_are_given_the_cache_under_a_known_name(part: str) -> None:
    model = tiny_model("olmoe")
    found: list[object] = []
    model.get_submodule(part).register_forward_pre_hook(
        lambda module, args, kwargs: found.append(cache_of(kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(IDS, **cache_argument(model, DynamicCache(config=model.config)))
    assert [type(one) for one in found] == [DynamicCache]


def test_arguments_by_position_have_names() -> None:
    arguments = Arguments.of(tiny_model("olmoe"))
    assert arguments.named((1, 2), {"use_cache": True}) == {
        "input_ids": 1,
        "attention_mask": 2,
        "use_cache": True,
    }


def test_a_forward_without_a_known_name_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Linear") as caught:
        Arguments.of(nn.Linear(2, 2))
    assert TRANSFORMERS in caught.value.fix


def test_this_torch_has_the_kernels() -> None:
    """Without them everything still runs, slower; a release that drops one is to be noticed."""
    assert all(getattr(compat, name) is not None for name in KERNELS)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_experts_without_torch_s_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "operator", lambda: None)
    monkeypatch.setattr("conmoe_edge.offload.storage.stored_expert.operator", lambda: None)
    model = tiny_model("olmoe", hidden_size=64, intermediate_size=64, dtype=torch.bfloat16)
    module = next(iter(find_experts(model).values()))[1]
    held: dict[str, torch.Tensor] = {}
    for name in part_names(module):
        matrix = quantise(getattr(module, name)[0].detach(), kind)
        assert matrix.scales is not None
        held[name], held[name + SCALE] = matrix.values, matrix.scales
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    expert = StoredExpert(held)
    with torch.no_grad():
        wanted = Arithmetic(CPU).rows(module, expert, x)
        for name in KERNELS:
            monkeypatch.setattr(compat, name, None)
        found = Arithmetic(CPU).rows(module, expert, x)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    assert bool(found.any())


@pytest.mark.parametrize("rows", [1, 3])
def test_dense_products_without_torch_s_kernel(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = DenseProducts(Machine("cpu", native_bf16=False), native=False)
    generator = torch.Generator().manual_seed(1)
    matrix = quantise(torch.randn(64, 32, generator=generator).bfloat16(), "int8")
    x = torch.randn(rows, 32, generator=generator).bfloat16()
    wanted = ways.apply(matrix, None, x, None)
    monkeypatch.setattr(compat, "INT8_PRODUCT", None)
    found = ways.apply(matrix, None, x, None)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.05)


def test_a_torch_that_cannot_tell_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.native_bf16() in (False, True)
    monkeypatch.setattr(compat, "_BF16_PROBES", ("_gone",))
    assert compat.native_bf16() is False
