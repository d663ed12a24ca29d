"""Steps that several answers share: every answer has the scores, to the bit, that it has alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import Kind
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.fastpath.single_step import SingleStep
from conmoe_edge.offload.fastpath.together import Together
from conmoe_edge.offload.generation.answer import Generation
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.generation.shared_steps import is_next_single, may_share, shared_scores
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.families import VOCAB, tiny_model
from tests.hand_packages import identity, predict, thirds, write_package, write_unchanged

CHUNK, CONTEXT = 16, 120
pytestmark = pytest.mark.skipif(operator() is None, reason="no compiler here")


def package(folder: Path, name: str, kind: Kind = "plain", **changes: Any) -> Path:
    torch.manual_seed(0)
    plain = tiny_model(name, dtype=torch.bfloat16, **changes)
    return write_package(plain, folder, identity(plain), prefill_chunk=CHUNK, kind=kind)


class Told(Generation):
    """A generation that remembers the scores it was given."""

    scores: list[Tensor]

    def draw(self, logits: Tensor) -> int | None:
        if not hasattr(self, "scores"):
            self.scores = []
        self.scores.append(logits.clone())
        return super().draw(logits)


def asked(model: Any, prompt: list[int], tokens: int) -> Told:
    settings = SamplingSettings(temperature=0, max_tokens=tokens)
    cached = CachedTokens(model, CHUNK)
    return Told(model, cached, prompt, settings, context=CONTEXT, ends=frozenset())


def prompts(count: int, seed: int) -> list[tuple[list[int], int]]:
    draw = Random(seed)
    return [
        ([draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 40))], draw.randint(2, 40))
        for _ in range(count)
    ]


def alone(model: Any, prompt: list[int], tokens: int) -> Told:
    one = asked(model, prompt, tokens)
    while one.finish is None:
        one.advance()
    return one


def in_company(model: Any, wanted: list[tuple[list[int], int]], most: int, seed: int) -> list[Told]:
    """Answers that come at any time, at most ``most`` at once, and share every step that can be shared."""
    together = may_share(model.conmoe)
    assert together is not None
    draw, shared = Random(seed), 0
    answers = [asked(model, *one) for one in wanted]
    waiting, running = list(answers), list[Told]()
    while waiting or running:
        while waiting and len(running) < most and draw.random() < 0.6:
            running.append(waiting.pop(0))
        singles = [one for one in running if is_next_single(one)]
        for one in running:
            if one not in singles:
                one.advance()
        draw.shuffle(singles)
        scores = shared_scores(together, singles) if len(singles) > 1 else None
        shared += scores is not None
        for number, one in enumerate(singles):
            one.advance() if scores is None else one.draw(scores[number])
        running = [one for one in running if one.finish is None]
    assert shared > 10
    return answers


def same(model: Any, wanted: list[tuple[list[int], int]], found: list[Told]) -> int:
    """Whether each is as it is alone; how many tokens there were."""
    for (prompt, tokens), one in zip(wanted, found, strict=True):
        by_itself = alone(model, prompt, tokens)
        assert one.tokens == by_itself.tokens
        assert len(one.scores) == len(by_itself.scores)
        assert all(map(torch.equal, one.scores, by_itself.scores))
    return sum(one.made for one in found)


@pytest.fixture
def loaded() -> Iterator[Any]:
    models = []

    def load(folder: Path, **settings: Any) -> Any:
        model: Any = load_package(folder, device="cpu", context=CONTEXT, **settings)
        models.append(model)
        return model

    yield load
    for model in models:
        model.conmoe.close()


FAMILIES = (
    *("deepseek", "deepseek_v3", "dots1", "glm4_moe", "gpt_oss", "granitemoe", "hunyuan_v1_moe"),
    *("minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path, loaded: Any) -> None:
    folder = package(tmp_path / "package", name, "int8" if name == "gpt_oss" else "plain")
    model, few = loaded(folder), loaded(folder, slots=(4,))
    assert model.conmoe.fast_path.apart == ""
    wanted = prompts(5, seed=1)
    alone(model, *wanted[0])
    same(model, wanted, in_company(few, wanted, 4, seed=2))
    same(model, wanted, in_company(model, wanted, 3, seed=3))
    live = model.conmoe.fast_path.live()
    assert live["together"] > 0 and live["transformers"] <= len(model.conmoe.fast_path.layers)


@pytest.mark.parametrize("name", ["deepseek_v3", "olmoe", "qwen2_moe"])
def test_a_model_that_was_left_unchanged(name: str, tmp_path: Path, loaded: Any) -> None:
    torch.manual_seed(0)
    model = loaded(write_unchanged(tiny_model(name, dtype=torch.bfloat16), tmp_path))
    assert model.conmoe.fast_path.apart == ""
    wanted = prompts(5, seed=1)
    alone(model, *wanted[0])
    same(model, wanted, in_company(model, wanted, 3, seed=3))


@pytest.mark.parametrize("kind", ["plain", "int8", "q4"])
@pytest.mark.parametrize("slots", [None, 1, 5, 17])
def test_many_answers_at_every_budget(
    kind: Kind, slots: int | None, tmp_path: Path, loaded: Any
) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
    folder = package(tmp_path / "package", "qwen3_moe", kind, **sizes)
    everything = loaded(folder)
    model = everything if slots is None else loaded(folder, slots=(slots,))
    wanted = prompts(24, seed=slots or 0)
    assert same(everything, wanted, in_company(model, wanted, 16, seed=4)) > 200


def test_keys_and_values_in_8_bits(tmp_path: Path, loaded: Any) -> None:
    folder = package(tmp_path / "package", "qwen3_moe")
    model = loaded(folder, kv_precision="int8", slots=(6,))
    wanted = prompts(6, seed=5)
    same(model, wanted, in_company(model, wanted, 6, seed=6))


def test_prototypes_that_slots_share_and_that_are_read_ahead(tmp_path: Path, loaded: Any) -> None:
    torch.manual_seed(0)
    plain = tiny_model("olmoe", dtype=torch.bfloat16)
    folder = write_package(plain, tmp_path / "package", thirds(plain), prefill_chunk=CHUNK)
    predict(folder, depth=2, share=0.75)
    model, wanted = loaded(folder, slots=(7,)), prompts(6, seed=7)
    assert model.conmoe.residency.prefetcher is not None
    same(loaded(folder), wanted, in_company(model, wanted, 6, seed=8))


def test_what_several_miss_is_read_once(tmp_path: Path, loaded: Any) -> None:
    """Two answers with the same tokens ask for the same prototypes in every layer."""
    folder = package(tmp_path / "package", "olmoe")
    model = loaded(folder, slots=(3,), cache_policy="lru")
    together = may_share(model.conmoe)
    assert together is not None
    prompt = [5, 17, 33, 80]
    alone(model, prompt, 4)
    first = alone(model, prompt, 12)

    def decoded(count: int) -> int:
        answers = [asked(model, prompt, 12) for _ in range(count)]
        for one in answers:
            one.advance()
        model.conmoe.reset_stats()
        while answers[0].finish is None:
            scores = shared_scores(together, answers) if count > 1 else None
            for number, one in enumerate(answers):
                one.advance() if scores is None else one.draw(scores[number])
        assert all(one.tokens == first.tokens for one in answers)
        return model.conmoe.stats().bytes_read

    by_itself = decoded(1)
    assert by_itself > 0
    assert decoded(4) == by_itself


@pytest.mark.parametrize("slots", [8, 16])
def test_a_step_reads_what_its_answers_miss_together_once(
    slots: int, tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers with tokens of their own: of what a layer's tokens ask for, each that is not there is one read."""
    model = loaded(package(tmp_path / "package", "olmoe"), slots=(slots,), cache_policy="lru")
    together = may_share(model.conmoe)
    assert together is not None
    alone(model, [3, 4, 5], 4)
    answers = [asked(model, prompt, 30) for prompt, _ in prompts(4, seed=11)]
    for one in answers:
        while not is_next_single(one):
            one.advance()
    runtime, read = model.conmoe, list[int]()
    residency, store = runtime.residency, runtime._store
    own, visit = store.read_into, residency.visit

    def reading(number: int, target: Tensor) -> None:
        read.append(number)
        own(number, target)

    counts = [0, 0]  # visits, and what they missed

    def visiting(numbers: Any, compute: Any, **settings: Any) -> None:
        missing = [number for number in numbers if not residency.table.present([number])]
        read.clear()
        visit(numbers, compute, **settings)
        assert sorted(read) == sorted(missing)
        counts[0] += 1
        counts[1] += len(missing)

    monkeypatch.setattr(store, "read_into", reading)
    monkeypatch.setattr(residency, "visit", visiting)
    for _ in range(12):
        scores = shared_scores(together, answers)
        assert scores is not None
        for one, row in zip(answers, scores, strict=True):
            one.draw(row)
    assert counts[0] > 10 and counts[1] > counts[0]


