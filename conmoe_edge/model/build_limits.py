"""A limit on what a model's constructor may build, held while it builds.

A model on the meta device takes no memory for its numbers, but each of its modules takes time and memory of its own. A
model that was built from the right config has about as many parameters as its checkpoint has tensors (fewer, where
experts are fused).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from conmoe_edge.errors import CheckpointError
from conmoe_edge.model.config_json import WRONG

_SLACK = 4
_LEAST = 4096
_MODULES = 8
"""Modules for each parameter: activations, dropouts and the modules that hold them have none of their own."""


@contextmanager
def build_limit(tensors: int | None) -> Iterator[None]:
    """Within it, this thread builds no more than a model of ``tensors`` tensors needs; ``None`` sets no limit.

    Raises:
        CheckpointError: it tried to.
    """
    if tensors is None:
        yield
        return
    most, me = max(_SLACK * tensors, _LEAST), threading.get_ident()
    parameters = modules = 0

    def count_parameter(module: nn.Module, name: str, value: Any) -> None:
        nonlocal parameters
        if threading.get_ident() == me and value is not None:
            parameters += 1
            check(parameters, most)

    def count_module(module: nn.Module, name: str, value: Any) -> None:
        nonlocal modules
        if threading.get_ident() == me:
            modules += 1
            check(modules, _MODULES * most)

    def check(count: int, limit: int) -> None:
        if count > limit:
            raise CheckpointError(
                "config.json describes a larger model than its weights are.",
                f"there are {tensors} tensors, and the model would have more than {most} parameters or far more parts",
                WRONG,
            )

    hooks = [
        register_module_parameter_registration_hook(count_parameter),
        register_module_module_registration_hook(count_module),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
