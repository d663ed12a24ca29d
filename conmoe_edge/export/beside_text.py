"""What a package has beside its text model, on its way into a plain checkpoint.

A plain checkpoint is opened with the class that its config.json names. Where that has parts for pictures or sound,
their numbers must be there: otherwise transformers draws them, with a warning at most. Memory: headers.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from conmoe_edge.checkpoint.package.opened_package import OpenedPackage
from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model.other_parts import other_parts_of
from conmoe_edge.model.probe import facts_of
from conmoe_edge.model.text_part import text_class


def tensors_beside(opened: OpenedPackage, config: PretrainedConfig) -> tuple[str, ...]:
    """Names of the tensors of parts for pictures and sound that go into a checkpoint of ``config``: none where
    transformers has a class for the text alone, under whose names it is written.

    Raises:
        UnsupportedModel: it keeps none, and the model has such parts.
    """
    if text_class(config) is None:
        return ()
    found = other_parts_of(config, facts_of(opened.index.tensors)).tensors
    if not found:
        raise UnsupportedModel(
            f"{opened.folder} cannot be written as a plain checkpoint: it is the text part of a {config.model_type}.",
            "engines open that with its parts for pictures and sound, which are not in the package",
            "make the package again with conmoe-edge fit ... --keep-vision, and export that",
        )
    return found
