"""Fits of tiny models whose prototypes have different numbers of neurons, or of bits: what their tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, save_tokenizer

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.errors import ResumeMismatch


def prepare(family: str, folder: Path, **sizes: Any) -> Path:
    """A checkpoint with a tokenizer, and a calibration text beside it."""
    source = folder / "source"
    save_tiny(family, source, **sizes)
    save_tokenizer(source)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 60)
    return source


def fit(source: Path, out: Path, **settings: Any) -> Manifest:
    """What ``prepare`` made, fitted on its text."""
    text = source.parent / "text.txt"
    given = {"budget": "4GB", "device": "cpu", "calibration_tokens": 1024, **settings}
    api.fit(str(source), out, calibration=text, **given)
    return load_manifest(out)


def nbytes_of(manifest: Manifest) -> int:
    """Bytes of all prototypes."""
    return sum(manifest.layouts[entry.layout].nbytes for entry in manifest.prototypes)


def check_same_bytes(package: Path, other: Path) -> None:
    names = sorted(path.name for path in package.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (package / name).read_bytes() == (other / name).read_bytes(), name


def check_goes_on(source: Path, out: Path, changed: str, other: Any, **settings: Any) -> Manifest:
    """A fit that is stopped in the second layer refuses another setting by its name, and goes on with its own."""

    def stop(step: Any) -> None:
        if step.stage == "calibrate" and step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(source, out, progress=stop, **settings)
    with pytest.raises(ResumeMismatch) as caught:
        fit(source, out, **{**settings, changed: other})
    assert changed in caught.value.why
    return fit(source, out, **settings)
