"""A model's tokenizer: the one place that opens it, with one set of refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conmoe_edge.errors import CalibrationError
from conmoe_edge.model.tokenizer_files import has_tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``, without the network and without code of the model's.

    Raises:
        CalibrationError: there is none that can be used.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir() or not has_tokenizer(folder):
        raise CalibrationError(
            f"{folder} has no tokenizer that can be used.",
            "it has no file with a vocabulary",
            "put the model's tokenizer.json and tokenizer_config.json into the folder",
        )
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
