"""From headers, and what the model's files declare, to the tensors that a plain checkpoint of the model would have.

No weight is read here, and no torch is needed. What is not understood without doubt is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.errors import CheckpointError, UnsupportedModel

_FP8 = frozenset({"float8_e4m3fn", "float8_e5m2"})
_SCALES = frozenset({"float32", "bfloat16", "float16", "float8_e8m0fnu"})
_PLAIN = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "bool"})
# Scales of activations: the weights are the same without them, and activations are not rounded here.
_ACTIVATIONS = (".input_scale", ".activation_scale", ".input_activation_scale")
_CACHE = (".k_scale", ".v_scale", ".q_scale", ".kv_scale")
_BLOCK = 128
_MX_BLOCK = 32
_PLAIN_VERSION = (
    "name a version of it in 16 or 32 bit, MXFP4 (as gpt-oss) or FP8, where there is one"
)


class Stored(NamedTuple):
    """What a header says of one tensor of the file; ``dtype`` is torch's name."""

    dtype: str
    nbytes: int
    shape: tuple[int, ...]


def stored_in(index: CheckpointIndex) -> dict[str, Stored]:
    """The tensors of a checkpoint on this disk."""
    return {name: Stored(e.torch_name, e.nbytes, e.shape) for name, e in index.tensors.items()}


