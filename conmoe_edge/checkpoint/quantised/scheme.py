"""From headers, and what the model's files declare, to the tensors that a plain checkpoint of the model would have.

No weight is read here. What is not understood without doubt is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from conmoe_edge.checkpoint.format.dtypes import CODES, PLAIN
from conmoe_edge.checkpoint.quantised.bitsandbytes_4bit import STATE
from conmoe_edge.checkpoint.quantised.forms import FORMS
from conmoe_edge.checkpoint.quantised.stored import (
    PLAIN_VERSION,
    Headers,
    Logical,
    Peek,
    Stored,
)
from conmoe_edge.errors import CheckpointError, UnsupportedModel

_FLOATS = frozenset({"float32", "bfloat16", "float16"})
"""Only bitsandbytes stores packed numbers as these; all other tensors in them are quick to tell."""
# Scales of activations, keys and values among them: the weights are the same without them, and neither activations nor
# the cache are rounded here.
_ACTIVATIONS = (
    *("input_scale", ".activation_scale", ".input_activation_scale", ".input_global_scale"),
    ".input_zero_point",
    *(".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".output_scale", ".prob_output_scale"),
)
_OF_A_WEIGHT = (
    *("weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point", "_scale_inv"),
    *("_scales", ".scales", ".qzeros", ".SCB", ".absmax", ".quant_map", "pre_quant_scale"),
)
"""How names end that no plain tensor has."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Every tensor of the plain checkpoint by its name."""

    tensors: Mapping[str, Logical]

    @property
    def form(self) -> str:
        """``plain`` where nothing is quantised, else the forms that there are."""
        forms = sorted({one.form for one in self.tensors.values()} - {"plain"})
        return "+".join(forms) or "plain"


def find_scheme(
    stored: Mapping[str, Stored],
    declared: Mapping[str, Any],
    dtype: str,
    peek: Peek | None = None,
) -> Scheme:
    """Which tensors of the file belong together.

    Args:
        stored: all tensors of the checkpoint.
        declared: the settings of its quantisation; empty where no file has any.
        dtype: torch's name of the format that quantised tensors are expanded to.
        peek: reads small tensors, for forms that have shapes in values; ``None`` where only headers are at hand.

    Raises:
        UnsupportedModel: the quantisation is of a kind that cannot be read.
        CheckpointError: tensors are missing, or their shapes do not belong together.
    """
    _check_declared(declared)
    headers = Headers(stored, declared, dtype, peek)
    found: dict[str, Logical] = {}
    used: set[str] = set()
    disguised = any(STATE in name for name in stored)
    for name, one in stored.items():
        if one.dtype in _FLOATS and not disguised:
            continue
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
    for one in _parts_of(declared):
        if any(form.declares(one) for form in FORMS.values()):
            continue
        named = (one.get("quant_method"), one.get("format"), one.get("quant_algo"))
        words = ", ".join(str(word)[:40] for word in named if word)
        raise UnsupportedModel(
            f"This checkpoint is quantised in a form that is not read here ({words or 'unnamed'}).",
            f"these forms are read: {', '.join(FORMS)}",
            PLAIN_VERSION,
        )
    for what in ("transform_config", "sparsity_config"):
        if _does_something(declared.get(what)):
            raise UnsupportedModel(
                f"The weights of this checkpoint are not only quantised: it has a {what}.",
                "they would have to be transformed back, which is not done here",
                PLAIN_VERSION,
            )


def _parts_of(declared: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The settings, or those of each group of weights where groups are of different forms."""
    kind = declared.get("quant_method")
    if kind == "compressed-tensors" and declared.get("format") == "mixed-precision":
        groups, word = declared.get("config_groups"), "format"
    elif kind == "modelopt" and declared.get("quant_algo") == "MIXED_PRECISION":
        groups, word = declared.get("quantized_layers"), "quant_algo"
    else:
        groups, word = None, ""
    if isinstance(groups, Mapping) and groups:
        words = [one.get(word) if isinstance(one, Mapping) else None for one in groups.values()]
        yield from ({**declared, word: one} for one in {str(one): one for one in words}.values())
    elif declared:
        yield declared


def _does_something(settings: Any) -> bool:
    """Whether there are settings of a transform, or of a sparse format, that are not empty."""
    if not isinstance(settings, Mapping):
        return bool(settings)
    if "format" in settings:
        return settings["format"] not in (None, "dense")
    return bool(settings.get("config_groups", settings))


def _check_plain(name: str, one: Stored) -> None:
    if name.endswith(_OF_A_WEIGHT):
        raise CheckpointError(
            f"The tensor {name} is a scale of a quantised weight that cannot be read.",
            f"no weight beside it is in a form that is read ({', '.join(FORMS)})",
            PLAIN_VERSION,
        )
    if CODES.get(one.dtype) not in PLAIN:
        raise UnsupportedModel(
            f"The tensor {name} is stored as {one.dtype}.",
            "that is a number of a quantised weight, and nothing says how it is to be read",
            PLAIN_VERSION,
        )
