"""A fit does as much work in its last layer as in its second: nothing is gone over again for the layers before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from free_fits import fit, prepare
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS = 10


class Work(TorchDispatchMode):
    """Counts operations, and the numbers that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.operations += 1
        for one in found if isinstance(found, tuple | list) else (found,):
            if isinstance(one, torch.Tensor) and one.device.type != "meta":
                self.numbers += one.numel()
        return found


@pytest.mark.parametrize("settings", [{"bits": 6.0}, {"method": "conmoe", "precision": "int8"}])
def test_the_last_layer_takes_no_more_than_the_second(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    source = prepare("qwen3_moe", tmp_path, num_hidden_layers=LAYERS)
    reached: dict[tuple[str, int], tuple[int, int]] = {}
    with Work() as work:

        def progress(step: Any) -> None:
            reached.setdefault((step.stage, step.step), (work.operations, work.numbers))

        fit(source, tmp_path / "out", progress=progress, calibration_tokens=512, **settings)

    def spent(layer: int) -> tuple[int, int]:
        here, there = reached["calibrate", layer], reached["calibrate", layer + 1]
        return there[0] - here[0], there[1] - here[1]

    early, late = spent(1), spent(LAYERS - 2)
    assert early[0] > 1000
    for one, other in zip(early, late, strict=True):
        assert abs(other - one) < 0.15 * one, (early, late)
