"""Cache settings and what they become: defaults, pins, what is read first."""

from __future__ import annotations

import pytest

from conmoe_edge.checkpoint.format.manifest import (
    CacheSettings,
    ExpertId,
    Manifest,
    PrototypeEntry,
    RecordLayout,
    SlotRecord,
)
from conmoe_edge.errors import UsageError
from conmoe_edge.offload.residency.eviction import LayerLru, Lfru, Lru
from conmoe_edge.offload.residency.policies import (
    LayoutTable,
    check_policy,
    default_settings,
    make_policy,
    pins_of,
    tables,
    warm_order,
)

IDS = [ExpertId(layer, expert) for layer in range(2) for expert in range(4)]


def two_layers(layouts: list[int]) -> Manifest:
    """Four prototypes each; the later ones are heavier."""
    return Manifest(
        source={},
        method="conmoe",
        rate=0.0,
        scope=1,
        precision="source",
        layouts=tuple(RecordLayout("source", (), 4096) for _ in range(max(layouts) + 1)),
        prototypes=tuple(
            PrototypeEntry(one, "f", 4096, layout, n / 100)
            for n, (one, layout) in enumerate(zip(IDS, layouts, strict=True))
        ),
        slots={
            layer: tuple(SlotRecord(one) for one in IDS if one.layer == layer) for layer in (0, 1)
        },
        files={},
    )


PLAIN = two_layers([0] * 8)
(TABLE,) = tables(PLAIN)


def test_defaults_without_a_trace() -> None:
    (one,) = default_settings(PLAIN, [4])
    assert (one.policy, one.pin_share, one.predicted_hit) == ("pins", 0.5, None)
    (one,) = default_settings(PLAIN, [5], "layer-lru")
    assert one.quotas == (3, 2)


def test_a_name_that_is_no_policy() -> None:
    check_policy(None)
    check_policy("lfru")
    with pytest.raises(UsageError, match="fifo"):
        default_settings(PLAIN, [4], "fifo")


def test_a_table_a_layout() -> None:
    first, second = tables(two_layers([0, 1] * 4))
    assert first.members == (0, 2, 4, 6) and second.members == (1, 3, 5, 7)
    assert first.group_of == second.group_of == (0,) * 4 + (1,) * 4
    assert first.group_sizes == [2, 2] and TABLE.group_sizes == [4, 4]


def test_pins_are_numbers_of_the_package() -> None:
    _, second = tables(two_layers([0, 1] * 4))
    assert set(pins_of(CacheSettings(2, "pins", 0.5), second)) == {7}
    assert pins_of(CacheSettings(2, "lru"), second) == ()
    assert set(pins_of(CacheSettings(4, "lru"), second)) == {1, 3, 5, 7}, "each has a slot"


def test_the_heaviest_are_read_first_within_the_quotas() -> None:
    assert warm_order(CacheSettings(3, "lru"), TABLE) == (7, 6, 5)
    assert warm_order(CacheSettings(3, "layer-lru", quotas=(2, 1)), TABLE) == (7, 3, 2)
    one = LayoutTable((0, 1), (0.5, 0.5), (0, 0))
    assert warm_order(CacheSettings(1, "lru"), one) == (0,), "ties go to the lowest number"


def test_every_policy_has_its_object() -> None:
    kinds = [
        type(make_policy(CacheSettings(4, name, quotas=(2, 2)), TABLE))
        for name in ("lru", "pins", "layer-lru", "lfru")
    ]
    assert kinds == [Lru, Lru, LayerLru, Lfru]
