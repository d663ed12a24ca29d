"""``machine.json`` beside a package: what it brings, and that nothing is lost but speed where it is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import least_budget
from families import save_tiny, save_tokenizer

from conmoe_edge import api
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, verify_package
from conmoe_edge.errors import PackageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.simulate import prefetch_search
from conmoe_edge.offload.simulate.machine_file import MACHINE_FILE, with_machine_file
from conmoe_edge.report.package_summary import summarise, to_json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that reads ahead, because that is taken for worth it."""
    folder = tmp_path_factory.mktemp("machine")
    save_tiny("olmoe", folder / "source", num_hidden_layers=3)
    save_tokenizer(folder / "source")
    levers = {"rate": 0.25, "precision": "source", "min_resident": 0.1}
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog 0123 " * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetch_search, "LEAST_GAIN", -10.0)
        api.fit(
            str(folder / "source"),
            folder / "out",
            budget=least_budget(folder / "source", 9, **levers),
            device="cpu",
            **levers,
            calibration=folder / "text.txt",
            calibration_tokens=512,
        )
    return folder / "out"


@pytest.fixture
def package(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "package")


def edited(package: Path, **changes: Any) -> None:
    path = package / MACHINE_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tokens(package: Path) -> tuple[list[int], int]:
    """What the package says, and how much was read ahead for it."""
    model = load_package(package, device="cpu")
    try:
        prompt = torch.tensor([[5, 9, 2, 7]])
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
        runtime: Any = model.conmoe
        return found[0].tolist(), runtime.manifest.prefetch.depth
    finally:
        model.conmoe.close()


def test_it_is_not_part_of_the_package(package: Path) -> None:
    manifest = load_manifest(package)
    assert MACHINE_FILE not in manifest.files
    assert manifest.prefetch is not None and manifest.prefetch.depth == 0
    tuned = with_machine_file(package, manifest)
    assert tuned.prefetch is not None and tuned.prefetch.depth > 0
    assert tuned.files == manifest.files and tuned.prototypes == manifest.prototypes


def test_without_it_the_answers_are_the_same(package: Path) -> None:
    before, depth = tokens(package)
    assert depth > 0
    (package / MACHINE_FILE).unlink()
    verify_package(package, deep=True)
    assert tokens(package) == (before, 0)


def test_inspect_has_its_speeds(package: Path) -> None:
    with_it = to_json(summarise(package))["speed"]["expected_tokens_per_second"]
    assert with_it == json.loads((package / MACHINE_FILE).read_text())["tokens_per_second"][-1]
    (package / MACHINE_FILE).unlink()
    assert to_json(summarise(package))["speed"]["expected_tokens_per_second"] is None


def test_that_of_another_package_says_nothing(package: Path) -> None:
    edited(package, manifest="0" * 64)
    manifest = load_manifest(package)
    assert with_machine_file(package, manifest) == manifest


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": 2},
        {"tokens_per_second": [-1.0]},
        {"tokens_per_second": ["fast"]},
        {"budget": {}},
        {"cache": []},
        {"prefetch": {"depth": 1}},
        {"more": 1},
    ],
    ids=str,
)
def test_a_damaged_one_is_refused_by_name(package: Path, changes: dict[str, Any]) -> None:
    if changes == {"cache": []}:
        entry = json.loads((package / MACHINE_FILE).read_text())["cache"][0]
        changes = {"cache": [entry] * 9}
    edited(package, **changes)
    with pytest.raises(PackageError) as error:
        with_machine_file(package, load_manifest(package))
    assert MACHINE_FILE in error.value.what and "Delete" in error.value.fix


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"budget": NaN}', b"[" * 100000])
def test_what_is_no_json_is_refused(package: Path, data: bytes) -> None:
    (package / MACHINE_FILE).write_bytes(data)
    with pytest.raises(PackageError):
        with_machine_file(package, load_manifest(package))


def test_it_cannot_lead_out_of_the_package(package: Path, tmp_path: Path) -> None:
    (package / MACHINE_FILE).rename(tmp_path / MACHINE_FILE)
    (package / MACHINE_FILE).symlink_to(tmp_path / MACHINE_FILE)
    with pytest.raises(PackageError):
        with_machine_file(package, load_manifest(package))
