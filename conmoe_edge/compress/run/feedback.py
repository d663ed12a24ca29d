"""Where prototypes are rounded with error feedback: in every form whose scales are looked for, whatever the method.

Records in the checkpoint's own numbers, in bf16, in MXFP4 and of low rank are what they were, bit for bit. Pure.
"""

from __future__ import annotations

from dataclasses import replace

from conmoe_edge.compress.methods.few_bits import feeds_back
from conmoe_edge.compress.methods.interface import Method, Needs
from conmoe_edge.compress.run.record_sizes import RecordSizes


def needs_of(method: Method, sizes: RecordSizes) -> Needs:
    """What calibration has to keep for a method and for the rounding of what it decides."""
    layer = sizes.moe_layers[0]
    width = sizes.widths(layer)[-1]
    inputs = any(feeds_back(sizes.layout(layer, kind, width)) for kind in sizes.kinds)
    return replace(method.needs, inputs=inputs)


def takes_package_stream(needs: Needs, sizes: RecordSizes) -> bool:
    """Whether the calibration text also goes through the layers as they were written.

    The layers of a scope that is not decided yet are not written yet.
    """
    return needs.target or (needs.inputs and all(len(scope) == 1 for scope in sizes.scopes))
