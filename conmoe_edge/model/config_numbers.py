"""Numbers of a ``config.json`` that no model has: NaN, infinity, what no number format holds, layers without end.

transformers takes them as they are: lists are made of so many layers before anything else is looked at, and an epsilon
of NaN makes every output NaN. Pure. Raises ``CheckpointError`` that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conmoe_edge.errors import CheckpointError

MOST_LAYERS = 1 << 16
"""As many as a manifest can name."""
_LARGEST_FLOAT = float.fromhex("0x1.fep+127")
"""The largest number in bf16, the format with the smallest of those that reach as far as fp32."""
_LARGEST_INTEGER = 1 << 53
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")


def check_numbers(folder: str, config: Mapping[str, Any], within: str = "") -> None:
    """Refuse a config that holds such a number, at any depth."""
    for key, value in config.items():
        name = f"{within}{key}"
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                check_numbers(folder, one, f"{name}.")
            elif isinstance(one, bool) or not isinstance(one, int | float):
                continue
            elif isinstance(one, float) and not math.isfinite(one):
                raise _refused(folder, name, f"{one}, which is no number")
            elif abs(one) > (_LARGEST_INTEGER if isinstance(one, int) else _LARGEST_FLOAT):
                raise _refused(folder, name, f"{one:.3g}, which no number format holds")
            elif key in _LAYERS and one > MOST_LAYERS:
                raise _refused(folder, name, f"{one}; {MOST_LAYERS} are the most")


def _refused(folder: str, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}/config.json cannot be used.",
        f"{name} is {why}",
        "download the model again; if it is the same afterwards, the model itself is broken",
    )
