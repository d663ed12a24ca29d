"""Packages of every kind, small enough for a processor, and how vLLM is started on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from families import save_tokenizer, tiny_model
from hand_packages import identity, slots_of, thirds, write_package

from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.export.hf import export_hf
from conmoe_edge.model.experts import find_experts

PROMPTS = [[5, 9, 33, 12], [7, 8, 9, 10, 11, 12, 13, 14], [40, 3]]
TOKENS = 16

# Sizes that vLLM's kernels for processors take. Fields of the common base that a family does not have are dropped:
# other engines read whatever a config has.
_HEADS = {"hidden_size": 128, "head_dim": 32, "num_local_experts": None, "n_routed_experts": None}
_SIZES: dict[str, dict[str, Any]] = {
    "olmoe": {**_HEADS, "moe_intermediate_size": None},
    "qwen3_moe": {**_HEADS, "moe_intermediate_size": 64},
    "mixtral": {
        **_HEADS,
        "num_local_experts": 8,
        "num_experts": None,
        "moe_intermediate_size": None,
    },
    "deepseek_v2": {
        "hidden_size": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "topk_method": "greedy",
    },
    "deepseek_v3": {
        "hidden_size": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "topk_method": "noaux_tc",
    },
}
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 4}


@dataclass(frozen=True)
class Case:
    """A package, how vLLM is started on it, and whether it is started on a plain export of it instead; ``beside_plain``
    starts it on both, for models whose decoding in vLLM drifts from transformers' whatever the experts are.
    """

    name: str
    make: Callable[[Path], Path]
    options: dict[str, Any] = field(default_factory=dict)
    export: Callable[[Path, Path], Any] | None = None
    prompts: tuple[tuple[int, ...], ...] = tuple(map(tuple, PROMPTS))
    beside_plain: bool = False


def small(family: str, **options: Any) -> Any:
    return tiny_model(family, **_SIZES[family], **options)


def written(model: Any, folder: Path, slots: Any, **options: Any) -> Path:
    write_package(model, folder, slots, hub_names=True, **options)
    save_tokenizer(folder)
    return folder


def shared(family: str) -> Callable[[Path], Path]:
    """Slots 0, 1, 2 share a prototype, 3, 4, 5 the next."""

    def make(folder: Path) -> Path:
        model = small(family)
        return written(model, folder, thirds(model))

    return make


def everything(folder: Path) -> Path:
    """Scales, constants with and without a prototype, and slots that give nothing."""
    model = small("qwen3_moe")
    generator = torch.Generator().manual_seed(3)
    constants = {layer: torch.randn(2, 128, generator=generator) for layer in find_experts(model)}

    def choose(layer: int, expert: int) -> SlotRecord:
        if expert == 3:
            return SlotRecord(None, 1.0, 0)
        if expert == 4:
            return SlotRecord(ExpertId(layer, 0), 0.5, 1)
        if expert == 6:
            return SlotRecord(None)
        return SlotRecord(ExpertId(layer, expert - expert % 2), 0.6 + expert / 10)

    return written(model, folder, slots_of(model, choose), constants=constants)


def scaled(folder: Path) -> Path:
    """Scales, and a different number of prototypes in each layer."""
    model = small("olmoe")
    return written(
        model,
        folder,
        slots_of(
            model,
            lambda layer, e: SlotRecord(ExpertId(layer, e - e % (layer + 2)), 0.7 + e / 10),
        ),
    )


def over_layers(folder: Path) -> Path:
    """Layers 0 and 1 share their prototypes."""
    model = small("olmoe")
    return written(
        model,
        folder,
        slots_of(
            model, lambda layer, e: SlotRecord(ExpertId(layer - layer % 2 if e < 5 else layer, e))
        ),
    )


def trimmed(folder: Path) -> Path:
    """40 of 64 neurons."""
    model = small("qwen3_moe")
    for _, module in find_experts(model).values():
        gate, up = module.gate_up_proj.detach().split(64, 1)
        module.gate_up_proj = torch.nn.Parameter(torch.cat([gate[:, :40], up[:, :40]], 1))
        module.down_proj = torch.nn.Parameter(module.down_proj.detach()[:, :, :40].clone())
    return written(model, folder, identity(model))


REMOVED = (1, 6)


def pruned(folder: Path) -> Path:
    """Every slot its own expert: its router may choose them all, the export takes two away."""
    model = small("olmoe")
    return written(model, folder, identity(model))


def without_two(package: Path, out: Path) -> Any:
    kept = tuple(slot for slot in range(8) if slot not in REMOVED)
    return export_hf(package, out, kept={layer: kept for layer in range(3)})


def demo(precision: str) -> Callable[[Path], Path]:
    """The trained model that comes along, a quarter of its experts removed."""

    def make(folder: Path) -> Path:
        from conmoe_edge import api
        from conmoe_edge.plan.request import PlanRequest
        from conmoe_edge.plan.serving import request_for

        request = PlanRequest(budget="2GB", device="cpu", rate=0.25, calibration_tokens=4096)
        api.fit("demo", folder, replace(request_for("vllm", request), precision=precision))
        return folder

    return make


_STORY = (
    tuple(range(100, 120)),
    (17, 300, 45, 9, 1200, 64, 77),
)
TP2 = {"tensor_parallel_size": 2}
CASES = (
    Case("olmoe", shared("olmoe")),
    Case("qwen3_moe", shared("qwen3_moe")),
    Case("mixtral", shared("mixtral")),
    Case("deepseek_v2", shared("deepseek_v2"), beside_plain=True),
    Case("deepseek_v3", shared("deepseek_v3"), beside_plain=True),
    Case("everything", everything),
    Case("scaled-uneven", scaled),
    Case("over-layers", over_layers),
    Case("trimmed", trimmed),
    Case("transformers-backend", shared("olmoe"), {"model_impl": "transformers"}),
    # Its head is its embedding, which vLLM's own class for this architecture does not know.
    Case("demo", demo("source"), {"model_impl": "transformers"}, prompts=_STORY),
    Case("demo-int8", demo("int8"), {"model_impl": "transformers"}, prompts=_STORY),
    Case("plain-scaled", scaled, export=export_hf),
    Case("plain-pruned", pruned, export=without_two),
    Case("qwen3_moe-tp2", shared("qwen3_moe"), TP2),
    Case("everything-tp2", everything, TP2),
    Case("everything-ep2", everything, {**TP2, "enable_expert_parallel": True}),
    Case("trimmed-tp2", trimmed, TP2),
)
BY_NAME = {case.name: case for case in CASES}
