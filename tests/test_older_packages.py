"""Packages that an older version has written open and give the tokens that they gave then, whatever memory there is.

``tests/data/packages/VERSION`` was made by ``python -m tools.reference_packages`` of that version.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.integrations.load import load_package

FOLDER = Path(__file__).parent / "data" / "packages"
WRITTEN = {
    f"{version.parent.name}/{name}": (version.parent / name, wanted)
    for version in sorted(FOLDER.glob("*/tokens.json"))
    for name, wanted in json.loads(version.read_text(encoding="utf-8")).items()
}


def slots_for(folder: Path, share: float) -> tuple[int, ...]:
    """Cache slots of every record layout for a share of the prototypes, one at least."""
    manifest = load_manifest(folder)
    counts = Counter(entry.layout for entry in manifest.prototypes)
    return tuple(max(1, int(counts[i] * share)) for i in range(len(manifest.layouts)))


def test_there_are_packages() -> None:
    assert len(WRITTEN) >= 5


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0], ids=["all", "half", "one"])
@pytest.mark.parametrize("name", WRITTEN)
def test_it_opens_and_gives_the_same_tokens(name: str, share: float, tmp_path: Path) -> None:
    written, wanted = WRITTEN[name]
    package = tmp_path / "package"
    shutil.copytree(written, package)
    model = load_package(package, device="cpu", slots=slots_for(package, share))
    prompt = torch.tensor([wanted["prompt"]])
    try:
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(wanted["tokens"]),
            min_new_tokens=len(wanted["tokens"]),
            do_sample=False,
            eos_token_id=None,
        )
        stats = model.conmoe.stats()
    finally:
        model.conmoe.close()
    assert found[0, prompt.shape[1] :].tolist() == wanted["tokens"]
    assert (stats.misses > 0) == (share < 1.0)
