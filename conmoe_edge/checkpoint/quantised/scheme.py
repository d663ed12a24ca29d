"""From headers, and what the model's files declare, to the tensors that a plain checkpoint of the model would have.

No weight is read here. What is not understood without doubt is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conmoe_edge.checkpoint.quantised.forms import FORMS
from conmoe_edge.checkpoint.quantised.stored import PLAIN_VERSION, Headers, Logical, Stored
from conmoe_edge.errors import CheckpointError, UnsupportedModel

_PLAIN = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "bool"})
# Scales of activations: the weights are the same without them, and activations are not rounded here.
_ACTIVATIONS = (
    *(".input_scale", ".activation_scale", ".input_activation_scale", ".input_zero_point"),
)
_CACHE = (".k_scale", ".v_scale", ".q_scale", ".kv_scale")
_OF_A_WEIGHT = (
    *("weight_scale", "weight_zero_point", "_scale_inv", "_scales", ".scales", ".qzeros", ".SCB"),
)


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
    headers = Headers(stored, declared, dtype)
    found: dict[str, Logical] = {}
    used: set[str] = set()
    for name in stored:
        logical = next(filter(None, (form.find(name, headers) for form in FORMS.values())), None)
        if logical is None:
            continue
        if logical.name in found or (logical.name in stored and logical.name != name):
            raise CheckpointError(
                f"The checkpoint has {logical.name} twice.",
                f"{name} is its quantised form",
                PLAIN_VERSION,
            )
        found[logical.name] = logical
        used |= set(logical.parts.values())
    if declared and not found:
        kind = declared.get("quant_method", "unknown")
        raise UnsupportedModel(
            f"The quantisation that the model declares ({str(kind)[:40]}) is not in its weights.",
            "no tensor is stored in such a form",
            PLAIN_VERSION,
        )
    for name, one in stored.items():
        if name in used or name.endswith(_ACTIVATIONS):
            continue
        _check_plain(name, one)
        found[name] = Logical(name, one.dtype, one.shape, "plain", one.nbytes, {"values": name})
    return Scheme(dict(sorted(found.items())))


def _check_declared(declared: Mapping[str, Any]) -> None:
    if not declared or any(form.declares(declared) for form in FORMS.values()):
        return
    kind, layout = declared.get("quant_method"), declared.get("format")
    words = ", ".join(str(one)[:40] for one in (kind, layout, declared.get("quant_algo")) if one)
    raise UnsupportedModel(
        f"This checkpoint is quantised in a form that is not read here ({words or 'unnamed'}).",
        f"these forms are read: {', '.join(FORMS)}",
        PLAIN_VERSION,
    )


def _check_plain(name: str, one: Stored) -> None:
    if name.endswith(_CACHE):
        raise UnsupportedModel(
            f"The tensor {name} is a scale of a quantised key-value cache.",
            "the cache is not quantised here, and the scale has no place in the model",
            PLAIN_VERSION,
        )
    if name.endswith(_OF_A_WEIGHT):
        raise CheckpointError(
            f"The tensor {name} is a scale of a quantised weight that cannot be read.",
            f"no weight beside it is in a form that is read ({', '.join(FORMS)})",
            PLAIN_VERSION,
        )
    if one.dtype not in _PLAIN:
        raise UnsupportedModel(
            f"The tensor {name} is stored as {one.dtype}.",
            "that is a number of a quantised weight, and nothing says how it is to be read",
            PLAIN_VERSION,
        )
