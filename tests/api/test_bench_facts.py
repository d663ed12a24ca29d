"""What ``bench`` knows of a package before a token is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from families import tiny_model
from hand_packages import thirds, write_package

from conmoe_edge.api.bench_facts import record_shares, replayed_hit_rate
from conmoe_edge.checkpoint.format.manifest import CacheSettings
from conmoe_edge.checkpoint.package.manifest_io import load_manifest


def test_shares_of_layouts_follow_the_routing_weight(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    write_package(model, tmp_path / "package", thirds(model))
    manifest = load_manifest(tmp_path / "package")
    assert record_shares(manifest) == pytest.approx({"source": manifest.layouts[0].nbytes})
    wide = replace(manifest.layouts[0], precision="int8", nbytes=8192)
    narrow = replace(manifest.layouts[0], precision="int4", nbytes=4096)
    first = manifest.prototypes[0].id
    mixed = replace(
        manifest,
        layouts=(wide, narrow),
        prototypes=tuple(
            replace(
                one,
                layout=0 if one.id == first else 1,
                weight=3.0 if one.id == first else 1.0 / (len(manifest.prototypes) - 1),
            )
            for one in manifest.prototypes
        ),
        cache=(
            CacheSettings(slots=1, policy="lru", predicted_hit=1.0),
            CacheSettings(slots=4, policy="lru", predicted_hit=0.6),
        ),
    )
    assert record_shares(mixed) == pytest.approx({"int8": 0.75 * 8192, "int4": 0.25 * 4096})
    assert replayed_hit_rate(mixed, 5) == pytest.approx(0.9)
    assert replayed_hit_rate(mixed, 4) is None
    assert replayed_hit_rate(manifest, 5) is None
