"""Memory that runs out costs cache slots, then a clear stop, and never a word.

Every operation of torch may be the one that finds no memory: a dispatch mode lets the n-th fail as torch's allocator
does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conmoe_edge.errors import OutOfMemory
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.session import ChatSession
from tests.families import VOCAB, tiny_model
from tests.hand_packages import identity, write_package

CHUNK, COUNT = 8, 5
PROMPT = torch.randint(3, VOCAB, (19,), generator=torch.Generator().manual_seed(1)).tolist()
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."


class Failing(TorchDispatchMode):
    """Lets operation number n fail where ``fails(n)``, counted from 0."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__()
        self.fails, self.count = fails, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.fails(self.count - 1):
            raise RuntimeError(NO_MEMORY)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model("olmoe", dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("package")
    return write_package(plain, folder, identity(plain), prefill_chunk=CHUNK)


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[int]:
    return _greedy(ChatSession(_loaded(folder), None))


def _loaded(folder: Path) -> Any:
    return load_package(folder, device="cpu", slots=(8,), context=64)


def _greedy(session: ChatSession) -> list[int]:
    generation = session.greedy(PROMPT, COUNT)
    while generation.finish is None:
        generation.advance()
    return generation.tokens[len(PROMPT) :]


def _operations(folder: Path) -> int:
    session = ChatSession(_loaded(folder), None)
    with Failing(lambda n: False) as mode:
        _greedy(session)
    return mode.count


def _one_fails(folder: Path, nth: int, wanted: list[int]) -> bool:
    """Whether the answer was reached before operation ``nth``; it and the next one are as ever."""
    model = _loaded(folder)
    session = ChatSession(model, None)
    with Failing(lambda n: n == nth) as mode:
        assert _greedy(session) == wanted, nth
        reached = mode.count > nth
        assert model.conmoe.stats().slots == (4 if reached else 8), nth
    assert _greedy(session) == wanted, nth
    model.conmoe.close()
    return not reached


def _all_fail_from(folder: Path, nth: int, wanted: list[int]) -> None:
    """Nothing can be had from operation ``nth`` on, then memory is there again."""
    model = _loaded(folder)
    session = ChatSession(model, None)
    with Failing(lambda n: n >= nth), pytest.raises(OutOfMemory) as caught:
        _greedy(session)
    assert "--context 32" in caught.value.fix
    assert model.conmoe.stats().slots == 0
    assert _greedy(session) == wanted, nth
    assert model.conmoe.stats().slots == 1
    model.conmoe.close()


@pytest.mark.parametrize("part", range(6))
def test_any_operation_may_find_no_memory(folder: Path, wanted: list[int], part: int) -> None:
    count = _operations(folder)
    assert count > 600
    _one_fails(folder, part * count // 6 + part, wanted)
    _all_fail_from(folder, part * count // 6 + part, wanted)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_operation_may_find_no_memory(folder: Path, wanted: list[int]) -> None:
    nth = 0
    while not _one_fails(folder, nth, wanted):
        _all_fail_from(folder, nth, wanted)
        nth += 1
    assert nth > 600
