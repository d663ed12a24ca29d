"""Packages of the demo model, made by the real ``fit`` from a little text, and one written by hand."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from hand_packages import slots_of, write_package

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, save_manifest


def fit_demo(folder: Path, **levers: Any) -> Path:
    api.fit("demo", folder, device="cpu", calibration_tokens=2048, offline=True, **levers)
    return folder


@pytest.fixture(scope="session")
def scoped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of layers share prototypes."""
    out = tmp_path_factory.mktemp("scoped") / "out"
    return fit_demo(out, budget="2GiB", rate=0.5, scope=2, precision="int8")


@pytest.fixture(scope="session")
def auto(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scales, constants and prototypes of fewer neurons."""
    out = tmp_path_factory.mktemp("auto") / "out"
    return fit_demo(out, budget="2GiB", rate=0.5, method="auto")


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kinds of records, all of them resident."""
    out = tmp_path_factory.mktemp("mixed") / "out"
    return fit_demo(out, budget="565MB", precision="int8+int4", rate=0.25)


@pytest.fixture(scope="session")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer cache slots than prototypes."""
    out = tmp_path_factory.mktemp("tight") / "out"
    return fit_demo(out, budget="560MB", precision="int4", rate=0.25)


@pytest.fixture(scope="session")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as it is."""
    return fit_demo(tmp_path_factory.mktemp("unchanged") / "out", budget="2GiB")


@pytest.fixture(scope="session")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of slot; no plan, no receipt, no overview, no trace; 40 slots a layer."""

    def choose(layer: int, expert: int) -> SlotRecord:
        if expert == 1:
            return SlotRecord(None)
        if expert == 2:
            return SlotRecord(None, constant=0)
        if expert in (3, 4):
            return SlotRecord(ExpertId(layer, 0), 0.5)
        return SlotRecord(ExpertId(layer, expert))

    model = tiny_model("olmoe", num_experts=40, num_local_experts=40, n_routed_experts=40)
    constants = {layer: torch.ones(1, 32) for layer in range(3)}
    folder = tmp_path_factory.mktemp("hand") / "package"
    return write_package(model, folder, slots_of(model, choose), constants=constants)


def renamed(package: Path, folder: Path, name: str) -> Path:
    """A copy of a model that is called ``name``."""
    shutil.copytree(package, folder)
    manifest = load_manifest(package)
    save_manifest(folder, replace(manifest, source={**manifest.source, "name": name}))
    return folder


def without_overview(package: Path, folder: Path) -> Path:
    """A copy, as earlier versions wrote packages."""
    shutil.copytree(package, folder)
    save_manifest(folder, replace(load_manifest(package), overview={}))
    return folder
