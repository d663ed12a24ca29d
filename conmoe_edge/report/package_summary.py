"""Everything that ``inspect`` shows of a package, from the package alone: terminal, JSON and page say the same.

Reads ``conmoe.json``, ``config.json`` and, where asked, the routing trace and all bytes (to hash them); no weights are
loaded. Peak memory: the manifest and the trace. Raises ``PackageError``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from conmoe_edge.checkpoint.format.manifest import UNCHANGED, Manifest
from conmoe_edge.checkpoint.format.slot_map import SlotMap, sharing_layers
from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.checkpoint.tensors.tensor_index import CONFIG_FILE, read_json_object
from conmoe_edge.errors import PackageError
from conmoe_edge.offload.simulate.load_settings import read_trace
from conmoe_edge.offload.simulate.machine_file import with_machine_file
from conmoe_edge.plan.needs import PROCESS_TERMS
from conmoe_edge.plan.plan import Plan
from conmoe_edge.plan.serialise import plan_from_json
from conmoe_edge.report.hits import Hits, hit_curves
from conmoe_edge.report.measured import Measured, read_measured
from conmoe_edge.report.reduction import LayerFact, Reduction, layer_facts, reduction
from conmoe_edge.report.slot_shares import (
    KINDS,
    PrototypeFact,
    SlotFact,
    Usage,
    prototype_facts,
    quantile,
    slot_facts,
    usage_of,
)

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes on disk by what they are. ``dense`` are all weights of a model that was left as it is."""

    dense: int
    prototypes: int
    other: int


@dataclass(frozen=True, slots=True)
class MemoryTerm:
    """One summand of the device memory: what the plan counted, and what is known to be so (``None``: nothing is).

    ``process``: whether it is what a process takes without a model.
    """

    name: str
    planned: int
    found: int | None
    note: str
    process: bool = False


@dataclass(frozen=True, slots=True)
class PackageSummary:
    """A package, looked at.

    Attributes:
        folder: where it is.
        manifest: checked.
        model_type: from ``config.json``; empty where it has none.
        top_k: router slots that a token chooses; ``None`` without a trace.
        plan: ``None`` where the manifest has none that this version reads.
        sizes: of the files.
        slots: layer -> router slots; empty for a model that was left as it is.
        prototypes: in the order of the manifest.
        scopes: runs of layers that share prototypes.
        usage: what the slots' shares are shares of; ``None`` where nothing is known.
        hits: hit rates by slots, where they were asked for and there is a trace.
        measured: what ``bench`` found, where it was given.
        verified: whether every file was hashed.
    """

    folder: Path
    manifest: Manifest
    model_type: str
    top_k: int | None
    plan: Plan | None
    sizes: Sizes
    slots: dict[int, tuple[SlotFact, ...]]
    prototypes: tuple[PrototypeFact, ...]
    scopes: tuple[tuple[int, ...], ...]
    usage: Usage | None
    hits: Hits | None = None
    measured: Measured | None = None
    verified: bool = False

    @property
    def name(self) -> str:
        """What the model is called."""
        return str(self.manifest.source.get("name") or "a model without a name")

    @property
    def unchanged(self) -> bool:
        """Whether the package is the model as it was."""
        return self.manifest.method == UNCHANGED

    @property
    def every_slot(self) -> tuple[SlotFact, ...]:
        """All router slots, layer by layer."""
        return tuple(slot for row in self.slots.values() for slot in row)

    @property
    def layers(self) -> dict[int, LayerFact]:
        """Layer -> what became of its experts."""
        return dict(layer_facts(self.manifest, self.prototypes))

    @property
    def reduction(self) -> Reduction:
        """What was taken from the experts, over all layers."""
        return reduction(self.manifest, self.prototypes)

    @property
    def distances(self) -> tuple[float, ...]:
        """Of all aliases to their prototypes, as far as they are known; ascending."""
        return tuple(
            sorted(
                slot.distance
                for slot in self.every_slot
                if slot.kind == "alias" and slot.distance is not None
            )
        )

    @property
    def layout_precisions(self) -> tuple[str, ...]:
        """The forms in which prototypes are stored."""
        return tuple(dict.fromkeys(layout.precision for layout in self.manifest.layouts))

    def counts(self) -> dict[str, int]:
        """Router slots by what became of them."""
        kinds = [slot.kind for slot in self.every_slot]
        return {kind: kinds.count(kind) for kind in KINDS}

    def busiest(self, count: int) -> tuple[PrototypeFact, ...]:
        """The prototypes that carry most."""
        return tuple(sorted(self.prototypes, key=lambda p: (-p.weight, p.id))[:count])

    def loneliest(self, count: int) -> tuple[PrototypeFact, ...]:
        """The prototypes that carry least, the least first."""
        return tuple(sorted(self.prototypes, key=lambda p: (p.weight, p.id))[:count])


