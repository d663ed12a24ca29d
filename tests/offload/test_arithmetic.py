"""The rule for the number format, and the scratch."""

from __future__ import annotations

import itertools

import torch

from conmoe_edge.offload.arithmetic import WIDE_FROM_ROWS, Machine, Scratch, compute_dtype

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PLAIN = Machine("cpu", native_bf16=False)


def test_many_rows_are_widened_without_bf16_instructions() -> None:
    assert compute_dtype(PLAIN, BF16, BF16, WIDE_FROM_ROWS) == FP32
    assert compute_dtype(PLAIN, BF16, BF16, WIDE_FROM_ROWS - 1) == BF16


def test_processors_with_bf16_and_gpus_compute_as_loaded() -> None:
    for machine, rows in itertools.product(
        (Machine("cpu", True), Machine("cuda", True)), (1, 1000)
    ):
        assert compute_dtype(machine, BF16, BF16, rows) == BF16
        assert compute_dtype(machine, FP16, FP16, rows) == FP16


def test_a_model_in_fp32_computes_in_fp32() -> None:
    for machine in (PLAIN, Machine("cpu", True), Machine("cuda", True)):
        assert compute_dtype(machine, FP32, BF16, 1) == FP32


def test_scratch_converts_exactly_and_is_used_again() -> None:
    scratch = Scratch(torch.device("cpu"))
    first = {"a": torch.randn(7, 5).bfloat16(), "b": torch.randn(3).bfloat16()}
    wide = scratch.convert(first, FP32)
    assert all(torch.equal(wide[name], first[name].float()) for name in first)
    assert all(part.data_ptr() % 64 == 0 for part in wide.values())
    where = wide["a"].data_ptr()
    with torch.inference_mode():
        again = scratch.convert({"a": first["a"] * 2}, FP32)
    assert again["a"].data_ptr() == where
    assert scratch.convert(first, BF16) is first


def test_scratch_can_be_written_after_inference_mode() -> None:
    scratch = Scratch(torch.device("cpu"))
    parts = {"a": torch.ones(4).bfloat16()}
    with torch.inference_mode():
        scratch.convert(parts, FP32)
    assert scratch.convert(parts, FP32)["a"].sum() == 4
