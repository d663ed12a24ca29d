"""Reading ahead: never another result, off where it does not pay, and the clock that decides."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.checkpoint.format.manifest import PREDICTOR_FILE, Manifest, PrefetchSettings
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.package.manifest_io import (
    from_json,
    load_manifest,
    save_manifest,
    to_json,
)
from conmoe_edge.checkpoint.tensors.tensor_writer import TensorSource, write_tensors
from conmoe_edge.errors import PackageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.residency.policies import default_settings
from conmoe_edge.offload.residency.prefetch import Prefetcher, prefetch_bytes
from conmoe_edge.offload.simulate.prefetch_search import choose_prefetch, recall, token_seconds
from conmoe_edge.offload.storage.transfer import DirectTransfer
from conmoe_edge.plan.pace import Pace
from conmoe_edge.plan.trace import Predictions, PrototypeTrace
from tests.families import tiny_model
from tests.hand_packages import identity, predict, write_package
from tests.patience import PATIENCE, wait_for

PROMPT = [5, 17, 33, 80, 12]
HIDDEN = 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plain = tiny_model("olmoe")
    return write_package(plain, tmp_path, identity(plain))


def decode(model: Any, tokens: int = 8) -> torch.Tensor:
    """Scores of a prompt and of greedy tokens after it, one at a time."""
    found, cache, ids = [], None, torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(tokens):
            out = model(ids, past_key_values=cache, use_cache=True)
            found.append(out.logits[0, -1])
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
    return torch.stack(found)


@pytest.mark.parametrize("slots", [1, 2, 5, 9, 20])
@pytest.mark.parametrize("policy", ["lru", "lfru", "layer-lru"])
def test_the_result_is_the_same(
    folder: Path, slots: int, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = decode(load_package(folder))
    predict(folder, 2, slots / 24)
    model = load_package(folder, slots=(slots,), cache_policy=policy)
    assert model.conmoe.residency.prefetcher is not None
    assert torch.equal(decode(model), whole), "whenever reads ahead come, or are taken back"
    _come_at_once(monkeypatch)
    assert torch.equal(decode(model), whole)
    stats = model.conmoe.stats()
    assert 0 <= stats.prefetch_used <= stats.prefetched
    assert (stats.prefetched > 0) == (slots > 1), "the last slot is not for guesses"
    if slots >= 9:
        assert stats.prefetch_used > 0
    model.conmoe.reset_stats()
    assert model.conmoe.stats().prefetched == 0
    model.conmoe.close()


def _come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads ahead are over before compute goes on. One that has not begun by then is taken back and counts for
    nothing, which is a matter of the machine."""
    load = DirectTransfer.load

    def loaded(
        transfer: DirectTransfer, number: int, place: Any, target: Any, *, ahead: bool = False
    ) -> None:
        load(transfer, number, place, target, ahead=ahead)
        if ahead:
            wait_for(lambda: transfer.ready(place))

    monkeypatch.setattr(DirectTransfer, "load", loaded)


def test_a_retreat_decides_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _come_at_once(monkeypatch)
    predict(folder, 1, 0.5)
    model = load_package(folder, slots=(12,))
    whole = decode(model)
    counted = model.conmoe.stats().prefetched
    assert model.conmoe.residency.prefetcher is not None and counted > 0
    assert model.conmoe.retreat() and model.conmoe.residency.prefetcher is None
    assert torch.equal(decode(model), whole)
    assert model.conmoe.stats().prefetched == counted, "counters go on"


def test_it_is_off_where_it_was_not_decided_for(folder: Path) -> None:
    for depth, share, slots in [(0, 0.5, 12), (2, 0.5, 9), (2, 1.0, 24)]:
        manifest = predict(folder, depth, share)
        assert load_package(folder, slots=(slots,)).conmoe.residency.prefetcher is None
        size = manifest.files[PREDICTOR_FILE]["size"]
        assert prefetch_bytes(manifest) == (2 * size if depth else 0)


def layer_numbers(manifest: Manifest) -> dict[int, tuple[int, ...]]:
    return {layer: one.prototypes for layer, one in SlotMap.of_manifest(manifest).items()}


def test_next_is_the_ranking_of_the_map(folder: Path) -> None:
    manifest = predict(folder, 2, 0.5)
    prefetcher = Prefetcher(folder, manifest, torch.device("cpu"))
    hidden = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(3))
    layers = list(layer_numbers(manifest).items())
    assert prefetcher.next(layers[-1][0], hidden) == []
    from safetensors.torch import load_file

    maps = load_file(folder / PREDICTOR_FILE)
    for (layer, _), (after, known) in pairwise(layers):
        weights = maps[f"predictor.{after}"].double()
        scores = (hidden[0].double() @ weights[:-1] + weights[-1]).tolist()
        best = sorted(known, key=lambda n, s=scores, k=known: -s[k.index(n)])
        assert prefetcher.next(layer, hidden) == best[:3]


def test_a_predictor_of_another_package_is_refused(folder: Path) -> None:
    manifest = predict(folder, 2, 0.5)
    source = TensorSource("predictor.1", "bfloat16", (3, 3), lambda: torch.zeros(3, 3).bfloat16())
    written = write_tensors(folder / PREDICTOR_FILE, [source])
    files = {**manifest.files, written.name: written.entry()}
    save_manifest(folder, replace(manifest, files=files))
    with pytest.raises(PackageError, match="predictor"):
        load_package(folder, slots=(12,))


