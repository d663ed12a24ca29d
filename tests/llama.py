"""llama.cpp for tests: the Python that has ``llama_cpp``, and what it says of a GGUF file."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.patience import PATIENCE

VARIABLE = "CONMOE_LLAMA_PYTHON"
_PROGRAM = Path(__file__).with_name("llama_program.py")


def llama_python() -> str | None:
    """This Python where it has ``llama_cpp``, else the one that ``CONMOE_LLAMA_PYTHON`` names."""
    if importlib.util.find_spec("llama_cpp"):
        return sys.executable
    return os.environ.get(VARIABLE)


needs_llama = pytest.mark.skipif(
    llama_python() is None,
    reason=f"llama-cpp-python is not here; set {VARIABLE} to a Python that has it",
)


def ask(path: Path, **job: Any) -> dict[str, Any]:
    """The answer of ``llama_program.py``; with ``logits`` where there was a prompt."""
    python = llama_python()
    assert python is not None
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(_PROGRAM)],
        input=json.dumps({"path": str(path), **job}),
        capture_output=True,
        text=True,
        env=environment,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    if job.get("prompt"):
        answer["logits"] = np.load(f"{path}.npy")
    return answer
