"""What several calls need of a model: its anatomy, and how much text is usual."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conmoe_edge.model.anatomy import ModelAnatomy

if TYPE_CHECKING:
    from transformers import PretrainedConfig


SEQUENCE_LENGTH = 512
CALIBRATION_TOKENS = 64 * SEQUENCE_LENGTH
HELD_OUT_SHARE = 4


def anatomy_of(config: PretrainedConfig, headers: dict[str, tuple[str, int]]) -> ModelAnatomy:
    """From a config and the dtype and bytes of every tensor."""
    from conmoe_edge.model.probe import TensorFacts, probe

    return probe(config, {name: TensorFacts(*facts) for name, facts in headers.items()})
