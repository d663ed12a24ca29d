"""The tensors of a model that no text needs: those of its parts for pictures, video and sound.

Names alone decide, by the renames of transformers' class for the whole model. Memory: Python objects for each name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from conmoe_edge.model import bridge
from conmoe_edge.model.probe import TensorFacts, expanded_bytes
from conmoe_edge.model.text_part import lies_in, other_parts, takes_text_alone
from conmoe_edge.units import human_size

_OF_EXPERTS = re.compile(r"\.experts\.\d+\.")
"""Routed experts with a tensor each: by far the most names, and never beside the text model."""


@dataclass(frozen=True, slots=True)
class OtherParts:
    """Attributes:
    modules: paths in transformers' class, sorted (``model.visual``).
    tensors: names in the checkpoint, sorted.
    nbytes: of these tensors, as a package stores them.
    """

    modules: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    nbytes: int = 0

    def __str__(self) -> str:
        """``351 tensors of model.visual, 1.00 GiB``."""
        return (
            f"{len(self.tensors):,} tensors of {', '.join(self.modules)}, {human_size(self.nbytes)}"
        )

    def note(self, *, kept: bool) -> str:
        """What a package's reader has to know of them; empty where there are none."""
        if not self.tensors:
            return ""
        if kept:
            return (
                f"The model's parts for pictures and sound are in the package as they were ({self}): transformers "
                "opens them with AutoModelForImageTextToText. chat, serve and eval answer text."
            )
        return (
            f"The package answers text: the model's parts for pictures and sound were left out ({self}). "
            "fit --keep-vision takes them along."
        )

    def to_json(self, *, kept: bool) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "modules": list(self.modules),
            "tensors": len(self.tensors),
            "bytes": self.nbytes,
            "kept": kept,
        }


NOTHING = OtherParts()


def other_parts_of(config: PretrainedConfig, facts: Mapping[str, TensorFacts]) -> OtherParts:
    """The other parts of a model with these tensors.

    Raises:
        UnsupportedModel: transformers cannot build what ``config`` describes.
    """
    if takes_text_alone(config):
        return NOTHING
    whole = bridge.build_whole(config, len(facts))
    modules = other_parts(whole)
    names = [name for name in facts if not _OF_EXPERTS.search(name)]
    targets = bridge.targets_of(whole, names)
    tensors = sorted(name for name, target in targets.items() if lies_in(modules, target))
    used = sorted(path for path in modules if any(lies_in({path}, targets[n]) for n in tensors))
    return OtherParts(
        tuple(used), tuple(tensors), sum(expanded_bytes(facts[name]) for name in tensors)
    )