def test_the_manifest_carries_it_or_not(folder: Path) -> None:
    plain = load_manifest(folder)
    assert plain.prefetch is None and b"prefetch" not in to_json(plain)
    manifest = predict(folder, 2, 0.5)
    settings = PrefetchSettings(1, 4, 0.25, None, {1: 0.5, 12: 1.0})
    manifest = replace(manifest, prefetch=settings)
    assert from_json(to_json(manifest)).prefetch == settings
    with pytest.raises(PackageError, match="predictor"):
        from_json(to_json(replace(manifest, files=plain.files)))


# -- the decision ----------------------------------------------------------------------------------


def history(manifest: Manifest, tokens: int = 60) -> PrototypeTrace:
    """Two different prototypes a layer and token, evenly drawn."""
    generator = torch.Generator().manual_seed(7)
    layers = tuple(layer_numbers(manifest))
    asked = tuple(
        tuple(
            tuple(sorted(known[i] for i in torch.randperm(8, generator=generator)[:2].tolist()))
            for _ in range(tokens)
        )
        for known in layer_numbers(manifest).values()
    )
    return PrototypeTrace(layers, (tokens,), asked)


def oracle(trace: PrototypeTrace) -> Predictions:
    """Always right."""
    tokens = tuple(range(trace.tokens))
    return Predictions(tokens, (((),) * trace.tokens, *trace.asked[1:]))


def liar(trace: PrototypeTrace, manifest: Manifest) -> Predictions:
    """Never right."""
    ranked = [
        tuple(tuple(n for n in known if n not in row) for row in rows)
        for rows, known in zip(trace.asked, layer_numbers(manifest).values(), strict=True)
    ]
    return Predictions(tuple(range(trace.tokens)), (((),) * trace.tokens, *ranked[1:]))


def at(before: float, compute: float, read: float, begin: float = 0.0) -> Pace:
    return Pace((before,) * 3, (compute,), (read,), begin)


def test_recall_counts_token_by_token(folder: Path) -> None:
    manifest = load_manifest(folder)
    trace = history(manifest)
    layers = trace.layers
    assert recall(trace, oracle(trace)) == dict.fromkeys(layers[1:], 1.0)
    assert recall(trace, liar(trace, manifest)) == dict.fromkeys(layers[1:], 0.0)


def test_two_tokens_by_hand(folder: Path) -> None:
    """One prototype a layer, two of the three slots free for it: the times can be added up."""
    manifest = load_manifest(folder)
    first, second, third = layer_numbers(manifest).values()
    trace = PrototypeTrace(
        tuple(layer_numbers(manifest)),
        (2,),
        (((first[7],), (first[6],)), ((second[7],), (second[6],)), ((third[7],), (third[6],))),
    )
    settings = default_settings(manifest, (3,), "lru")
    pace = at(before=3.0, compute=1.0, read=10.0)
    seen = oracle(trace)
    without = token_seconds(trace, seen, manifest, settings, pace, 0, 1)
    assert without == 3 * (3 + 10 + 1), "every request is a miss"
    # In the layers after the first the read has begun before the compute (1) and the dense part (3).
    ahead = token_seconds(trace, seen, manifest, settings, pace, 1, 1)
    assert ahead == (3 + 10 + 1) + 2 * (10 - 1 - 3 + 3 + 1)
    # A read that was begun ahead has kept the computing thread as long.
    slower = at(before=3.0, compute=1.0, read=10.0, begin=2.0)
    assert token_seconds(trace, seen, manifest, settings, slower, 0, 1) == without + 3 * 2
    assert token_seconds(trace, seen, manifest, settings, slower, 1, 1) == ahead + 3 * 2
    # A guess that is wrong is under way for 4 of its 10 when the demand read comes.
    wrong = Predictions(seen.tokens, (((), ()), ((second[5],),) * 2, ((third[5],),) * 2))
    waste = token_seconds(trace, wrong, manifest, settings, pace, 1, 1)
    assert waste == (3 + 10 + 1) + 2 * (3 + (10 - 4) + 10 + 1)


def test_it_is_taken_where_the_disk_has_time(folder: Path) -> None:
    manifest = load_manifest(folder)
    trace = history(manifest)
    settings = default_settings(manifest, (12,), "lru")
    idle = choose_prefetch(trace, oracle(trace), manifest, settings, at(2.0, 0.5, 2.0))
    assert idle is not None and idle.depth >= 1 and idle.gain is not None and idle.gain > 0.1
    assert idle.resident_share == 0.5 and idle.window == 2
    # The same with a predictor that is always wrong, with a disk that is never idle, with unknown rates.
    for predictions, pace in [
        (liar(trace, manifest), at(2.0, 0.5, 2.0)),
        (oracle(trace), at(0.001, 0.001, 1.0)),
        (oracle(trace), None),
    ]:
        off = choose_prefetch(trace, predictions, manifest, settings, pace)
        assert off is not None and off.depth == 0
        assert (off.gain is None) == (pace is None)


# -- reads that have not begun ---------------------------------------------------------------------


class SlowStore:
    """A store whose reads wait for a word."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()
        self.read: list[int] = []

    def read_into(self, number: int, target: torch.Tensor) -> None:
        self.begun.set()
        assert self.go.wait(PATIENCE)
        self.read.append(number)


def test_reads_ahead_go_one_at_a_time_and_can_be_taken_back() -> None:
    store: Any = SlowStore()
    transfer = DirectTransfer(store)
    target = torch.zeros(100, dtype=torch.uint8)
    for number in range(3):
        transfer.load(number, (0, number), target, ahead=True)
    assert store.begun.wait(PATIENCE)
    assert not transfer.cancel(0, (0, 0), target), "it has begun"
    assert transfer.cancel(1, (0, 1), target) and transfer.ready((0, 1))
    assert transfer.counts.disk_bytes == 200
    store.go.set()
    transfer.drain()
    assert store.read == [0, 2]
    transfer.close()