def summarise(
    folder: Path,
    *,
    verify: bool = False,
    bench: Path | None = None,
    curves: bool = False,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> PackageSummary:
    """Look at the package in ``folder``.

    Args:
        verify: hash every file and compare with the manifest, and look at every number.
        bench: a report that ``bench --json`` wrote about it.
        curves: replay the trace for the hit curves (seconds); ``tell(done, of)`` says how far that is.

    Raises:
        PackageError: it is none, or a file is missing, too short, or (with ``verify``) changed
            or not all numbers.
        UsageError: ``bench`` is no report about this package.
    """
    manifest = with_machine_file(folder, open_package(folder, deep=verify).manifest)
    if verify:
        from conmoe_edge.checkpoint.package.verify_values import verify_values

        verify_values(folder, manifest)
    trace = read_trace(folder, manifest) if manifest.slots else None
    usage = usage_of(manifest, trace)
    config = read_json_object(folder / CONFIG_FILE)
    found = PackageSummary(
        folder=folder,
        manifest=manifest,
        model_type=str(config.get("model_type") or ""),
        top_k=None if trace is None else max((len(row) for row in trace.slots[0]), default=None),
        plan=_plan(manifest),
        sizes=_sizes(folder, manifest),
        slots=slot_facts(manifest, usage),
        prototypes=prototype_facts(manifest),
        scopes=sharing_layers(SlotMap.of_manifest(manifest)),
        usage=usage,
        measured=None if bench is None else read_measured(bench, manifest),
        verified=verify,
    )
    if curves and trace is not None:
        found = replace(found, hits=hit_curves(trace, manifest, tell))
    return found


def memory_terms(facts: PackageSummary) -> tuple[MemoryTerm, ...]:
    """The plan's terms and its slots; empty without a plan. ``found`` is what lies on the disk for it."""
    plan = facts.plan
    if plan is None:
        return ()
    known = {"Dense weights": facts.sizes.dense}
    terms = [
        MemoryTerm(t.name, t.nbytes, known.get(t.name), t.note, t.name in PROCESS_TERMS)
        for t in plan.terms
    ]
    used = plan.chosen.resident_bytes
    if facts.unchanged:
        # The weights lie in the same files, so only their sum is known.
        terms = [replace(term, found=None) for term in terms]
        return (*terms, MemoryTerm("Routed experts", used, None, "all of them, as they were"))
    all_there = plan.chosen.slots >= len(facts.prototypes)
    share = f"{plan.chosen.slots:,} cache slots for {len(facts.prototypes):,} prototypes"
    found = sum(one.nbytes for one in facts.prototypes) if all_there else None
    terms.append(
        MemoryTerm("Resident prototypes", used, found, "all of them" if all_there else share)
    )
    return tuple(terms)


def to_json(facts: PackageSummary) -> dict[str, Any]:
    """Plain JSON: sizes in bytes, shares between 0 and 1, experts as ``[layer, expert]``."""
    manifest, plan, sizes = facts.manifest, facts.plan, facts.sizes
    distances, layers, removed = facts.distances, facts.layers, facts.reduction
    return {
        "package": {
            "path": str(facts.folder),
            "name": facts.name,
            "revision": manifest.source.get("revision"),
            "model_type": facts.model_type,
            "top_k": facts.top_k,
            "method": manifest.method,
            "notes": list(manifest.notes),
            "rate": manifest.rate,
            "scope": manifest.scope,
            "precision": manifest.precision,
            "dense_precision": manifest.dense_precision,
            "kv_precision": manifest.kv_precision,
            "tool_version": manifest.tool_version,
            "format_version": manifest.format_version,
            "files": manifest.files,
            "verified": facts.verified,
        },
        "sizes": {
            "dense_bytes": sizes.dense,
            "prototype_bytes": sizes.prototypes,
            "other_bytes": sizes.other,
            "planned_bytes": None if plan is None else plan.disk_bytes,
        },
        "memory": None
        if plan is None
        else {
            "budget_bytes": plan.budget.device_bytes,
            "device": plan.budget.device,
            "planned_bytes": plan.device_bytes_used,
            "measured_bytes": None if facts.measured is None else facts.measured.memory.used_bytes,
            "terms": [asdict(term) for term in memory_terms(facts)],
        },
        "speed": {
            "expected_tokens_per_second": None if plan is None else plan.chosen.tokens_per_second,
            "measured_tokens_per_second": None
            if facts.measured is None
            else facts.measured.decode.tokens_per_second.median,
        },
        "receipt": manifest.receipt,
        "experts": {**asdict(removed), "removed": removed.removed} if removed.experts else None,
        "slots": {
            "planned_prototypes": None if plan is None else plan.chosen.prototypes,
            "prototypes": len(facts.prototypes),
            **{kind: count for kind, count in facts.counts().items() if kind != "prototype"},
            "own": facts.counts()["prototype"],
            "shares_from": None if facts.usage is None else facts.usage.source,
        },
        "scopes": [list(layers) for layers in facts.scopes],
        "layers": [
            {**asdict(layers[layer]), "slots": [_slot(slot) for slot in row]}
            for layer, row in facts.slots.items()
        ],
        "prototypes": [
            {**asdict(one), "id": list(one.id), "layers": list(one.layers)}
            for one in facts.prototypes
        ],
        "distances": {
            "count": len(distances),
            "least": distances[0],
            "median": quantile(distances, 0.5),
            "ninth_decile": quantile(distances, 0.9),
            "greatest": distances[-1],
        }
        if distances
        else None,
        "cache": [
            {**asdict(one), "slots": list(one.slots), "best": list(one.best)}
            for one in (() if facts.hits is None else facts.hits.layouts)
        ],
        "whole_cache": None if facts.hits is None else asdict(facts.hits.all_together),
    }


def _slot(slot: SlotFact) -> dict[str, Any]:
    prototype = None if slot.prototype is None else list(slot.prototype)
    return {**asdict(slot), "id": slot.id.expert, "prototype": prototype}


def _plan(manifest: Manifest) -> Plan | None:
    """The plan, where there is one that this version understands: a reader can do without."""
    try:
        return plan_from_json(manifest.plan)
    except PackageError:
        return None


def _sizes(folder: Path, manifest: Manifest) -> Sizes:
    sizes = {name: facts["size"] for name, facts in manifest.files.items()}
    if manifest.method == UNCHANGED:
        # The weights are links to the model's own files, which the manifest does not list.
        linked = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
        return Sizes(sum(linked.values()), 0, sum(sizes.values()))
    records = {entry.file for entry in manifest.prototypes}
    dense = {name for name in sizes.keys() - records if name.startswith("dense-")}
    return Sizes(
        sum(sizes[name] for name in dense),
        sum(sizes[name] for name in records),
        sum(sizes[name] for name in sizes.keys() - records - dense),
    )
