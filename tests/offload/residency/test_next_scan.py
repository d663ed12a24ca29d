"""Reads for the next layer's scan: before it begins, each record once, and nothing else changes by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.errors import PackageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.residency.next_scan import NextScan
from tests.families import tiny_model
from tests.hand_packages import identity, write_package
from tests.offload.residency.test_residency import Bench, Gate

IDS = torch.randint(3, 90, (1, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model("olmoe")
    return write_package(plain, tmp_path_factory.mktemp("package"), identity(plain))


def layers_of(folder: Path) -> list[list[int]]:
    """The prototypes of every layer."""
    found: dict[int, list[int]] = {}
    for number, entry in enumerate(load_manifest(folder).prototypes):
        found.setdefault(entry.id.layer, []).append(number)
    return [found[layer] for layer in sorted(found)]


def test_a_chunk_that_asks_for_most_of_a_layer_asks_for_the_next_one(folder: Path) -> None:
    scans, layers = NextScan(load_manifest(folder)), layers_of(folder)
    count = len(layers[0])
    assert list(scans.after(0, count)) == list(scans.after(0, -(-count * 3 // 4))) == layers[1]
    assert list(scans.after(0, count // 2)) == []
    assert list(scans.after(len(layers) - 1, count)) == []


@pytest.fixture
def bench(folder: Path) -> Any:
    one = Bench(folder, 6)
    yield one
    one.close()


def scan(bench: Bench, numbers: Sequence[int], after: Sequence[int]) -> None:
    """A scan whose experts are compared with the disk."""

    def compute(positions: Sequence[int], _: Sequence[Any]) -> None:
        assert all(bench.holds(numbers[position]) for position in positions)

    bench.residency.visit(numbers, compute, scan=True, ahead=after)


def test_reads_begin_before_the_next_scan_and_each_is_one(
    bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = layers_of(folder)
    missing = [n for one in layers for n in one if n not in bench.cache.resident]
    begun: list[int] = []
    load = bench.transfer.load

    def noted(number: int, *args: Any, **kwargs: Any) -> None:
        begun.append(number)
        load(number, *args, **kwargs)

    monkeypatch.setattr(bench.transfer, "load", noted)
    for here, after in zip(layers, [*layers[1:], []], strict=True):
        scan(bench, here, after)
        wanted = [n for n in missing if n in after][:1]
        assert set(wanted) <= set(begun), "the next layer's first is on its way"
    assert Counter(begun) == Counter(set(begun)) and set(missing) <= set(begun)
    assert bench.residency.misses == len(begun)
    assert bench.residency.bytes_read == (6 + len(begun)) * bench.pool.layout.nbytes
    assert bench.residency.prefetched == (0, 0)


def test_what_is_not_asked_for_is_taken_back(
    bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = layers_of(folder)[:2]
    gate = Gate(bench.store, monkeypatch)
    gate.open.set()
    scan(bench, first, ())
    before = bench.residency.bytes_read
    gate.open.clear()
    busy = [bench.transfer._reading._threads.submit(gate.open.wait, 30) for _ in range(3)]
    bench.residency._read_on(second)
    coming = sorted(bench.cache.arriving)
    assert coming and coming[0] in second
    bench.residency.collect([coming[0]])
    assert sorted(bench.cache.arriving) == coming[:1], "the rest had not begun"
    assert bench.residency.bytes_read == before + bench.pool.layout.nbytes
    gate.open.set()
    assert all(one.result() for one in busy)
    monkeypatch.undo()
    scan(bench, second, ())


def test_a_damaged_record_is_told_to_the_scan_that_asks(
    bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = layers_of(folder)[:2]
    read, bad = bench.store.read_into, second[0]

    def damaged(number: int, target: torch.Tensor) -> None:
        if number == bad:
            raise PackageError("The prototypes cannot be read.", "it ends", "fit again")
        read(number, target)

    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "read_into", damaged)
        scan(bench, first, second)
        with pytest.raises(PackageError, match="cannot be read"):
            scan(bench, second, ())
        assert not bench.cache.arriving
        bench.check_addresses()
    scan(bench, second, ())


@pytest.mark.parametrize("slots", [2, 5, 12])
def test_a_chunk_reads_a_record_once_and_scores_are_the_same(
    folder: Path, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        whole: Any = load_package(folder, device="cpu", context=128)
        wanted = whole(IDS).logits
        whole.conmoe.close()
        model: Any = load_package(folder, device="cpu", context=128, slots=(slots,))
        counted: Counter[int] = Counter()
        store, read = model.conmoe._store, model.conmoe._store.read_into

        def noted(number: int, target: torch.Tensor) -> None:
            counted[number] += 1
            read(number, target)

        monkeypatch.setattr(store, "read_into", noted)
        for _ in range(3):
            counted.clear()
            assert torch.equal(model(IDS).logits, wanted)
            assert max(counted.values()) == 1
        model.conmoe.close()