@dataclass(frozen=True, slots=True)
class Logical:
    """One tensor of the plain checkpoint.

    Attributes:
        name, dtype, shape: as a read gives it; ``dtype`` is torch's name.
        form: how it is stored: ``plain``, ``mxfp4`` or ``fp8``.
        nbytes: bytes that it takes in the checkpoint, scales included.
        values, scales: the tensors of the file that it is made of; ``scales`` is empty for a plain one.
        block: rows and columns that share a scale, for ``fp8``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    form: str
    nbytes: int
    values: str
    scales: str = ""
    block: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True)
class Scheme:
    """Every tensor of the plain checkpoint by its name."""

    tensors: Mapping[str, Logical]

    @property
    def form(self) -> str:
        """``plain`` where nothing is quantised, else the forms that there are."""
        forms = sorted({one.form for one in self.tensors.values()} - {"plain"})
        return "+".join(forms) or "plain"


def find_scheme(stored: Mapping[str, Stored], declared: Mapping[str, Any], dtype: str) -> Scheme:
    """Which tensors of the file belong together.

    Args:
        stored: all tensors of the checkpoint.
        declared: the settings of its quantisation; empty where no file has any.
        dtype: torch's name of the format that quantised tensors are expanded to.

    Raises:
        UnsupportedModel: the quantisation is of a kind that cannot be read.
        CheckpointError: tensors are missing, or their shapes do not belong together.
    """
    _check_declared(declared)
    found: dict[str, Logical] = {}
    used: set[str] = set()
    for name, one in stored.items():
        if name.endswith("_blocks") and one.dtype == "uint8":
            logical = _mxfp4(name, one, stored, dtype)
        elif one.dtype in _FP8 and not name.endswith(("_scale", "_scale_inv")):
            logical = _fp8(name, one, stored, declared, dtype)
        else:
            continue
        if logical.name in stored and logical.name != name:
            raise CheckpointError(
                f"The checkpoint has {logical.name} twice.",
                f"{name} is its quantised form",
                _PLAIN_VERSION,
            )
        found[logical.name] = logical
        used |= {logical.values, logical.scales}
    if declared and not found:
        kind = declared.get("quant_method", "unknown")
        raise UnsupportedModel(
            f"The quantisation that the model declares ({str(kind)[:40]}) is not in its weights.",
            "no tensor is stored in such a form",
            _PLAIN_VERSION,
        )
    for name, one in stored.items():
        if name in used or name.endswith(_ACTIVATIONS):
            continue
        _check_plain(name, one)
        found[name] = Logical(name, one.dtype, one.shape, "plain", one.nbytes, name)
    return Scheme(dict(sorted(found.items())))


def _check_declared(declared: Mapping[str, Any]) -> None:
    if not declared:
        return
    kind = declared.get("quant_method")
    layout = declared.get("format")
    known = (
        kind in ("mxfp4", "fp8")
        or (kind == "compressed-tensors" and layout in ("float-quantized", "naive-quantized"))
        or (kind == "modelopt" and declared.get("quant_algo") == "FP8")
    )
    if not known:
        words = ", ".join(
            str(one)[:40] for one in (kind, layout, declared.get("quant_algo")) if one
        )
        raise UnsupportedModel(
            f"This checkpoint is quantised in a form that is not read here ({words or 'unnamed'}).",
            "MXFP4 as gpt-oss has it and FP8 are read",
            _PLAIN_VERSION,
        )


def _check_plain(name: str, one: Stored) -> None:
    if name.endswith(_CACHE):
        raise UnsupportedModel(
            f"The tensor {name} is a scale of a quantised key-value cache.",
            "the cache is not quantised here, and the scale has no place in the model",
            _PLAIN_VERSION,
        )
    if name.endswith(
        ("weight_scale", "weight_zero_point", "_scale_inv", "_scales", ".scales", ".qzeros", ".SCB")
    ):
        raise CheckpointError(
            f"The tensor {name} is a scale of a quantised weight that cannot be read.",
            "no weight beside it is in FP8 or MXFP4",
            _PLAIN_VERSION,
        )
    if one.dtype not in _PLAIN:
        raise UnsupportedModel(
            f"The tensor {name} is stored as {one.dtype}.",
            "that is a number of a quantised weight, and nothing says how it is to be read",
            _PLAIN_VERSION,
        )


def _mxfp4(name: str, one: Stored, stored: Mapping[str, Stored], dtype: str) -> Logical:
    base = name.removesuffix("_blocks")
    scales = _partner(name, (f"{base}_scales",), stored)
    other = stored[scales]
    if len(one.shape) != 4 or one.shape[-1] != _MX_BLOCK // 2 or other.dtype != "uint8":
        raise _odd(name, one, scales, other)
    experts, rows, blocks, _ = one.shape
    if other.shape != one.shape[:-1] or 0 in one.shape:
        raise _odd(name, one, scales, other)
    shape = (experts, blocks * _MX_BLOCK, rows)
    return Logical(base, dtype, shape, "mxfp4", one.nbytes + other.nbytes, name, scales)


def _fp8(
    name: str, one: Stored, stored: Mapping[str, Stored], declared: Mapping[str, Any], dtype: str
) -> Logical:
    scales = _partner(name, (f"{name}_scale_inv", f"{name}_scale"), stored)
    other = stored[scales]
    if len(one.shape) < 2 or 0 in one.shape or other.dtype not in _SCALES:
        raise _odd(name, one, scales, other)
    block = _block_of(one.shape, other.shape, declared)
    if block is None:
        raise _odd(name, one, scales, other)
    return Logical(name, dtype, one.shape, "fp8", one.nbytes + other.nbytes, name, scales, block)


def _block_of(
    shape: tuple[int, ...], scales: tuple[int, ...], declared: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; ``None`` where the shapes do not tell."""
    *lead, rows, columns = shape
    if math.prod(scales) == 1 and not any(size != 1 for size in lead):
        return rows, columns
    if scales in ((rows,), (rows, 1)) and not lead:
        return 1, columns
    if scales[:-2] != tuple(lead) or len(scales) != len(shape):
        return None
    if scales[-2:] == (rows, 1):
        return 1, columns
    if scales[-2:] == (1, 1):
        return rows, columns
    block = _declared_block(declared)
    if not (
        isinstance(block, list | tuple)
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    ):
        return None
    high, wide = block
    grid = (-(-rows // high), -(-columns // wide))
    return (high, wide) if scales[-2:] == grid else None


def _declared_block(declared: Mapping[str, Any]) -> Any:
    """As the settings have it; ``None`` where groups of compressed-tensors differ in it."""
    groups = declared.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    weights = [one.get("weights") for one in found if isinstance(one, Mapping)]
    blocks = [one.get("block_structure") for one in weights if isinstance(one, Mapping)]
    blocks = [one for one in blocks if one]
    if not blocks:
        return declared.get("weight_block_size") or (_BLOCK, _BLOCK)
    return blocks[0] if all(one == blocks[0] for one in blocks) else None


def _partner(name: str, candidates: tuple[str, ...], stored: Mapping[str, Stored]) -> str:
    there = [one for one in candidates if one in stored]
    if len(there) == 1:
        return there[0]
    if there:
        raise CheckpointError(
            f"{name} has two scales: {there[0]} and {there[1]}.",
            "which of them is meant cannot be known",
            _PLAIN_VERSION,
        )
    raise CheckpointError(
        f"The scales of {name} are missing.",
        f"there is no {' or '.join(candidates)}; without them every number of it is wrong",
        "Download the model again; if it is the same afterwards, the model itself is broken.",
    )


def _odd(name: str, one: Stored, scales: str, other: Stored) -> CheckpointError:
    return CheckpointError(
        f"{name} and its scales do not belong together.",
        f"{name} is {one.dtype} {list(one.shape)}, {scales} is {other.dtype} {list(other.shape)}",
        _PLAIN_VERSION,
    )
