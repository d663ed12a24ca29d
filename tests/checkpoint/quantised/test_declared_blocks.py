"""FP8 blocks as compressed-tensors declares them: a shape of scales alone may fit two sizes of blocks."""

from __future__ import annotations

from typing import Any

import pytest

from conmoe_edge.checkpoint.quantised.scheme import find_scheme
from conmoe_edge.checkpoint.quantised.stored import Stored
from conmoe_edge.errors import CheckpointError

NAME = "model.layers.0.mlp.experts.0.up_proj.weight"
STORED = {
    NAME: Stored("float8_e4m3fn", 200 * 256, (200, 256)),
    f"{NAME}_scale": Stored("float32", 16, (2, 2)),
}


def declared(*blocks: list[int] | None) -> dict[str, Any]:
    groups = {
        f"group_{number}": {"targets": ["Linear"], "weights": {"block_structure": block}}
        for number, block in enumerate(blocks)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
    }


@pytest.mark.parametrize("block", [[100, 128], [128, 128]])
def test_the_declared_block_is_taken(block: list[int]) -> None:
    found = find_scheme(STORED, declared(block, None), "bfloat16")
    assert found.tensors[NAME].layout == tuple(block)


@pytest.mark.parametrize("blocks", [([100, 128], [128, 128]), ([64, 64],), ("100x128",)])
def test_blocks_that_do_not_tell_are_refused(blocks: Any) -> None:
    with pytest.raises(CheckpointError, match=NAME):
        find_scheme(STORED, declared(*blocks), "bfloat16")


def test_a_zero_point_beside_fp8_is_refused() -> None:
    point = f"{NAME.removesuffix('weight')}weight_zero_point"
    with pytest.raises(CheckpointError, match=point):
        find_scheme({**STORED, point: Stored("float32", 16, (2, 2))}, {}, "bfloat16")
