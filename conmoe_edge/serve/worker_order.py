"""What a server of several packages tells the process of one of them, and what that says: lines of JSON. No torch.

To the worker: one order; then ``{"budget": BYTES}`` once there is room; then ``{"stop": true}``, or the pipe ends.
From it: ``needs``, ``ready`` or ``failed``, and ``warning`` at any time.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conmoe_edge.memory.budget import Budget
from conmoe_edge.serve.loading import Loading
from conmoe_edge.serve.settings import Limits, Settings


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """One package to serve.

    Attributes:
        settings: where and to whom; the key is the server's own.
        loading: how the package is opened; its budget is the whole one, of which the worker gets a part.
    """

    settings: Settings
    loading: Loading

    def line(self) -> str:
        """As it travels."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def of_line(cls, line: str) -> WorkerOrder:
        """What ``line`` made."""
        value: Any = json.loads(line)
        settings, loading = value["settings"], value["loading"]
        settings["limits"] = Limits(**settings["limits"])
        settings["folder"] = Path(settings["folder"])
        for name in ("allowed_hosts", "aliases", "allowed_origins"):
            settings[name] = tuple(settings[name])
        loading["folder"] = Path(loading["folder"])
        if loading["prompt_cache"] is not None:
            loading["prompt_cache"] = Path(loading["prompt_cache"])
        if loading["budget"] is not None:
            loading["budget"] = Budget(**loading["budget"])
        return cls(Settings(**settings), Loading(**loading))
