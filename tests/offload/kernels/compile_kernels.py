"""``python -m tests.offload.kernels.compile_kernels``: compile the GPU's kernels for some cards and say how they read,
as JSON.

Triton's compiler needs no GPU. Every number that can be one is a multiple of 16, as in a real model.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from conmoe_edge.offload.kernels.triton import launch as gpu
from conmoe_edge.offload.kernels.triton import triton_kernels as kernels

CAPABILITIES = (75, 80, 90)
AMD = ("gfx942", "gfx1100", "gfx1030")
"""A data centre's card with wavefronts of 64 threads, and two of people's with 32."""
_ODD = {"wanted", "chosen", "count"}
_TABLES = {
    **dict.fromkeys(("numbers", "base", "values_at", "scales_at", "widths", "groups"), "*i64"),
    "wanted": "i32",
}
_REST = {"x_step": "i32", "y": "*fp32", "y_step": "i32", "hidden": "i32"}
_ROUTED = {
    **dict.fromkeys(("slots", "numbers", "target", "asked", "constant_of"), "*i64"),
    **dict.fromkeys(("weights", "factor", "constants", "y"), "*fp32"),
    **dict.fromkeys(("gates", "out"), "*bf16"),
    **dict.fromkeys(("hidden", "chosen", "count"), "i32"),
}


def loads(
    name: str, types: dict[str, str], constants: dict[str, Any], card: int | str
) -> list[str]:
    """The widths of the loads of a kernel for a CUDA capability or an AMD target."""
    function = getattr(kernels, name)
    types = {**types, **dict.fromkeys(constants, "constexpr")}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(function.arg_names)
        if argument not in constants and argument not in _ODD
    }
    source = ASTSource(
        fn=function,
        signature={argument: types[argument] for argument in function.arg_names},
        constexprs=constants,
        attrs=aligned,
    )
    if isinstance(card, str):
        target = GPUTarget("hip", card, 64 if card.startswith("gfx9") else 32)
        made = triton.compile(source, target=target, options={"num_warps": 4})
        assert len(made.asm["hsaco"]) > 0
        return sorted(
            set(re.findall(r"(?:global|buffer|flat)_load_(\w+)", str(made.asm["amdgcn"])))
        )
    made = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": 4})
    assert len(made.asm["cubin"]) > 0
    found = re.findall(r"ld\.global\S*?\.((?:v\d\.)?b\d+)", str(made.asm["ptx"]))
    return sorted(set(found))


def main() -> None:
    """Compile all; with words for those cards alone."""
    found: dict[str, dict[str, list[str]]] = {}
    cards = [int(one) if one.isdigit() else one for one in sys.argv[1:]] or CAPABILITIES
    for capability in cards:
        each = found[str(capability)] = {}
        for gated in (False, True):
            types = {**_TABLES, **_REST, "x": "*fp32" if gated else "*bf16"}
            shape = {"GATED": gated, "ROWS": gpu._ROWS, "STEP": gpu._STEP}
            for kind, code in (("bf16", 0), ("fp16", 1), ("int8", 3)):
                options = {"KIND": code, **shape}
                each[f"rows {kind} {gated}"] = loads("rows", types, options, capability)
            for kind, step in ((4, 32), (4, 64), (5, 32)):
                options = {"KIND": kind, "GATED": gated, "STEP": step}
                each[f"tiles {step} {kind} {gated}"] = loads("tiles", types, options, capability)
            for bits in (4, 3, 2):
                options = {"BITS": bits, "GATED": gated, "GROUPS": gpu._GROUPS}
                each[f"planes {bits} {gated}"] = loads("planes", types, options, capability)
        options = {"SCALED": True, "COUNTED": True, "ROOM": 8}
        each["merge"] = loads("merge", _ROUTED, options, capability)
        options = {"CONSTANTS": True, "BLOCK": gpu._BLOCK}
        each["combine"] = loads("combine", _ROUTED, options, capability)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
