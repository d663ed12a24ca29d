"""A model's tokenizer: the one place that opens it, with one set of refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conmoe_edge.checkpoint.tensors.folder_check import check_folder
from conmoe_edge.errors import CalibrationError


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``, without the network and without code of the model's.

    Raises:
        CalibrationError: there is none that can be used.
        CheckpointError: the folder leads to files outside it.
    """
    from transformers import AutoTokenizer

    check_folder(folder)

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
