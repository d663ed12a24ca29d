"""Biases that AutoGPTQ writes beside every packed weight, also where the layer has none: those are zeros.

Headers do not show that they are. So the ones that the model has no place for are left out of the checkpoint, and
become a part of the weight beside them, which is refused when it is read if they are not zero after all.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from conmoe_edge.checkpoint.quantised.gptq import BIAS, NAME
from conmoe_edge.checkpoint.quantised.scheme import Scheme


def biases_beside(scheme: Scheme) -> frozenset[str]:
    """The biases beside weights in GPTQ's packing, each a plain tensor of the checkpoint."""
    names = (name for name, one in scheme.tensors.items() if one.form == NAME)
    return frozenset(
        bias
        for name in names
        if (bias := _bias_of(name)) in scheme.tensors and scheme.tensors[bias].form == "plain"
    )


def without_biases(scheme: Scheme, names: Collection[str]) -> Scheme:
    """The same without these of ``biases_beside``, each of which is checked when its weight is read."""
    tensors = {name: one for name, one in scheme.tensors.items() if name not in names}
    for name, one in tensors.items():
        bias = _bias_of(name)
        if one.form == NAME and bias in names:
            parts = {**one.parts, BIAS: bias}
            nbytes = one.nbytes + scheme.tensors[bias].nbytes
            tensors[name] = replace(one, parts=parts, nbytes=nbytes)
    return Scheme(tensors)


def _bias_of(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"
