"""What ``bench`` knows before a token is run: the bandwidths of this machine, what a token of the
package has to move, and what the speed model expects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conmoe_edge.api.bench_report import BenchFacts
from conmoe_edge.checkpoint.format.forms import SCALE
from conmoe_edge.memory.bandwidth import Meter, threads
from conmoe_edge.plan.kv_precision import with_kv
from conmoe_edge.plan.prompt_speed import Arithmetic, PromptWork, expected_prompt, prompt_reads
from conmoe_edge.plan.speed import distinct_share, expected_seconds, planned_step

if TYPE_CHECKING:
    from conmoe_edge.checkpoint.format.manifest import Manifest
    from conmoe_edge.memory.budget import Budget
    from conmoe_edge.model.anatomy import ModelAnatomy
    from conmoe_edge.offload.generation.session import ChatSession


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second of this machine; ``None`` where it could not be measured."""

    memory: float | None
    disk: float | None


def measured_rates(folder: Path) -> Rates:
    """Measure now, before the model takes its memory: the RAM, and the disk of ``folder`` in reads
    of a record.
    """
    from conmoe_edge.checkpoint.package.manifest_io import load_manifest

    sizes = [layout.nbytes for layout in load_manifest(folder).layouts]
    meter = Meter(folder, fresh=True, block=max(sizes, default=4 << 20))
    return Rates(meter.memory(), meter.disk())


