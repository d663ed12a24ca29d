"""How a package is opened for a server: plain data, which goes from one process to another. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conmoe_edge.memory.budget import Budget


@dataclass(frozen=True, slots=True)
class Loading:
    """Attributes:
    folder: of the package.
    budget, device, context, cache_policy, misses, kv_precision: as of ``load_package``.
    template: the chat template of that name, where one is given.
    prompt_cache, prompt_cache_bytes: where prompts are kept over restarts, and how much of them.
    """

    folder: Path
    budget: Budget | None = None
    device: str | None = None
    context: int | None = None
    cache_policy: str | None = None
    misses: str = "copy"
    template: str | None = None
    kv_precision: str | None = None
    prompt_cache: Path | None = None
    prompt_cache_bytes: int | None = None
