"""``GET /stats``: what the page shows beside the conversation, as one JSON value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conmoe_edge.serve.engine import Engine
    from conmoe_edge.serve.intake import Intake
    from conmoe_edge.serve.prometheus import Metrics, State
    from conmoe_edge.serve.settings import Settings

SCHEMA_VERSION = 1


def stats_without_model(
    name: str, state: State, metrics: Metrics, queued: int, settings: Settings
) -> dict[str, Any]:
    """Of a package that is not loaded; what it would take and compute with is ``null``."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": name,
        "state": state,
        "queued": queued,
        "running": 0,
        "parallel": settings.limits.parallel,
        "tokens_per_second": 0.0,
        "totals": metrics.totals(),
        "memory": None,
        "prompts": None,
        "compute": None,
        "cache": None,
    }


def page_stats(
    engine: Engine, metrics: Metrics, settings: Settings, intake: Intake
) -> dict[str, Any]:
    """Sizes in bytes. As ``stats_without_model`` before the model is there."""
    now = engine.snapshot
    value = stats_without_model(settings.name, now.state, metrics, now.queued, settings)
    value["running"] = now.running
    value["tokens_per_second"] = round(now.tokens_per_second, 2)
    if now.runtime is None or engine.loaded is None:
        return value
    stats = now.runtime
    value["context"] = engine.context
    value["memory"] = {
        "device": stats.device,
        "used": stats.memory_used,
        "budget": stats.memory_budget,
        "slots": stats.slot_bytes,
        "conversations": now.cache_bytes,
        "conversations_planned": now.cache_total_bytes,
        "requests": intake.used,
        "requests_planned": engine.sizes.account,
    }
    kept = now.kept
    value["prompts"] = {
        "kept": kept.prompts,
        "chunks": kept.chunks,
        "bytes": kept.nbytes,
        "hits": kept.hits,
        "misses": kept.misses,
        "file_hits": kept.file_hits,
        "file_bytes_read": kept.file_bytes_read,
        "file_bytes_written": kept.file_bytes_written,
    }
    value["compute"] = {
        "kernel": stats.kernel,
        "fast_path": None if now.fast_path is None else now.fast_path.to_json(),
    }
    value["cache"] = {
        "prototypes": stats.prototypes,
        "resident": stats.resident,
        "hits": stats.hits,
        "misses": stats.misses,
        "disk_bytes": stats.disk_bytes,
        "host_bytes": stats.host_bytes,
        "policy": stats.policy,
    }
    return value
