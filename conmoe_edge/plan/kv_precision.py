"""In how many bits the key-value cache holds its numbers. Arithmetic only.

``source`` is the model's own format; ``int8`` is ``model/kv_rows.py``: 8.25 bits a number. What keeps something else
than keys and values of tokens (the states of linear attention, caches of a model's own) has no such form.
"""

from __future__ import annotations

from dataclasses import replace

from conmoe_edge.errors import UnsupportedModel, UsageError
from conmoe_edge.model.anatomy import ModelAnatomy

KV_PRECISIONS = ("source", "int8")


def check_kv_precision(precision: str | None) -> None:
    """Refuse what is none; ``None`` leaves it to the package.

    Raises:
        UsageError: names those that there are.
    """
    if precision is not None and precision not in KV_PRECISIONS:
        raise UsageError(
            f"{precision!r} is not a precision for keys and values.",
            f"there are {', '.join(KV_PRECISIONS)}",
            "--kv-precision int8",
        )


def with_kv(anatomy: ModelAnatomy, precision: str) -> ModelAnatomy:
    """``anatomy`` with its cache in ``precision``.

    Raises:
        UnsupportedModel: a layer has no such form.
    """
    if precision not in KV_PRECISIONS:
        raise ValueError(f"{precision!r} is none of {KV_PRECISIONS}")
    if precision == anatomy.kv_precision:
        return anatomy
    if precision == "int8" and not has_int8(anatomy):
        raise UnsupportedModel(
            f"The cache of {anatomy.architecture} cannot be kept in 8 bits.",
            f"decoder layer {_first_without(anatomy)} keeps something else than keys and values of tokens",
            "--kv-precision source",
        )
    packed = precision == "int8"
    kv = tuple(replace(layer, in_int8=packed) for layer in anatomy.kv)
    return replace(anatomy, kv=kv, kv_precision=precision)


def has_int8(anatomy: ModelAnatomy) -> bool:
    """Whether every layer of the cache has a form in 8 bits."""
    return _first_without(anatomy) is None


def _first_without(anatomy: ModelAnatomy) -> int | None:
    return next((i for i, layer in enumerate(anatomy.kv) if layer.packed is None), None)
