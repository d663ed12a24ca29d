"""Changed headers and settings of packed whole numbers: each checkpoint is refused with an error of ours, or every
tensor of it has the shape that was promised, and finite numbers.

``CONMOE_FUZZ_CASES=5000 pytest tests/fuzz/test_packed_headers.py`` runs many.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from fuzz.cases import random_of, seeds
from packed_kinds import DATA, KINDS, WEIGHT
from safetensors.torch import load_file

from conmoe_edge.checkpoint.quantised.forms import FORMS
from conmoe_edge.checkpoint.quantised.scheme import find_scheme
from conmoe_edge.checkpoint.quantised.stored import Logical, Stored
from conmoe_edge.errors import ConmoeError

BASE = WEIGHT.removesuffix("weight")
NUMBERS = (-1, 0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 65, 1 << 20, 1 << 40)
VALUES = (*NUMBERS, None, True, False, "", "4", "group", "gemv", "gptq_v2", 4.0, [], {}, [4], "ü")
DTYPES = ("int32", "int64", "int8", "uint8", "float16", "bfloat16", "float32", "float8_e4m3fn")


def whole(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of one expert's matrix, and the settings."""
    tensors = load_file(DATA / kind / "model.safetensors")
    declared = json.loads((DATA / kind / "config.json").read_text()).get("quantization_config")
    for name in ("quantize_config.json", "quant_config.json"):
        if (DATA / kind / name).is_file():
            own = json.loads((DATA / kind / name).read_text())
            declared = {"quant_method": name, **own}
    return {name: one for name, one in tensors.items() if name.startswith(BASE)}, declared


def header(one: torch.Tensor) -> Stored:
    return Stored(str(one.dtype).removeprefix("torch."), one.nbytes, tuple(one.shape))


def change_header(stored: dict[str, Stored], random: Random) -> str:
    name = random.choice(sorted(stored))
    what = random.choice(("drop", "rename", "dtype", "size", "axis"))
    one = stored.pop(name)
    if what == "rename":
        stored[random.choice((name + "_x", name.replace("weight", "w"), BASE + "weight"))] = one
    elif what == "dtype":
        stored[name] = one._replace(dtype=random.choice(DTYPES))
    elif what == "size" and one.shape:
        sizes = list(one.shape)
        sizes[random.randrange(len(sizes))] = random.choice(NUMBERS[1:-2])
        stored[name] = one._replace(shape=tuple(sizes))
    elif what == "axis":
        sizes = one.shape[1:] if random.random() < 0.5 else (*one.shape, 1)
        stored[name] = one._replace(shape=sizes)
    return f"{what} {name}"


def change_settings(settings: Any, random: Random) -> str:
    """Somewhere in it."""
    places: list[tuple[Any, Any]] = []

    def collect(one: Any) -> None:
        for key in one if isinstance(one, dict) else range(len(one)):
            places.append((one, key))
            if isinstance(one[key], dict | list):
                collect(one[key])

    collect(settings)
    inside, key = random.choice(places)
    if isinstance(inside, dict) and random.random() < 0.3:
        del inside[key]
        return f"drop {key}"
    inside[key] = random.choice(VALUES)
    return f"{key} = {inside[key]!r}"


def some(one: Stored, given: torch.Tensor | None, random: Random) -> torch.Tensor:
    """Values for a header: those of the file, or random bytes."""
    dtype = getattr(torch, one.dtype)
    if given is not None and header(given)[::2] == one[::2] and random.random() < 0.7:
        return given
    drawn = torch.Generator().manual_seed(random.randrange(1 << 30))
    count = dtype.itemsize
    for size in one.shape:
        count *= size
    return (
        torch.randint(0, 256, (count,), generator=drawn, dtype=torch.uint8)
        .view(dtype)
        .view(one.shape)
    )


def read(
    logical: Logical,
    stored: Mapping[str, Stored],
    given: Mapping[str, torch.Tensor],
    random: Random,
) -> torch.Tensor:
    parts = {
        part: some(stored[name], given.get(name), random) for part, name in logical.parts.items()
    }
    return FORMS[logical.form].expand(logical, parts)


def test_changed_headers_and_settings() -> None:
    files = {kind: whole(kind) for kind in KINDS}
    read_at_all = refused = 0
    for seed in seeds(400):
        random = random_of(seed)
        kind = random.choice(sorted(files))
        given, settings = files[kind]
        stored, declared = (
            {name: header(one) for name, one in given.items()},
            json.loads(json.dumps(settings)),
        )
        done = [
            change_header(stored, random)
            if random.random() < 0.5
            else change_settings(declared, random)
            for _ in range(random.choice((0, 1, 1, 2)))
            if stored and declared
        ]
        try:
            scheme = find_scheme(
                stored, declared, random.choice(("bfloat16", "float16", "float32"))
            )
            for logical in scheme.tensors.values():
                if logical.form not in KINDS.values():
                    continue
                found = read(logical, stored, given, random)
                assert tuple(found.shape) == logical.shape, (seed, kind, done)
                assert found.dtype == getattr(torch, logical.dtype), (seed, kind, done)
                assert bool(found.isfinite().all()), (seed, kind, done)
                read_at_all += 1
        except ConmoeError as error:
            assert error.what and error.fix, (seed, kind, done)
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {kind}: {done}") from error
    assert read_at_all and refused
