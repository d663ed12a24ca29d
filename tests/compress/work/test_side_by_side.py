"""Steps on several threads: in order, with their share of torch's threads, one error."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from conmoe_edge.compress.work.side_by_side import MOST, side_by_side
from tests.patience import PATIENCE


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_go_at_a_time_and_results_are_in_order() -> None:
    second = threading.Event()

    def step(item: int) -> tuple[int, int]:
        if item == 0:
            assert second.wait(PATIENCE)
        elif item == 1:
            second.set()
        return item, torch.get_num_threads()

    assert side_by_side(step, range(5)) == [(item, 2 // MOST) for item in range(5)]
    assert torch.get_num_threads() == 2


def test_one_inside_another_is_one_after_another() -> None:
    def name(_: int) -> str:
        return threading.current_thread().name

    for names in side_by_side(lambda _: [name(0), *side_by_side(name, range(3))], range(3)):
        assert len(set(names)) == 1
        assert names[0] != threading.current_thread().name


def test_one_thread_of_torch_is_the_callers() -> None:
    torch.set_num_threads(1)
    assert (
        side_by_side(lambda _: threading.current_thread(), range(3))
        == [threading.current_thread()] * 3
    )


def test_the_first_items_error_is_raised_and_no_further_item_taken() -> None:
    later, taken = threading.Event(), []

    def step(item: int) -> None:
        taken.append(item)
        if item == 0:
            assert later.wait(PATIENCE)
            raise ValueError("of the first")
        later.set()
        if item == 1:
            raise KeyError("of the second")

    with pytest.raises(ValueError, match="of the first"):
        side_by_side(step, range(10_000))
    assert len(taken) < 10_000
    assert torch.get_num_threads() == 2


def test_threads_keep_the_callers_modes() -> None:
    def modes(_: int) -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    with torch.inference_mode():
        assert set(side_by_side(modes, range(4))) == {(True, False)}
    with torch.no_grad():
        assert set(side_by_side(modes, range(4))) == {(False, False)}
    assert set(side_by_side(modes, range(4))) == {(False, True)}
