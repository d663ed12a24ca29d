"""The runtime on a GPU: staging ring, copy stream, tier in host memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.checkpoint.format.forms import Kind
from conmoe_edge.integrations.load import load_package
from conmoe_edge.memory.budget import Budget
from conmoe_edge.offload.kernels.triton.launch import gpu_operator, why_not
from tests.families import tiny_model
from tests.hand_packages import identity, materialise, thirds, write_package

pytestmark = pytest.mark.gpu

IDS = torch.tensor([[5, 17, 33, 80, 12, 64, 9, 9, 41, 27, 3, 58, 77, 21, 30, 90]])


def _budget(host_bytes: int) -> Budget:
    return Budget("cuda", 4 << 30, "4GiB", "test", host_bytes=host_bytes)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.cpu()


def wide_model(**more: Any) -> Any:
    """Records of megabytes, so that copies take a while."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1024, "intermediate_size": 1024}
    return tiny_model("olmoe", num_attention_heads=64, **sizes, **more)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("host_bytes", [0, 60_000, 1 << 30])
def test_slots_and_tiers_change_nothing(name: str, host_bytes: int, tmp_path: Path) -> None:
    plain = tiny_model(name)
    slots = thirds(plain)
    folder = write_package(plain, tmp_path, slots)
    everything = load_package(folder, budget=_budget(0), device="cuda")
    expected = _logits(everything)
    assert torch.allclose(expected, _logits(materialise(plain, slots)), atol=1e-3)
    tokens = everything.generate(IDS.cuda(), max_new_tokens=12, do_sample=False).tolist()
    for count in (1, 2, 5):
        few = load_package(folder, budget=_budget(host_bytes), device="cuda", slots=(count,))
        for _ in range(3):
            assert torch.equal(_logits(few), expected)
        assert few.generate(IDS.cuda(), max_new_tokens=12, do_sample=False).tolist() == tokens
        few.conmoe.close()


@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_one_token_by_the_operator(kind: Kind, tmp_path: Path) -> None:
    """The compiled kernels: the same bits at any number of slots, and nearly what a processor computes."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert gpu_operator(device) is not None, why_not(device)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}
    plain = tiny_model("olmoe", dtype=torch.bfloat16, num_attention_heads=8, **sizes)
    folder = write_package(plain, tmp_path, thirds(plain), kind=kind)
    everything = load_package(folder, device="cuda")
    assert everything.conmoe.stats().kernel == "triton"
    options = {
        "max_new_tokens": 24,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }

    def logits(model: Any) -> torch.Tensor:
        return torch.stack(model.generate(IDS.to(model.device), **options).logits).float().cpu()

    expected = logits(everything)
    on_cpu = logits(load_package(folder, device="cpu"))
    assert (expected[0] - on_cpu[0]).abs().max() < 0.05 * on_cpu[0].abs().max()
    for count in (1, 2, 5):
        few = load_package(folder, budget=_budget(0), device="cuda", slots=(count,))
        assert torch.equal(logits(few), expected)
        assert few.conmoe.stats().misses > 0
        few.conmoe.close()


def test_the_processor_takes_a_share_of_what_is_missing(tmp_path: Path) -> None:
    plain = wide_model(dtype=torch.bfloat16)
    folder = write_package(plain, tmp_path, identity(plain))
    copied = load_package(folder, budget=_budget(1 << 30), device="cuda", slots=(5,))
    shared = load_package(folder, budget=_budget(1 << 30), device="cuda", slots=(5,), misses="auto")
    host = shared.conmoe.backend.host
    assert host is not None, "the system lets no memory be page-locked"
    found = [
        model(IDS[:, :1].cuda()).logits.float().cpu()
        for model in (copied, shared)
        for _ in range(4)
    ]
    assert all(torch.allclose(one, found[0], rtol=5e-2, atol=5e-2) for one in found)
    assert host.costs is not None and min(host.costs.copy, host.costs.compute) > 0
    if host.costs.aside(4):
        assert shared.conmoe.stats().host_computed > 0


def test_slots_are_not_overwritten_while_they_are_read(tmp_path: Path) -> None:
    """Many tokens through few slots, without ever waiting for the GPU: a copy that overtook a kernel would show."""
    plain = wide_model(dtype=torch.bfloat16)
    folder = write_package(plain, tmp_path, identity(plain))
    everything = load_package(folder, device="cuda")
    few = load_package(folder, budget=_budget(1 << 30), device="cuda", slots=(5,))
    for model in (everything, few):
        model.eval()
    tokens = torch.randint(0, 90, (100,), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.inference_mode():
        caches: list[Any] = [None, None]
        found: list[list[torch.Tensor]] = [[], []]
        for token in tokens:
            for which, model in enumerate((everything, few)):
                out = model(token.view(1, 1), past_key_values=caches[which], use_cache=True)
                caches[which] = out.past_key_values
                found[which].append(out.logits[0, -1])
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))


def test_the_budget_is_never_exceeded(tmp_path: Path) -> None:
    """What the driver says is used, while prompts and answers run."""
    plain = wide_model()
    folder = write_package(plain, tmp_path, identity(plain))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    others = (
        total - free - torch.cuda.memory_reserved()
    )  # and this process' context, which a budget counts
    budget = Budget("cuda", 2 << 30, "2GiB", "test")
    model = load_package(folder, budget=budget, device="cuda")
    most = 0
    for _ in range(5):
        model.generate(IDS.cuda(), max_new_tokens=16, do_sample=False)
        free, total = torch.cuda.mem_get_info()
        most = max(most, total - free - others)
    assert most <= budget.device_bytes


def test_retreat_gives_memory_back(tmp_path: Path) -> None:
    plain = wide_model()
    model = load_package(write_package(plain, tmp_path, thirds(plain)), device="cuda")
    expected = _logits(model)
    before = torch.cuda.memory_allocated()
    held = model.conmoe.stats().slot_bytes
    assert model.conmoe.retreat()
    assert before - torch.cuda.memory_allocated() >= held - model.conmoe.stats().slot_bytes - 4096
    assert torch.equal(_logits(model), expected)
