"""What in a checkpoint of packed floats cannot be right, or is of a kind that is not read, is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conmoe_edge.checkpoint.quantised.expanded import ExpandedTensors
from conmoe_edge.checkpoint.quantised.scheme import Scheme, find_scheme
from conmoe_edge.checkpoint.quantised.stored import Stored
from conmoe_edge.errors import CheckpointError, ConmoeError, UnsupportedModel

DATA = Path(__file__).resolve().parents[2] / "data" / "quantised"
LAYER = "model.layers.0.mlp.experts"
WEIGHT = f"{LAYER}.3.up_proj.weight"
State = dict[str, torch.Tensor]


def read(kind: str) -> tuple[State, dict[str, Any]]:
    config = json.loads((DATA / kind / "config.json").read_text())
    return dict(load_file(DATA / kind / "model.safetensors")), config["quantization_config"]


def scheme_of(tensors: State, declared: dict[str, Any], peek: bool = True) -> Scheme:
    stored = {
        name: Stored(str(one.dtype)[6:], one.numel() * one.itemsize, tuple(one.shape))
        for name, one in tensors.items()
    }
    read = lambda name: tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()  # noqa: E731
    return find_scheme(stored, declared, "bfloat16", read if peek else None)


def expanded(tensors: State, declared: dict[str, Any], name: str) -> torch.Tensor:
    return ExpandedTensors(tensors, scheme_of(tensors, declared))[name][...]  # type: ignore[arg-type]


def gone(name: str) -> Callable[[State], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[State], Any]:
    return lambda tensors: tensors.update({name: tensor})


def said(**changes: Any) -> Callable[[State], Any]:
    """Another JSON in the state of the first NF4 weight, which stands for its kin, and of all that follow."""

    def change(tensors: State) -> None:
        for name in [one for one in tensors if one.endswith("bitsandbytes__nf4")]:
            state = {**json.loads(bytes(tensors[name].numpy())), **changes}
            text = json.dumps({key: one for key, one in state.items() if one != "gone"})
            tensors[name] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    return change


NF4, STATE = "bitsandbytes-nf4-nested", f"{WEIGHT}.quant_state.bitsandbytes__nf4"
HEADERS: list[tuple[str, Callable[[State], Any], str]] = [
    ("nvfp4-modelopt", gone(f"{WEIGHT}_scale"), WEIGHT),
    ("nvfp4-modelopt", gone(f"{WEIGHT}_scale_2"), WEIGHT),
    ("nvfp4-modelopt", put(f"{WEIGHT}_scale_2", torch.ones(2)), WEIGHT),
    ("nvfp4-modelopt", put(f"{WEIGHT}_scale_2", torch.ones((), dtype=torch.bfloat16)), WEIGHT),
    ("nvfp4-modelopt", put(f"{WEIGHT}_scale", torch.ones(32, 4)), WEIGHT),
    ("nvfp4-modelopt", put(WEIGHT, torch.zeros(32, 31, dtype=torch.uint8)), WEIGHT),
    ("nvfp4-modelopt", put(WEIGHT[:-6] + "pre_quant_scale", torch.ones(64)), "pre_quant_scale"),
    ("nvfp4-modelopt-stacked", gone(f"{LAYER}.down_proj_weight_scale"), f"{LAYER}.down_proj"),
    ("nvfp4-modelopt-stacked", gone(f"{LAYER}.down_proj"), f"{LAYER}.down_proj_weight_scale"),
    (
        "nvfp4-modelopt-stacked",
        put(f"{LAYER}.down_proj_weight_scale_2", torch.ones(3)),
        f"{LAYER}.down_proj",
    ),
    ("nvfp4-compressed-tensors", gone(f"{WEIGHT}_global_scale"), WEIGHT),
    ("nvfp4-compressed-tensors", put(f"{WEIGHT}_zero_point", torch.zeros(32, 4)), "zero_point"),
    ("mxfp4-compressed-tensors", gone(f"{WEIGHT}_scale"), WEIGHT),
    (
        "mxfp4-compressed-tensors",
        put(f"{WEIGHT}_scale", torch.zeros(32, 4, dtype=torch.uint8)),
        WEIGHT,
    ),
    (NF4, gone(STATE), WEIGHT),
    (NF4, gone(f"{WEIGHT}.absmax"), WEIGHT),
    (NF4, gone(f"{WEIGHT}.nested_absmax"), WEIGHT),
    (NF4, put(f"{WEIGHT}.absmax", torch.zeros(31, dtype=torch.uint8)), WEIGHT),
    (NF4, put(f"{WEIGHT}.nested_quant_map", torch.zeros(255)), WEIGHT),
    (NF4, put(WEIGHT, torch.zeros(1023, 1, dtype=torch.uint8)), WEIGHT),
    (NF4, put(f"{WEIGHT}.quant_state.bitsandbytes__fp4", torch.zeros(3)), "twice"),
    (NF4, said(shape=[1 << 40, 1]), "quant_state"),
    (NF4, said(shape=[64, -32]), "quant_state"),
    (NF4, said(shape="64, 32"), "quant_state"),
    (NF4, said(shape=[2, 32, 32]), "axes"),
    (NF4, said(blocksize=48), "quant_state"),
    (NF4, said(blocksize=64.0), "quant_state"),
    (NF4, said(dtype="int8"), "quant_state"),
    (NF4, said(quant_type="fp4"), "quant_state"),
    (NF4, said(nested_offset=float("nan")), "quant_state"),
    (NF4, said(nested_dtype="bfloat16"), "quant_state"),
    (NF4, said(nested_offset="gone"), "quant_state"),
    (NF4, said(more="x" * 5000), "bytes"),
    ("bitsandbytes-int8", gone(WEIGHT[:-6] + "SCB"), WEIGHT),
    ("bitsandbytes-int8", put(WEIGHT[:-6] + "SCB", torch.ones(31)), WEIGHT),
    (
        "bitsandbytes-int8",
        lambda tensors: [
            one.fill_(2) for name, one in tensors.items() if name.endswith("weight_format")
        ],
        "weight_format|row by row",
    ),
    ("fp8-modelopt", put(f"{WEIGHT}_scale_2", torch.ones(())), WEIGHT),
]


@pytest.mark.parametrize("case", range(len(HEADERS)))
def test_refused_before_any_weight_is_read(case: int) -> None:
    kind, change, named = HEADERS[case]
    tensors, declared = read(kind)
    change(tensors)
    with pytest.raises(ConmoeError, match=named) as caught:
        scheme_of(tensors, declared)
    assert caught.value.why and caught.value.fix


def fill(name: str, value: float) -> Callable[[State], Any]:
    def change(tensors: State) -> None:
        flat = tensors[name].reshape(-1)
        flat[:1] = torch.tensor([value]).to(flat.dtype)

    return change


def other_state(tensors: State) -> None:
    """One weight that is turned around, which its kin do not tell."""
    state = json.loads(bytes(tensors[STATE].numpy()))
    text = json.dumps({**state, "shape": state["shape"][::-1]})
    tensors[STATE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


VALUES: list[tuple[str, Callable[[State], Any], str]] = [
    ("fp8-modelopt", fill(WEIGHT, float("nan")), "numbers that are none"),
    ("nvfp4-modelopt", fill(f"{WEIGHT}_scale", float("nan")), "weight_scale"),
    ("nvfp4-modelopt", fill(f"{WEIGHT}_scale", -1.0), "weight_scale"),
    ("nvfp4-modelopt", fill(f"{WEIGHT}_scale_2", 0.0), "weight_scale_2"),
    ("nvfp4-modelopt", fill(f"{WEIGHT}_scale_2", float("inf")), "weight_scale_2"),
    ("nvfp4-modelopt", lambda tensors: tensors[f"{WEIGHT}_scale"].zero_(), "weight_scale"),
    ("nvfp4-compressed-tensors", fill(f"{WEIGHT}_global_scale", 0.0), "weight_global_scale"),
    ("mxfp4-compressed-tensors", fill(f"{WEIGHT}_scale", 255), "weight_scale"),
    (NF4, fill(f"{WEIGHT}.nested_absmax", float("inf")), "nested_absmax"),
    (NF4, fill(f"{WEIGHT}.quant_map", 0.5), "quant_map"),
    (NF4, other_state, "quant_state"),
    ("bitsandbytes-fp4", fill(f"{WEIGHT}.absmax", float("nan")), "absmax"),
    ("bitsandbytes-int8", fill(WEIGHT[:-6] + "SCB", -1.0), "SCB"),
    ("bitsandbytes-int8", fill(f"{WEIGHT}_format", 1), "weight_format"),
]


@pytest.mark.parametrize("case", range(len(VALUES)))
def test_refused_when_it_is_expanded(case: int) -> None:
    kind, change, named = VALUES[case]
    tensors, declared = read(kind)
    before = expanded(tensors, declared, WEIGHT)
    assert before.isfinite().all()
    change(tensors)
    with pytest.raises(CheckpointError, match=named) as caught:
        expanded(tensors, declared, WEIGHT)
    assert caught.value.why and caught.value.fix


def test_a_block_scale_of_zero_makes_its_block_zero() -> None:
    """E4M3 has no number between 0 and 2 ** -9: smaller scales are rounded to 0 by the tools themselves."""
    tensors, declared = read("nvfp4-modelopt")
    before = expanded(tensors, declared, WEIGHT)
    fill(f"{WEIGHT}_scale", 0.0)(tensors)
    after = expanded(tensors, declared, WEIGHT)
    assert not after[0, :16].any() and before[0, :16].any()
    assert torch.equal(after[0, 16:], before[0, 16:]) and torch.equal(after[1:], before[1:])


def test_shapes_in_values_need_the_values() -> None:
    tensors, declared = read(NF4)
    with pytest.raises(UnsupportedModel, match="quant_state") as caught:
        scheme_of(tensors, declared, peek=False)
    assert "--keep-source" in caught.value.fix


def test_one_small_tensor_is_read_for_all_of_its_kin() -> None:
    tensors, declared = read(NF4)
    asked = []
    stored = {
        name: Stored(str(one.dtype)[6:], one.numel() * one.itemsize, tuple(one.shape))
        for name, one in tensors.items()
    }
    find_scheme(
        stored,
        declared,
        "bfloat16",
        lambda name: asked.append(name) or bytes(tensors[name].numpy()),
    )
    weights = sum(name.endswith("_proj.weight") for name in tensors)
    assert weights == 32 and len(asked) == len(set(asked)) == 7


@pytest.mark.parametrize(
    "declared",
    [
        {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"},
        {"quant_method": "modelopt", "quant_algo": "W4A8_NVFP4_FP8"},
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4_SVD"}},
        },
        {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": {"group_0": {"format": "nvfp4-pack-quantized"}, "group_1": {}},
        },
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "transform_config": {"config_groups": {"R1": {"type": "hadamard"}}},
        },
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "sparsity_config": {"format": "sparse-24-bitmask"},
        },
    ],
)
def test_kinds_that_are_declared_and_not_read(declared: dict[str, Any]) -> None:
    tensors, _ = read("nvfp4-modelopt")
    with pytest.raises(UnsupportedModel, match=r"NVFP4_|W4A8|SVD|mixed|not read|_config") as caught:
        scheme_of(tensors, declared)
    assert caught.value.why and caught.value.fix


def test_mixed_forms_that_are_read() -> None:
    nv, _ = read("nvfp4-modelopt")
    fp8, _ = read("fp8-modelopt")
    mixed = {
        name: (nv if "layers.0" in name else fp8)[name]
        for name in {**fp8, **nv}
        if name in (nv if "layers.0" in name else fp8)
    }
    declared = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4"}},
    }
    assert scheme_of(mixed, declared).form == "fp8+nvfp4"
