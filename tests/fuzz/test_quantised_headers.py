"""Headers, settings and small values of quantised checkpoints, changed at random: read right, or refused by an error of
ours; never another exception, never a read beyond a tensor's end.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from fuzz.cases import random_of, seeds
from safetensors.torch import load_file

from conmoe_edge.checkpoint.format.dtypes import BITS, CODES, TORCH_NAMES, nbytes_of
from conmoe_edge.checkpoint.quantised.expanded import ExpandedTensors
from conmoe_edge.checkpoint.quantised.scheme import find_scheme
from conmoe_edge.checkpoint.quantised.stored import Stored
from conmoe_edge.errors import ConmoeError

DATA = Path(__file__).resolve().parents[1] / "data" / "quantised"
KINDS = sorted(path.name for path in DATA.iterdir() if (path / "expanded.safetensors").is_file())
PART = "layers.0.mlp.experts"
ODD: tuple[Any, ...] = (None, 0, -1, 3, True, "", "NVFP4", [], {}, [1, 1], {"format": "x"}, 1e308)


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Of each kind the experts of one layer, and what config.json declares."""
    found = {}
    for kind in KINDS:
        tensors = load_file(DATA / kind / "model.safetensors")
        config = json.loads((DATA / kind / "config.json").read_text())
        own = {name: one for name, one in tensors.items() if PART in name}
        found[kind] = (own, config["quantization_config"])
    return found


def changed_settings(settings: dict[str, Any], random: Random) -> dict[str, Any]:
    settings = copy.deepcopy(settings)
    if random.random() < 0.3:
        return {}
    places: list[tuple[Any, Any]] = []
    stack: list[Any] = [settings]
    while stack:
        one = stack.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        places += [(one, key) for key in keys]
        stack += [one[key] for key in keys if isinstance(one[key], dict | list)]
    for _ in range(random.choice((0, 1, 1, 2))):
        one, key = random.choice(places)
        one[key] = random.choice(ODD)
    return settings


def changed_tensor(tensor: torch.Tensor, random: Random) -> torch.Tensor:
    how = random.randrange(5)
    if how == 0:
        dtype = getattr(
            torch, random.choice([TORCH_NAMES[one] for one in BITS if one in TORCH_NAMES])
        )
        return torch.zeros(tensor.shape, dtype=torch.uint8).to(dtype)
    if how == 1:
        shape = [max(0, size + random.choice((-1, 0, 1, size))) for size in tensor.shape]
        return torch.zeros(shape, dtype=torch.uint8).to(tensor.dtype)
    if how == 2:
        return tensor[None].clone() if random.random() < 0.5 else tensor.reshape(-1).clone()
    data = tensor.reshape(-1).view(torch.uint8).clone()
    if how == 3:
        for _ in range(random.choice((1, 3, 20))):
            data[random.randrange(len(data))] = random.randrange(256)
    else:
        data.fill_(random.choice((0, 127, 255)))
    return data.view(tensor.dtype).view(tensor.shape)


def bytes_in(tensors: Mapping[str, torch.Tensor]) -> Any:
    return lambda name: tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("seed", seeds(60))
def test_read_or_refused(seed: int, checkpoints: Any) -> None:
    random = random_of(seed)
    for kind in KINDS:
        tensors, settings = dict(checkpoints[kind][0]), checkpoints[kind][1]
        for _ in range(random.choice((1, 1, 2, 5))):
            name = random.choice(list(tensors))
            how = random.randrange(4)
            if how == 0:
                del tensors[name]
            elif how == 1:
                tensors[random.choice(list(tensors)) + random.choice(("", "_scale", "2"))] = (
                    tensors.pop(name)
                )
            else:
                tensors[name] = changed_tensor(tensors[name], random)
        stored = {
            name: Stored(
                str(one.dtype)[6:], nbytes_of(str(one.dtype)[6:], one.shape), tuple(one.shape)
            )
            for name, one in tensors.items()
            if str(one.dtype)[6:] in CODES
        }
        peek = bytes_in(tensors) if random.random() < 0.9 else None
        try:
            scheme = find_scheme(stored, changed_settings(settings, random), "bfloat16", peek)
        except ConmoeError as error:
            assert error.why and error.fix, error
            continue
        expanded = ExpandedTensors(tensors, scheme)  # type: ignore[arg-type]
        for name in expanded:
            logical = scheme.tensors[name]
            if logical.form == "plain":
                continue
            try:
                found = expanded[name][...]
            except ConmoeError as error:
                assert error.why and error.fix, error
                continue
            assert tuple(found.shape) == logical.shape and found.dtype == torch.bfloat16
