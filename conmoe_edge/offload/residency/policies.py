"""From the cache settings of a package to the objects of the runtime: pins, policy, and what is read at the start.

``simulate/policy_search.py`` looks for the best settings with these very objects. Numbers only: no torch, no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from conmoe_edge.checkpoint.format.manifest import CacheSettings, Manifest
from conmoe_edge.errors import UsageError
from conmoe_edge.offload.residency.eviction import LayerLru, Lfru, Lru, Policy
from conmoe_edge.offload.residency.quota import allot, groups_of
from conmoe_edge.offload.residency.slot_cache import pin_order

POLICIES = ("lru", "layer-lru", "lfru", "pins")
DEFAULT_PIN_SHARE = 0.5
_HALF_LIFE = 8  # uses a slot


@dataclass(frozen=True, slots=True)
class LayoutTable:
    """The prototypes of one record layout, by their numbers in the package.

    Attributes:
        members: prototype numbers, ascending.
        weights: share of the routing weight of every prototype of the package.
        group_of: group of layers of every prototype of the package (``quota.groups_of``).
    """

    members: tuple[int, ...]
    weights: tuple[float, ...]
    group_of: tuple[int, ...]

    @property
    def group_sizes(self) -> list[int]:
        """Members of every group."""
        sizes = [0] * (max(self.group_of, default=-1) + 1)
        for number in self.members:
            sizes[self.group_of[number]] += 1
        return sizes


def tables(manifest: Manifest) -> tuple[LayoutTable, ...]:
    """One table a record layout."""
    weights = tuple(entry.weight for entry in manifest.prototypes)
    groups = groups_of(manifest)
    layouts = [entry.layout for entry in manifest.prototypes]
    return tuple(
        LayoutTable(tuple(n for n, of in enumerate(layouts) if of == layout), weights, groups)
        for layout in range(len(manifest.layouts))
    )


def pins_of(settings: CacheSettings, table: LayoutTable) -> tuple[int, ...]:
    """The prototypes that the settings pin; all of them where every one has a slot."""
    order = pin_order([table.weights[n] for n in table.members], settings.slots, settings.pin_share)
    return tuple(table.members[i] for i in order)


def make_policy(settings: CacheSettings, table: LayoutTable) -> Policy:
    """The policy for what is not pinned."""
    if settings.policy == "layer-lru":
        return LayerLru(table.group_of, settings.quotas)
    if settings.policy == "lfru":
        return Lfru(_HALF_LIFE * settings.slots)
    return Lru()


def warm_order(settings: CacheSettings, table: LayoutTable) -> tuple[int, ...]:
    """What the slots hold at the start, most valuable first: the heaviest within the quotas, then the heaviest."""
    by_weight = sorted(table.members, key=lambda n: (-table.weights[n], n))
    if not settings.quotas:
        return tuple(by_weight[: settings.slots])
    left = list(settings.quotas)
    within, beyond = [], []
    for number in by_weight:
        group = table.group_of[number]
        (within if left[group] > 0 else beyond).append(number)
        left[group] -= 1
    return tuple([*within, *beyond][: settings.slots])


def default_settings(
    manifest: Manifest, slots: Sequence[int], only: str | None = None
) -> tuple[CacheSettings, ...]:
    """What holds without a trace: pins and least recently used, or the policy ``only``.

    Raises:
        UsageError: no policy has the name ``only``.
    """
    check_policy(only)
    settings = []
    for table, count in zip(tables(manifest), slots, strict=True):
        one = CacheSettings(count, only or "pins")
        if one.policy == "pins":
            one = replace(one, pin_share=DEFAULT_PIN_SHARE)
        elif one.policy == "layer-lru":
            # Without a history every prototype of a group is worth the same.
            one = replace(one, quotas=allot([[1] * size for size in table.group_sizes], count))
        settings.append(one)
    return tuple(settings)


def check_policy(name: str | None) -> None:
    """Raises ``UsageError`` for a name that is no policy."""
    if name is not None and name not in POLICIES:
        raise UsageError(
            f"{name!r} is no cache policy.",
            f"there are: {', '.join(POLICIES)}",
            "--cache-policy lru, or leave it out to use what the replay found best",
        )
