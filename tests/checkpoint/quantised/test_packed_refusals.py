"""What packed whole numbers cannot be read from is refused by name, from headers alone where they show it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_kinds import DATA, WEIGHT, digest, opened, reference_of, source_of
from safetensors.torch import load_file, save_file

from conmoe_edge.checkpoint.quantised.scheme import find_scheme
from conmoe_edge.checkpoint.quantised.stored import Stored, stored_in
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.errors import CheckpointError, ConmoeError, UnsupportedModel

BASE = WEIGHT.removesuffix("weight")
Headers = dict[str, Stored]
Settings = dict[str, Any]


def headers_of(kind: str) -> tuple[Headers, Settings]:
    stored = stored_in(CheckpointIndex.open(DATA / kind))
    declared = json.loads((DATA / kind / "config.json").read_text()).get("quantization_config")
    beside = {"gptq-w4-desc-asym": "quantize_config.json"}.get(kind)
    if beside:
        declared = json.loads((DATA / kind / beside).read_text())
    return stored, {"quant_method": beside, **(declared or {})}


def without(part: str) -> Callable[[Headers, Settings], None]:
    return lambda stored, _: stored.pop(BASE + part) and None


def shaped(part: str, *shape: int, dtype: str = "") -> Callable[[Headers, Settings], None]:
    def change(stored: Headers, _: Settings) -> None:
        one = stored[BASE + part]
        stored[BASE + part] = one._replace(shape=shape, dtype=dtype or one.dtype)

    return change


def said(**settings: Any) -> Callable[[Headers, Settings], None]:
    return lambda _, declared: declared.update(settings)


def weights(**settings: Any) -> Callable[[Headers, Settings], None]:
    return lambda _, declared: declared["config_groups"]["group_0"]["weights"].update(settings)


def two_groups(stored: Headers, declared: Settings) -> None:
    """Both fit the shapes: the second one has zero points."""
    first = declared["config_groups"]["group_0"]
    other = {**first, "weights": {**first["weights"], "symmetric": False}}
    declared["config_groups"]["group_1"] = other


def zeros_beside(stored: Headers, _: Settings) -> None:
    stored[BASE + "weight_zero_point"] = Stored("int32", 32, (4, 2))


REFUSED: tuple[tuple[str, Callable[[Headers, Settings], None], str], ...] = (
    ("ct-w4-group", without("weight_scale"), BASE),
    ("ct-w4-group", without("weight_shape"), BASE),
    ("ct-w4-group", without("weight_packed"), BASE),
    ("ct-w4-group", shaped("weight_packed", 32, 9), BASE),
    ("ct-w4-group", shaped("weight_packed", 33, 8), BASE),
    ("ct-w4-group", shaped("weight_packed", 2, 32, 8), BASE),
    ("ct-w4-group", shaped("weight_scale", 32, 3), BASE),
    ("ct-w4-group", shaped("weight_scale", 32, 2, dtype="int8"), BASE),
    ("ct-w4-group", shaped("weight_shape", 3), BASE),
    ("ct-w4-group", zeros_beside, "zero points"),
    ("ct-w4-group", two_groups, "do not belong together"),
    ("ct-w4-group", weights(num_bits=8), "do not belong together"),
    ("ct-w4-group", weights(num_bits=16), "num_bits 16"),
    ("ct-w4-group", weights(strategy="block"), "strategy block"),
    ("ct-w4-group", weights(actorder="group"), "groups of columns"),
    ("ct-w4-group", weights(type="float"), "how many bits"),
    ("ct-w4-group", said(format="marlin-24"), "marlin-24"),
    ("ct-w4-group", said(transform_config={"config_groups": {"u": {}}}), "transform_config"),
    ("ct-w4-group", lambda _, declared: declared.clear(), "how many bits"),
    ("ct-w4-group-asym", without("weight_zero_point"), "zero points"),
    ("ct-w4-group-asym", shaped("weight_zero_point", 32, 4), BASE),
    ("ct-w4-actorder", shaped("weight_g_idx", 63), BASE),
    ("ct-int8-channel", without("weight_scale"), BASE),
    ("ct-int8-channel", shaped("weight_scale", 31, 1), BASE),
    ("ct-int8-tensor-asym", without("weight_zero_point"), "zero points"),
    ("gptq-w4", without("scales"), BASE),
    ("gptq-w4", without("qzeros"), "zero points"),
    ("gptq-w4", without("qweight"), BASE),
    ("gptq-w4", shaped("scales", 3, 32), BASE),
    ("gptq-w4", shaped("qweight", 8, 33), BASE),
    ("gptq-w4", shaped("qweight", 7, 32), BASE),
    ("gptq-w4", shaped("qzeros", 2, 5), BASE),
    ("gptq-w4", shaped("qzeros", 2, 4, dtype="int16"), BASE),
    ("gptq-w4", shaped("g_idx", 65), BASE),
    ("gptq-w4", said(bits=8), "do not belong together"),
    ("gptq-w4", said(bits=5), "bits 5"),
    ("gptq-w4", said(bits="4"), "bits 4"),
    ("gptq-w4", said(group_size=0), "group_size 0"),
    ("gptq-w4", said(group_size=128), "do not belong together"),
    ("gptq-w4", said(checkpoint_format="marlin"), "marlin"),
    ("gptq-w4", said(checkpoint_format="gptq_p"), "gptq_p"),
    ("gptq-w4", said(pack_dtype="int16"), "pack_dtype int16"),
    ("gptq-w4", said(dynamic={"+:.*up_proj": {"bits": 6}}), "bits 6"),
    ("gptq-w4", lambda _, declared: declared.clear(), "how the numbers"),
    ("gptq-w4", said(quant_method="awq"), "do not belong together"),
    ("gptq-w4-desc-asym", without("g_idx"), "groups of columns"),
    ("awq-gemm", without("scales"), BASE),
    ("awq-gemm", without("qzeros"), "zero points"),
    ("awq-gemm", shaped("qzeros", 2, 5), BASE),
    ("awq-gemm", shaped("qweight", 64, 5), BASE),
    ("awq-gemm", said(version="gemv"), "do not belong together"),
    ("awq-gemm", said(version="gemv_fast"), "gemv_fast"),
    ("awq-gemm", said(bits=8), "bits 8"),
    ("awq-gemm", said(zero_point=False), "zero_point False"),
    ("awq-gemm", said(quant_method="auto-round", packing_format="auto_round:x"), "auto-round"),
)


@pytest.mark.parametrize(("kind", "change", "named"), REFUSED)
def test_headers_and_settings(
    kind: str, change: Callable[[Headers, Settings], None], named: str
) -> None:
    stored, declared = headers_of(kind)
    find_scheme(stored, declared, "bfloat16")
    change(stored, declared)
    with pytest.raises((CheckpointError, UnsupportedModel)) as caught:
        find_scheme(stored, declared, "bfloat16")
    assert named in str(caught.value) and caught.value.fix


def set_to(part: str, value: float, place: tuple[int, ...] = (0, 0)) -> Callable[[Any], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[BASE + part][place] = value

    return change


def filled(part: str, value: int) -> Callable[[Any], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[BASE + part].fill_(value)

    return change


NAN, INF = float("nan"), float("inf")
BROKEN: tuple[tuple[str, Callable[[Any], None], str], ...] = (
    ("ct-w4-group", set_to("weight_scale", NAN), "weight_scale holds NaN"),
    ("ct-w4-group", set_to("weight_scale", INF), "weight_scale holds NaN or infinity"),
    ("ct-w4-group", set_to("weight_scale", -1), "below 0"),
    ("ct-w4-group", set_to("weight_scale", 0), "a scale of 0"),
    ("ct-w4-group", set_to("weight_scale", 3e38), "too large"),
    ("ct-w4-group", set_to("weight_shape", 31, (0,)), r"says \[31, 64\]"),
    ("ct-w8-channel-asym", set_to("weight_shape", 63, (1,)), r"says \[32, 63\]"),
    ("ct-w4-actorder", set_to("weight_g_idx", 4, (0,)), "not one of the 4"),
    ("ct-w4-actorder", set_to("weight_g_idx", -1, (0,)), "not one of the 4"),
    ("ct-w4-actorder", filled("weight_g_idx", 0), "more than 16 columns"),
    ("ct-int8-channel", set_to("weight_scale", NAN), "holds NaN"),
    ("gptq-w4", set_to("scales", INF), "holds NaN or infinity"),
    ("gptq-w4", filled("qzeros", 0x66666666), "not the middle"),
    ("gptq-w4", filled("g_idx", 0), "more than 32 columns"),
    ("gptq-w4", set_to("g_idx", 2, (5,)), "not one of the 2"),
    ("gptq-w4-desc-asym", filled("qzeros", -1), "zero points of 0"),
    ("awq-gemm", set_to("scales", NAN), "holds NaN"),
    ("awq-gemm", set_to("scales", -0.1), "below 0"),
)


@pytest.mark.parametrize(("kind", "change", "named"), BROKEN)
def test_values(kind: str, change: Callable[[Any], None], named: str, tmp_path: Path) -> None:
    source = source_of(kind, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with opened(source).tensors() as read, pytest.raises(CheckpointError, match=named) as caught:
        read[WEIGHT][...]
    assert BASE in str(caught.value)


def test_zero_points_of_the_other_version_are_not_taken(tmp_path: Path) -> None:
    """The settings name the wrong version of GPTQ's format: every weight would be one step off."""
    source = source_of("gptq-w4", tmp_path / "source")
    path = source / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    path.write_text(json.dumps(config))
    with opened(source).tensors() as read, pytest.raises(CheckpointError, match="wrong version"):
        read[WEIGHT][...]


