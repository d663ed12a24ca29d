"""Published configurations: the collection, checkpoints of headers alone, and kinds that no other test has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conmoe_edge import api
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

from benchmarks.published_configs.build import knows  # noqa: E402
from benchmarks.published_configs.collection import FOLDER, collection  # noqa: E402
from benchmarks.published_configs.full_size import write_headers  # noqa: E402
from benchmarks.published_configs.shrink import shrunk  # noqa: E402
from benchmarks.published_configs.trial import run_commands  # noqa: E402

PUBLISHED = {one.name: one for one in collection()}
# Mamba, other recurrences and layers of a single part beside attention; dense experts that run beside routed ones.
KINDS = [
    "ai21labs/Jamba-v0.1",
    "ibm-granite/granite-4.0-h-tiny",
    "moonshotai/Kimi-Linear-48B-A3B-Instruct",
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "google/gemma-4-26B-A4B",
]


def test_every_configuration_says_where_it_is_from() -> None:
    assert len(PUBLISHED) >= 60
    for one in PUBLISHED.values():
        assert one.source and (FOLDER / f"{one.slug}.json").is_file()
    assert sum(knows(one.config) for one in PUBLISHED.values()) >= 60


def test_a_checkpoint_of_headers_has_the_published_names_and_takes_no_disk(tmp_path: Path) -> None:
    folder = tmp_path / "mixtral"
    written = write_headers(PUBLISHED["mistralai/Mixtral-8x7B-v0.1"].config, folder)
    index = CheckpointIndex.open(folder)
    # As the model's card counts them: 46.7 thousand million numbers in bf16.
    assert len(index.tensors) == written.tensors == 995
    assert index.total_bytes == written.nbytes == 2 * 46_702_792_704
    name = "model.layers.31.block_sparse_moe.experts.7.w1.weight"
    assert index.tensors[name].shape == (14336, 4096)
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 1 << 20
    assert api.plan(str(folder), budget="60GB", device="cpu").plan.chosen.rate < 0.5


@pytest.mark.parametrize("name", KINDS)
def test_a_small_model_of_the_kind_goes_through_every_command(name: str, tmp_path: Path) -> None:
    done = run_commands(shrunk(PUBLISHED[name].config), tmp_path)
    assert [stage for stage, outcome in done.items() if not outcome["ok"]] == []
    assert list(done) == ["small", "fit 0", "logits", "fit 50 %", "chat", "eval"]
