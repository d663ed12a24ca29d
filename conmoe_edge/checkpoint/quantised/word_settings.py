"""What GPTQ, AWQ and auto-round declare of the weights that they pack into words (``qweight``).

config.json has it, or the file that the tool writes beside it: quantize_config.json of GPTQ, quant_config.json of AWQ.
auto-round packs in the way of one of the two, and names which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from conmoe_edge.checkpoint.quantised.stored import PLAIN_VERSION
from conmoe_edge.errors import UnsupportedModel

Packing = Literal["gptq", "awq"]

_AUTO_ROUND = ("auto-round", "intel/auto-round")
# auto-round's names of packings -> whose it is, and whether zero points are stored as they are.
_AUTO_ROUND_PACKINGS: Mapping[str, tuple[Packing, bool]] = {
    "auto_round:auto_gptq": ("gptq", False),
    "auto_round:gptq": ("gptq", False),
    "auto_round:gptqmodel": ("gptq", True),
    "auto_round": ("gptq", True),
    "auto_round:auto_awq": ("awq", True),
    "auto_round:awq": ("awq", True),
}
_GPTQ_BITS = (2, 3, 4, 8)
_AWQ_BITS = (4,)


@dataclass(frozen=True, slots=True)
class WordSettings:
    """Attributes:
    sizes: bits of a number and columns of a group (-1: a whole row), all pairs that a layer may have.
    symmetric: every zero point is the middle; ``None`` where nothing says so for all layers.
    ordered: whether columns belong to groups in an order of their own; ``None`` where nothing says.
    plain_zeros: zero points are stored as they are, not one less.
    borrowed: a zero point of 0 takes one from the number above it when it is stored one less, as GPTQModel does.
    by_columns: AWQ's order for its ``gemv`` kernels.
    """

    sizes: tuple[tuple[int, int], ...]
    symmetric: bool | None = None
    ordered: bool | None = None
    plain_zeros: bool = True
    borrowed: bool = False
    by_columns: bool = False


def packing_in(declared: Mapping[str, Any]) -> Packing | None:
    """Whose packing the settings declare."""
    method = declared.get("quant_method")
    if method in _AUTO_ROUND:
        found = _AUTO_ROUND_PACKINGS.get(_auto_round_packing(declared))
        return found[0] if found and declared.get("data_type", "int") == "int" else None
    if method in ("gptq", "quantize_config.json"):
        return "gptq"
    return "awq" if method in ("awq", "quant_config.json") else None


def _auto_round_packing(declared: Mapping[str, Any]) -> str:
    # Early releases call it the backend.
    return str(declared.get("packing_format") or declared.get("backend"))


def gptq_settings(declared: Mapping[str, Any]) -> WordSettings:
    """Of a checkpoint in GPTQ's packing.

    Raises:
        UnsupportedModel: the settings do not say what is needed, or say what is not read.
    """
    if declared.get("quant_method") in _AUTO_ROUND:
        plain_zeros = _AUTO_ROUND_PACKINGS[_auto_round_packing(declared)][1]
    else:
        layout = str(declared.get("checkpoint_format") or declared.get("format") or "gptq").lower()
        if layout not in ("gptq", "gptq_v2") or declared.get("is_marlin_format"):
            raise _not_read("checkpoint_format", layout if layout != "gptq" else "marlin")
        plain_zeros = layout == "gptq_v2"
    if declared.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise _not_read("pack_dtype", declared["pack_dtype"])
    sizes, alike = _sizes(declared, _GPTQ_BITS)
    symmetric, ordered = declared.get("sym"), declared.get("desc_act")
    return WordSettings(
        sizes=sizes,
        symmetric=symmetric if type(symmetric) is bool and alike else None,
        ordered=ordered if type(ordered) is bool and alike else None,
        plain_zeros=plain_zeros,
        borrowed=_is_by_gptqmodel(declared),
    )


def awq_settings(declared: Mapping[str, Any]) -> WordSettings:
    """Of a checkpoint in AWQ's packing.

    Raises:
        UnsupportedModel: the settings do not say what is needed, or say what is not read.
    """
    order = "gemm"
    if declared.get("quant_method") not in _AUTO_ROUND:
        order = str(declared.get("version") or declared.get("format") or order).lower()
    if order not in ("gemm", "gemv") or declared.get("backend") == "llm-awq":
        raise _not_read("version", order if order not in ("gemm", "gemv") else "llm-awq")
    if declared.get("zero_point") is False:
        raise _not_read("zero_point", False)
    sizes, _ = _sizes(declared, _AWQ_BITS)
    return WordSettings(sizes, by_columns=order == "gemv")


def _sizes(
    declared: Mapping[str, Any], known: tuple[int, ...]
) -> tuple[tuple[tuple[int, int], ...], bool]:
    """All pairs of bits and columns of a group that layers may have, and whether all have the same settings."""
    bits = declared.get("bits", declared.get("w_bit"))
    group = declared.get("group_size", declared.get("q_group_size"))
    found = {_size(bits, group, known): None}
    alike = True
    for key in (
        "dynamic",
        "extra_config",
    ):  # GPTQModel's and auto-round's settings of single layers
        layers = declared.get(key)
        for pattern, own in layers.items() if isinstance(layers, Mapping) else ():
            if str(pattern).startswith("-:") or not isinstance(own, Mapping):
                continue
            if type(own.get("bits")) is int and own["bits"] >= 16:
                continue  # a layer that is stored plain
            own_bits, own_group = own.get("bits", bits), own.get("group_size", group)
            found[_size(own_bits, own_group, known)] = None
            alike = False
    return tuple(found), alike


def _size(bits: Any, group: Any, known: tuple[int, ...]) -> tuple[int, int]:
    if type(bits) is not int or bits not in known:
        raise _not_read("bits", bits)
    if type(group) is not int or (group <= 0 and group != -1):
        raise _not_read("group_size", group)
    return bits, group


def _is_by_gptqmodel(declared: Mapping[str, Any]) -> bool:
    meta = declared.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    makers = makers if isinstance(makers, list) else [makers]
    return any(str(one).lower().startswith("gptqmodel") for one in makers)


def _not_read(key: str, value: Any) -> UnsupportedModel:
    return UnsupportedModel(
        f"The packed weights of this checkpoint are declared with {key} {str(value)[:40]}.",
        "that is not among the packings that are read here",
        PLAIN_VERSION,
    )