def test_an_order_that_the_settings_deny_is_not_taken(tmp_path: Path) -> None:
    source = source_of("gptq-w8-v2-desc", tmp_path / "source")
    path = source / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["desc_act"] = False
    path.write_text(json.dumps(config))
    with opened(source).tensors() as read, pytest.raises(CheckpointError, match="desc_act"):
        read[WEIGHT][...]


def test_scales_below_0_are_read_where_tools_write_them(tmp_path: Path) -> None:
    """auto-round's symmetric grids reach further down than up, and turn round where that fits better."""
    source = source_of("gptq-w4", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[BASE + "scales"] *= -1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with opened(source).tensors() as read, opened(DATA / "gptq-w4").tensors() as before:
        assert torch.equal(read[WEIGHT][...], -before[WEIGHT][...])


def test_layers_with_settings_of_their_own(tmp_path: Path) -> None:
    """Shapes say which of the declared widths a layer has."""
    wide, narrow = headers_of("gptq-w8-v2-desc"), headers_of("gptq-w4")
    stored = {**narrow[0], **{name: one for name, one in wide[0].items() if BASE in name}}
    declared = {**narrow[1], "dynamic": {"+:.*2.up_proj": {"bits": 8}, "-:.*lm_head": {}}}
    found = find_scheme(stored, declared, "bfloat16").tensors
    assert found[WEIGHT].layout.bits == 8
    assert found[WEIGHT.replace("up_proj", "gate_proj")].layout.bits == 4
    with pytest.raises(ConmoeError, match=BASE):
        find_scheme(stored, narrow[1], "bfloat16")


def test_a_layer_that_is_stored_plain_needs_no_word_in_the_settings(tmp_path: Path) -> None:
    """What is stored says more than patterns of names: a plain weight is read as what it is."""
    source = source_of("awq-gemm", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for part in ("qweight", "qzeros", "scales"):
        del tensors[BASE + part]
    tensors[WEIGHT] = torch.randn(32, 64, dtype=torch.float16)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    other = WEIGHT.replace("up_proj", "down_proj")
    with opened(source).tensors() as read:
        assert torch.equal(read[WEIGHT][...], tensors[WEIGHT])
        assert digest(read[other][...]) == reference_of("awq-gemm")[other]
