"""One package, the same scores to the bit: in every budget, after every turn, with any side file, on one thread or two.

``tests/fuzz/test_same_tokens.py`` draws packages and conversations; here are the cases that went wrong once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from conmoe_edge.checkpoint.format.manifest import ROUTING_FILE
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, save_manifest
from conmoe_edge.checkpoint.tensors.tensor_writer import TensorSource, write_tensors
from conmoe_edge.errors import DoesNotFit
from conmoe_edge.integrations.load import load_package
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.probe import probe
from conmoe_edge.offload.generation.session import ChatSession
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.serialise import plan_to_json
from conmoe_edge.units import parse_size
from tests.families import VOCAB, tiny_model
from tests.hand_packages import identity, predict, write_package
from tests.scores import Turn, alone, turn

CHUNK, CONTEXT = 16, 120
COUNTS = (3, 20, 1, 8)
"""Tokens of the answers of a conversation."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model("olmoe", dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("package")
    return write_package(plain, folder, identity(plain), prefill_chunk=CHUNK)


@pytest.fixture(scope="module")
def turns(folder: Path) -> list[Turn]:
    """A conversation of four turns, each answered as a conversation of its own, with everything resident."""
    model = load_package(folder, device="cpu", context=CONTEXT)
    random, said, found = Random(4), list[int](), list[Turn]()
    for more, count in zip((7, 15, 17, 5), COUNTS, strict=True):
        prompt = said + [random.randrange(3, VOCAB) for _ in range(more)]
        found.append(alone(model, prompt, count))
        said = prompt + found[-1][1]
    model.conmoe.close()
    return found


def _same(model: Any, turns: list[Turn]) -> None:
    """One chat of all turns."""
    session = ChatSession(model, None)
    for number, (prompt, tokens, scores) in enumerate(turns):
        found = turn(session, prompt, len(tokens))
        assert found[1] == tokens, number
        assert torch.equal(found[2], scores), number


def _budget(nbytes: int) -> Budget:
    return Budget("cpu", nbytes, f"{nbytes}B", "test", host_bytes=0)


def test_every_budget_from_the_least_on(folder: Path, turns: list[Turn]) -> None:
    with pytest.raises(DoesNotFit) as caught:
        load_package(folder, budget=_budget(1 << 20), context=CONTEXT)
    words = caught.value.fix.replace(",", " ").split()
    least = parse_size(next(word for word in words if word.endswith(("MB", "GB"))))
    assert least is not None
    record = load_manifest(folder).layouts[0].nbytes
    low = least - 10**6  # what can be typed is rounded up; the least is a record more than this
    while least - low > record:
        middle = (least + low) // 2
        try:
            load_package(folder, budget=_budget(middle), context=CONTEXT).conmoe.close()
            least = middle
        except DoesNotFit:
            low = middle
    seen = []
    for nbytes in (least, least + 5 * record, least + 11 * record, 2 * least):
        model = load_package(folder, budget=_budget(nbytes), context=CONTEXT)
        assert model.conmoe.prefill_chunk == CHUNK
        seen.append(model.conmoe.stats().slots)
        _same(model, turns)
        model.conmoe.close()
    assert seen == sorted(seen) and seen[0] < seen[1] < seen[-1] == 24


def test_turns_begin_with_whole_chunks(folder: Path, turns: list[Turn]) -> None:
    model = load_package(folder, device="cpu", slots=(3,), context=CONTEXT)
    session = ChatSession(model, None)
    reused = []
    for prompt, tokens, _ in turns:
        generation = session.greedy(prompt, len(tokens))
        reused.append(generation.reused)
        while generation.finish is None:
            generation.advance()
    # Prompts of 7, 25, 62 and 68 tokens: an answer's tokens are computed again.
    assert [len(prompt) for prompt, _, _ in turns] == [7, 25, 62, 68]
    assert reused == [0, 0, 16, 48]


@pytest.mark.parametrize(
    "family", ["deepseek_v2", "afmoe"]
)  # the operator is close there, not the same
def test_the_first_conversation_after_a_load_is_like_the_second(
    family: str, tmp_path: Path
) -> None:
    plain = tiny_model(family, dtype=torch.bfloat16)
    write_package(plain, tmp_path, identity(plain))
    model = load_package(tmp_path, device="cpu", context=CONTEXT)
    prompts = torch.randint(3, VOCAB, (4, 20), generator=torch.Generator().manual_seed(2)).tolist()
    for prompt in prompts:
        again = load_package(tmp_path, device="cpu", context=CONTEXT)
        assert torch.equal(alone(again, prompt, 4)[2], alone(model, prompt, 4)[2])


def test_side_files_change_nothing(tmp_path: Path, turns: list[Turn]) -> None:
    plain = tiny_model("olmoe", dtype=torch.bfloat16)
    write_package(plain, tmp_path, identity(plain), prefill_chunk=CHUNK)
    for depth, share in ((2, 0.9), (4, 0.5)):
        predict(tmp_path, depth=depth, share=share)
        model = load_package(tmp_path, device="cpu", slots=(6,), context=CONTEXT)
        _same(model, turns)
        model.conmoe.close()
    manifest = load_manifest(tmp_path)
    for seed in range(2):
        drawn = torch.Generator().manual_seed(seed)
        rows = {
            f"routing.{layer}": torch.randint(8, (60, 3), generator=drawn, dtype=torch.uint8)
            for layer in manifest.slots
        }
        rows["sequences"] = torch.tensor([20, 40], dtype=torch.int32)
        written = write_tensors(
            tmp_path / ROUTING_FILE,
            [
                TensorSource(
                    name, str(t.dtype).removeprefix("torch."), tuple(t.shape), lambda t=t: t
                )
                for name, t in rows.items()
            ],
        )
        save_manifest(
            tmp_path,
            replace(manifest, files={**manifest.files, written.name: written.entry()}),
        )
        model = load_package(tmp_path, device="cpu", slots=(6,), context=CONTEXT)
        _same(model, turns)
        model.conmoe.close()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_two_threads(folder: Path, turns: list[Turn]) -> None:
    assert torch.get_num_threads() == 2
    model = load_package(folder, device="cpu", slots=(5,), context=CONTEXT)
    _same(model, turns)


def test_a_package_runs_in_the_least_budget_that_it_can_be_planned_for(tmp_path: Path) -> None:
    plain = tiny_model("olmoe", dtype=torch.bfloat16)
    plain.config.dtype = torch.bfloat16
    anatomy = probe(copy.deepcopy(plain.config))
    with pytest.raises(DoesNotFit) as caught:
        make_plan(anatomy, _budget(1 << 20), PlanRequest(context=CONTEXT))
    least = parse_size(caught.value.fix.split()[1])
    assert least is not None
    planned = make_plan(
        anatomy, _budget(least), PlanRequest(context=CONTEXT, precision="source", rate=0.0)
    )
    write_package(
        plain,
        tmp_path,
        identity(plain),
        plan=plan_to_json(planned),
        prefill_chunk=planned.prefill_chunk,
    )
    model = load_package(tmp_path, device="cpu", budget=_budget(least))
    assert model.conmoe.prefill_chunk == planned.prefill_chunk == 32
    assert model.conmoe.stats().slots >= 1
