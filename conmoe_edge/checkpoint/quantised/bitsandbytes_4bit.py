"""bitsandbytes NF4 and FP4: sixteen numbers, a largest value for each block, and these values perhaps quantised again.

``X.weight`` holds two numbers in a byte, flat, so that its header has no shape: that is written as JSON in the small
tensor ``X.weight.quant_state.bitsandbytes__nf4``. One of these is read for all weights whose names differ in numbers
alone, and each weight is compared with its own when it is expanded. The library expands; its operator believes every
size, so that all of them are checked here. Stacks of experts are not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.quantised.stored import PLAIN_VERSION, Headers, Logical
from conmoe_edge.errors import CheckpointError, UnsupportedModel

NAME = "bitsandbytes-4bit"
_KINDS = ("nf4", "fp4")
STATE = ".quant_state.bitsandbytes__"
"""In the name of the JSON beside every weight in this form."""
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = ("bfloat16", "float16", "float32")
_PLAIN_KEYS = frozenset({"quant_type", "blocksize", "dtype", "shape"})
_NESTED_KEYS = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})


@dataclass(frozen=True, slots=True)
class State:
    """What a weight's JSON says. ``outer`` is the block of the quantised largest values, 0 where they are plain."""

    kind: str
    shape: tuple[int, ...]
    block: int
    outer: int
    offset: float

    def same_layout(self, other: State) -> bool:
        """Whether they differ in the offset alone, which each weight has its own of."""
        mine = (self.kind, self.shape, self.block, self.outer)
        return mine == (other.kind, other.shape, other.block, other.outer)


def declares(settings: Mapping[str, Any]) -> bool:
    """See ``forms.Form``."""
    return settings.get("quant_method") == "bitsandbytes"


def find(name: str, headers: Headers) -> Logical | None:
    """A weight with a state beside it, whatever format its bytes pretend to have."""
    kinds = [kind for kind in _KINDS if f"{name}{STATE}{kind}" in headers.stored]
    if not kinds:
        return None
    kind = kinds[0]
    own = headers.partner(name, *(f"{name}{STATE}{one}" for one in _KINDS))
    like = f"{headers.first_like(name)}{STATE}{kind}"
    source = like if like in headers.stored else own
    state = _parsed(source, headers.values_of(source), kind)
    if len(state.shape) != 2:
        raise UnsupportedModel(
            f"{name} is stored by bitsandbytes as one tensor of {len(state.shape)} axes.",
            "only matrices are read in this form",
            PLAIN_VERSION,
        )
    parts = {"values": name, "state": own, "map": f"{name}.quant_map", "absmax": f"{name}.absmax"}
    if state.outer:
        parts |= {"outer_absmax": f"{name}.nested_absmax", "outer_map": f"{name}.nested_quant_map"}
    for part in parts.values():
        headers.partner(name, part, what="parts")
    _check_sizes(name, parts, state, headers)
    nbytes = headers.nbytes(*parts.values())
    return Logical(name, headers.dtype, state.shape, NAME, nbytes, parts, state)


def _check_sizes(name: str, parts: Mapping[str, str], state: State, headers: Headers) -> None:
    count = math.prod(state.shape)
    blocks = -(-count // state.block)
    wanted = {"map": ("float32", 16), "absmax": ("uint8" if state.outer else "float32", blocks)}
    if state.outer:
        wanted["outer_absmax"] = ("float32", -(-blocks // state.outer))
        wanted["outer_map"] = ("float32", 256)
    if headers.stored[parts["state"]].dtype != "uint8":
        raise headers.odd(name, parts["state"])
    if headers.stored[name].nbytes != -(-count // 2):
        raise headers.odd(name, parts["absmax"])
    for part, (dtype, size) in wanted.items():
        one = headers.stored[parts[part]]
        if one.dtype != dtype or math.prod(one.shape) != size:
            raise headers.odd(name, parts[part])


def _parsed(name: str, data: bytes, kind: str) -> State:
    """The JSON of a state, believed only as far as it makes sense.

    Raises:
        CheckpointError: it does not.
    """
    try:
        said = json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _senseless(name, str(error)[:100]) from None
    keys = frozenset(said) if isinstance(said, dict) else frozenset()
    if keys not in (_PLAIN_KEYS, _PLAIN_KEYS | _NESTED_KEYS):
        raise _senseless(name, "it has other entries than bitsandbytes writes")
    shape, nested = said["shape"], keys > _PLAIN_KEYS
    whole = isinstance(shape, list) and 0 < len(shape) <= 8
    if not whole or any(type(size) is not int or not 0 < size < 1 << 31 for size in shape):
        raise _senseless(name, f"its shape is {str(shape)[:60]}")
    offset = said.get("nested_offset", 0.0)
    if (
        said["quant_type"] != kind
        or not _is_block(said["blocksize"])
        or said["dtype"] not in _DTYPES
        or (nested and not _is_block(said["nested_blocksize"]))
        or (nested and said["nested_dtype"] != "float32")
        or type(offset) not in (int, float)
        or not math.isfinite(offset)
    ):
        raise _senseless(name, "one of its entries is none that bitsandbytes writes")
    outer = said["nested_blocksize"] if nested else 0
    return State(kind, tuple(shape), said["blocksize"], outer, float(offset))


def _is_block(value: Any) -> bool:
    return type(value) is int and value in _BLOCKS


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name comes twice")
    return table


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _senseless(name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{name} does not say how its weight is quantised.",
        why,
        "Download the model again; if it is the same afterwards, the model itself is broken.",
    )


def expand(logical: Logical, parts: Mapping[str, Tensor]) -> Tensor:
    """The library's own expansion, rounded once to the dtype of ``logical``."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    guessed: State = logical.layout
    state = _parsed(logical.parts["state"], parts["state"].numpy().tobytes(), guessed.kind)
    if not state.same_layout(guessed):
        raise logical.broken(
            "state", f"says {list(state.shape)}, and its kin {list(guessed.shape)}"
        )
    if not torch.allclose(parts["map"], get_4bit_type(state.kind, device="cpu"), atol=1e-6):
        raise logical.broken("map", f"holds other numbers than {state.kind} has")
    absmax, outer, offset = parts["absmax"].reshape(-1), None, None
    if state.outer:
        if not all(bool(parts[part].isfinite().all()) for part in ("outer_absmax", "outer_map")):
            raise logical.broken("outer_absmax", "or its map holds NaN or infinity")
        outer = QuantState(
            absmax=parts["outer_absmax"].reshape(-1),
            code=parts["outer_map"].reshape(-1),
            blocksize=state.outer,
            dtype=torch.float32,
        )
        offset = torch.tensor(state.offset)
    elif not bool(absmax.isfinite().all()) or bool((absmax < 0).any()):
        raise logical.broken("absmax", "holds NaN, infinity or a number below 0")
    # Blocks lie one after another whatever the rows are, but for rows shorter than a block the library's AVX-512 kernel
    # takes another block's largest value (0.50.2). So each block is a row of its own here.
    count = math.prod(state.shape)
    values = torch.zeros(len(absmax), state.block // 2, dtype=torch.uint8)
    values.view(-1)[: -(-count // 2)] = parts["values"].reshape(-1).view(torch.uint8)
    whole = QuantState(
        absmax=absmax,
        shape=torch.Size((len(absmax), state.block)),
        code=parts["map"],
        blocksize=state.block,
        quant_type=state.kind,
        dtype=getattr(torch, logical.dtype),
        offset=offset,
        state2=outer,
    )
    return dequantize_4bit(values, whole).reshape(-1)[:count].reshape(state.shape)
