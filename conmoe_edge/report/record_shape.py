"""What a record holds, read from its layout alone: neurons, and the form of the numbers in words. Pure."""

from __future__ import annotations

from conmoe_edge.checkpoint.format.forms import DOWN
from conmoe_edge.checkpoint.format.layout import expert_width
from conmoe_edge.checkpoint.format.manifest import RecordLayout

_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def neurons_of(layout: RecordLayout) -> int:
    """Neurons of the experts in such records; 0 where the parts do not tell."""
    return expert_width(layout, _transposed(layout))


def form_of(layout: RecordLayout) -> str:
    """``bf16``, ``q3``, ``q2 (down q3)``: how the numbers of an expert are stored."""
    name = layout.precision
    if name == "source":
        types = {part.dtype for part in layout.parts if len(part.shape) == 2}
        found = next(iter(types)) if len(types) == 1 else name
        return _NAMES.get(found, found)
    first, _, second = name.partition("-")
    return f"{first} (down {second})" if second else name


def _transposed(layout: RecordLayout) -> bool:
    """Whether plain matrices are [in, out]: the one way round in which both matrices have the same neurons."""
    shapes = {part.name: part.shape for part in layout.parts if len(part.shape) == 2}
    down = shapes.get(DOWN)
    others = [shape for name, shape in shapes.items() if name.endswith("up_proj")]
    if down is None or not others:
        return False
    (outputs, width), (rows, columns) = down, others[0]
    as_usual = columns == outputs and rows in (width, 2 * width)
    other_way = rows == width and columns in (outputs, 2 * outputs)
    return other_way and not as_usual
