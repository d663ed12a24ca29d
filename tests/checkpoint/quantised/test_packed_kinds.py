"""Whole numbers as their own libraries pack them: every tensor is the one that the library expands, bit for bit, and
what is made of them runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packed_kinds import DATA, KINDS, WEIGHT, digest, opened, reference_of, source_of
from quantised_fits import check_fits
from safetensors.torch import load_file

from conmoe_edge.checkpoint.quantised.bit_fields import unpack

RUN = ("ct-w4-group-asym", "gptq-w4-desc-asym", "awq-gemm")
"""The kinds of which the default tests make packages; the slow ones take all."""


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_tensor_is_the_one_that_the_library_expands(kind: str, tmp_path: Path) -> None:
    model = opened(source_of(kind, tmp_path / "source"))
    wanted = reference_of(kind)
    assert model.scheme.form == KINDS[kind] and len(wanted) == 32
    with model.tensors() as tensors:
        assert {name: digest(tensors[name][...]) for name in wanted} == wanted
        assert torch.equal(tensors[WEIGHT][4:9], tensors[WEIGHT][...][4:9])
        stored = load_file(DATA / kind / "model.safetensors")
        plain = set(tensors) - set(wanted)
        assert all(torch.equal(tensors[name][...], stored[name]) for name in plain)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_numbers_of_every_width(bits: int) -> None:
    """Against sums of bits in Python's own whole numbers."""
    drawn = torch.Generator().manual_seed(bits)
    for count in (1, 7, 32, 45):
        numbers = torch.randint(0, 1 << bits, (3, count), generator=drawn)
        words = []
        for row in numbers.tolist():
            stream = sum(number << (place * bits) for place, number in enumerate(row))
            data = stream.to_bytes(-(-count * bits // 32) * 4, "little")
            words.append(torch.frombuffer(bytearray(data), dtype=torch.int32))
        assert torch.equal(unpack(torch.stack(words), bits, count).long(), numbers)


def test_a_file_beside_config_json_declares_it(tmp_path: Path) -> None:
    source = source_of("gptq-w4", tmp_path / "source")
    path = source / "config.json"
    config = json.loads(path.read_text())
    settings = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    del settings["quant_method"]
    (source / "quantize_config.json").write_text(json.dumps(settings))
    with opened(source).tensors() as tensors:
        assert digest(tensors[WEIGHT][...]) == reference_of("gptq-w4")[WEIGHT]


@pytest.mark.parametrize(
    "kind", [pytest.param(one, marks=[] if one in RUN else pytest.mark.slow) for one in KINDS]
)
def test_fit_at_two_rates_and_chat(kind: str, tmp_path: Path) -> None:
    """At rate 0, in fp32, the package computes what transformers computes with the expanded weights."""
    source = source_of(kind, tmp_path / "source")
    with opened(source).tensors() as tensors:  # their digests are those of the library
        plain = {name: tensors[name][...] for name in tensors}
    # Records in 4 bits have the scales of the file; where these are finer than the model's format, so are the weights
    # of a package that runs in fp32.
    mixed = kind == "auto-round-gptq"
    check_fits(source, plain, tmp_path, torch.bfloat16 if mixed else torch.float32)