def test_no_memory_or_a_damaged_record_leaves_every_answer_as_it_was(
    tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conmoe_edge.errors import PackageError

    folder = package(tmp_path / "package", "olmoe")
    model = loaded(folder)
    together = may_share(model.conmoe)
    assert together is not None
    wanted = prompts(3, seed=9)
    alone(model, *wanted[0])
    answers = [asked(model, prompt, 20) for prompt, _ in wanted]
    for one in answers:
        while not is_next_single(one):
            one.advance()
    kind = type(operator())
    own, left = kind.decoder_together, [0]
    errors = [MemoryError(), PackageError("a", "b", "c"), RuntimeError("can't allocate memory")]

    def failing(*arguments: Any) -> Any:
        left[0] += 1
        if left[0] % 3 == 0 and errors:
            raise errors.pop()
        return own(*arguments)

    monkeypatch.setattr(kind, "decoder_together", failing)
    failed = 0
    while answers[0].finish is None:
        scores = shared_scores(together, answers)
        failed += scores is None
        for number, one in enumerate(answers):
            one.advance() if scores is None else one.draw(scores[number])
    assert failed == 3
    same(model, [(prompt, 20) for prompt, _ in wanted], answers)


def two_past_their_prompts(model: Any, count: int) -> tuple[Together, list[Told]]:
    together = may_share(model.conmoe)
    assert together is not None
    alone(model, [3, 4, 5], 4)
    answers = [asked(model, [3, 4, number], count) for number in (5, 6)]
    for one in answers:
        one.advance()
    return together, answers


def test_hooks_and_other_heads(tmp_path: Path, loaded: Any) -> None:
    """A hook on a layer sees what it would see alone, so its answers go by themselves."""
    model = loaded(package(tmp_path / "package", "olmoe"))
    together, answers = two_past_their_prompts(model, 8)
    hook = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert shared_scores(together, answers) is None
    hook.remove()
    assert shared_scores(together, answers) is not None


@pytest.mark.parametrize(("name", "calls"), [("olmoe", 1), ("granitemoe", 2)])
def test_a_model_is_called_again_only_for_what_it_does_to_scores(
    name: str, calls: int, tmp_path: Path, loaded: Any
) -> None:
    """granitemoe divides them. A hook on the model is called for every token of every answer."""
    model = loaded(package(tmp_path / "package", name))
    together, answers = two_past_their_prompts(model, 30)

    def step() -> tuple[int, int]:
        counts = [0, 0]
        own = model.forward

        def counted(*arguments: Any, **named: Any) -> Any:
            counts[0] += 1
            return own(*arguments, **named)

        model.forward = counted
        scores = shared_scores(together, answers)
        model.forward = own
        assert scores is not None
        for one, row in zip(answers, scores, strict=True):
            one.draw(row)
        return counts[0], len(answers)

    assert step() == (4, 2)
    assert step() == (2 * calls, 2)
    seen: list[Any] = []
    hook = model.register_forward_hook(lambda _, __, out: seen.append(out.logits.shape))
    assert step() == (4, 2) and len(seen) == 2
    hook.remove()
    assert step()[0] == 4 and step()[0] == 2 * calls


def test_scores_that_are_no_numbers_are_said_to_the_answer(tmp_path: Path, loaded: Any) -> None:
    from conmoe_edge.errors import NotFinite

    model = loaded(package(tmp_path / "package", "olmoe"))
    together, answers = two_past_their_prompts(model, 30)
    for _ in range(2):
        scores = shared_scores(together, answers)
        assert scores is not None
        for one, row in zip(answers, scores, strict=True):
            one.draw(row)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = float("nan")
    assert shared_scores(together, answers) is None
    with pytest.raises(NotFinite, match=r"lm_head|NaN"):
        answers[0].advance()


def test_families_that_go_by_themselves_say_why(tmp_path: Path, loaded: Any) -> None:
    model = loaded(package(tmp_path / "package", "qwen3_next"))
    assert may_share(model.conmoe) is None
    report = model.conmoe.fast_path.to_json()
    assert report["apart"].startswith("layer 0 is not one call")


def test_what_was_looked_at_for_one_token_is_known_for_the_next(
    tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that are exchanged at loading are made for training; a module in training is looked at anew each time."""
    model = loaded(package(tmp_path / "package", "olmoe"))
    assert not [name for name, one in model.named_modules() if one.training]
    found: list[bool] = []
    own = SingleStep.prepare
    monkeypatch.setattr(
        SingleStep, "prepare", lambda *given: found.append(own(*given)) or found[-1]
    )
    alone(model, [3, 4, 5], 8)
    assert found == [False, False, True, True, True, True, True]