def gather(
    session: ChatSession, folder: Path, rates: Rates, settings: Mapping[str, Any]
) -> BenchFacts:
    """The facts of a loaded package; ``settings`` say what is run, ``prompt_tokens`` and ``tokens`` among them."""
    from conmoe_edge.integrations.memory_plan import loaded_anatomy, planned_by
    from conmoe_edge.offload.generation.benchmark import (
        byte_rate,
        byte_weights,
        dense_kinds,
        dense_read_bytes,
        dense_weights,
        matrix_rate,
    )

    runtime, model = session.runtime, session.model
    manifest, anatomy, stats = runtime.manifest, loaded_anatomy(model), runtime.stats()
    anatomy = with_kv(anatomy, runtime.kv_precision)
    assert runtime.budget is not None, "a package is loaded within a budget"
    budget = _with_rates(runtime.budget, rates)
    prompt, tokens = settings["prompt_tokens"], settings["tokens"]
    dense = dense_read_bytes(model)
    cache = anatomy.kv_bytes(prompt + tokens // 2)
    asked = _distinct(manifest, anatomy)
    weights = {layer.index: layer.experts for layer in anatomy.moe_layers if layer.experts}
    kept = 0.0
    if not manifest.prototypes:
        kept = sum(one.top_k * sum(part.nbytes for part in one.parts) for one in weights.values())
    records = record_shares(manifest)
    total = sum(asked.values())
    routed = {kind: total * nbytes for kind, nbytes in records.items()} or {"source": kept}
    replayed = replayed_hit_rate(manifest, stats.slots) if stats.resident_share < 1 else None
    pool = sum(manifest.layouts[one.layout].nbytes for one in manifest.prototypes)
    offloaded = max(0, pool - stats.slot_bytes)
    kinds = dense_kinds(model)
    step = planned_step(
        anatomy,
        budget,
        routed,
        hit_rate=stats.resident_share if replayed is None else replayed,
        offloaded_bytes=offloaded,
        dense=dense + cache,
        dense_kinds=kinds,
        requests=total,
    )
    seconds = expected_seconds(step, budget)
    inner, last = dense_weights(model)
    experts = sum(asked[index] * one.expert_numel for index, one in weights.items())
    bytes_rate = byte_rate(runtime.device)
    dense_in_bytes = byte_weights(model) if bytes_rate else 0
    experts_in_bytes = experts * byte_share(manifest) if bytes_rate else 0.0
    in_bytes = dense_in_bytes + experts_in_bytes
    floats_rate = matrix_rate(runtime.device)
    disk, host = prompt_reads(anatomy, offloaded, prompt, runtime.prefill_chunk, budget)
    work = PromptWork(
        tokens=prompt,
        layers=len(anatomy.layers),
        hidden=anatomy.hidden_size,
        dense_floats=2.0 * (prompt * (inner - dense_in_bytes) + last),
        dense_bytes=2.0 * prompt * dense_in_bytes,
        expert_floats=2.0 * prompt * (experts - experts_in_bytes),
        expert_bytes=2.0 * prompt * experts_in_bytes,
        from_disk=disk,
        from_host=host,
    )
    planned = planned_by(manifest)
    same = planned is not None and planned.budget.device_bytes == budget.device_bytes
    return BenchFacts(
        package={
            "path": str(folder),
            "method": manifest.method,
            "rate": manifest.rate,
            "precision": manifest.precision,
            "prototypes": stats.prototypes,
            "resident": stats.resident,
            "slots": stats.slots,
        },
        settings={"context": session.context, **settings},
        runtime={
            "kernel": stats.kernel,
            "policy": stats.policy,
            "reads": stats.read_mode,
            "kv_precision": runtime.kv_precision,
        },
        budget=budget,
        threads=threads(),
        dense_bytes=dense,
        cache_bytes=cache,
        kept_bytes=kept,
        record_bytes=records,
        prompt_flops=2.0 * (prompt * (inner + experts - in_bytes) + last),
        prompt_byte_operations=2.0 * prompt * in_bytes,
        byte_operations_per_second=bytes_rate,
        flops_per_second=floats_rate,
        layers=len(anatomy.layers),
        expected=None if seconds is None else 1.0 / seconds,
        planned=planned.chosen.tokens_per_second if planned is not None and same else None,
        expected_prompt=expected_prompt(work, budget, Arithmetic(floats_rate, bytes_rate)),
        dense_kinds=kinds,
    )


def byte_share(manifest: Manifest) -> float:
    """The share of the requested prototypes whose weights have scales: a prompt's products take those as bytes."""
    scaled = [
        any(part.name.endswith(SCALE) for part in layout.parts) for layout in manifest.layouts
    ]
    return sum(share for number, share in _layout_shares(manifest).items() if scaled[number])


def record_shares(manifest: Manifest) -> dict[str, float]:
    """Mean bytes of a requested record by kind, times the kind's share of the requests: together
    the mean record.

    The share is that of the routing weight in calibration, or of the prototypes where it is
    unknown; with one layout it does not matter.
    """
    shares: dict[str, float] = {}
    for number, share in _layout_shares(manifest).items():
        layout = manifest.layouts[number]
        shares[layout.precision] = shares.get(layout.precision, 0.0) + share * layout.nbytes
    return shares


def replayed_hit_rate(manifest: Manifest, slots: int) -> float | None:
    """What the replay of calibration routing predicts for ``slots`` cache slots; ``None`` where it
    was made for another number, or not at all.
    """
    if sum(one.slots for one in manifest.cache) != slots:
        return None
    shares = _layout_shares(manifest)
    found = 0.0
    for number, settings in enumerate(manifest.cache):
        if settings.predicted_hit is None:
            return None
        found += shares.get(number, 0.0) * settings.predicted_hit
    return found


def _layout_shares(manifest: Manifest) -> dict[int, float]:
    """Record layout -> its share of the requests."""
    total = sum(one.weight for one in manifest.prototypes)
    shares: dict[int, float] = {}
    for one in manifest.prototypes:
        share = one.weight / total if total > 0 else 1.0 / len(manifest.prototypes)
        shares[one.layout] = shares.get(one.layout, 0.0) + share
    return shares


def _distinct(manifest: Manifest, anatomy: ModelAnatomy) -> dict[int, float]:
    """Layer -> distinct prototypes that a token asks for, where routing is evenly spread."""
    found = {}
    for layer in anatomy.moe_layers:
        assert layer.experts is not None
        top_k, slots = layer.experts.top_k, manifest.slots.get(layer.index)
        found[layer.index] = float(top_k)
        if slots:
            counts = Counter(one.prototype for one in slots if one.prototype is not None)
            found[layer.index] *= distinct_share(counts.values(), len(slots), top_k)
    return found


def _with_rates(budget: Budget, rates: Rates) -> Budget:
    """The budget with what was measured here; a GPU's own figures come from its driver."""
    if budget.device == "cpu":
        return replace(
            budget,
            device_bandwidth=rates.memory,
            link_bandwidth=rates.disk,
            disk_bandwidth=rates.disk,
        )
    from conmoe_edge.memory.machine import measure_machine

    gpu = measure_machine().gpu
    return replace(
        budget,
        device_bandwidth=gpu.memory_bandwidth if gpu else budget.device_bandwidth,
        link_bandwidth=gpu.link_bandwidth if gpu else budget.link_bandwidth,
        disk_bandwidth=rates.disk or budget.disk_bandwidth,
    )
