"""What several calls need of a model: its anatomy and its tokenizer, and how much text is usual."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from conmoe_edge.errors import CalibrationError
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


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in a folder.

    Raises:
        CalibrationError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise CalibrationError(
            f"{folder} has no tokenizer that can be used.",
            (reason[0] if reason else type(error).__name__)[:200],
            "put the model's tokenizer.json and tokenizer_config.json into the folder",
        ) from error
