"""A check before any work: whether routers that may choose fewer experts still find as many as they take.

Costs one forward on the meta device. Raises ``UsageError`` with the greatest rate that works,
``UnsupportedModel`` where a router cannot be rerouted at all.
"""

from __future__ import annotations

import math

import torch
from transformers import PretrainedConfig

from conmoe_edge.compress.methods.interface import Method
from conmoe_edge.errors import UnsupportedModel, UsageError
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.model.bridge import build_meta
from conmoe_edge.model.rerouting import least_open
from conmoe_edge.model.router import find_routers
from conmoe_edge.plan.levers import kept, scopes


def check_reach(
    config: PretrainedConfig, anatomy: ModelAnatomy, method: Method, rate: float, scope: int
) -> None:
    """Refuse a rate at which a router could no longer choose its top-k.

    Args:
        config: of the model.
        anatomy: of the same model.
        method: one that ``reroutes``, else nothing is looked at.
        rate, scope: as planned.
    """
    if not method.reroutes or rate == 0.0:
        return
    routers = find_routers(build_meta(config, getattr(torch, anatomy.dtype)))
    for layer, router in routers.items():
        if not router.selection.calls:
            raise UnsupportedModel(
                f"The router of {anatomy.architecture} cannot be kept from choosing experts that were removed.",
                f"layer {layer} does not choose by topk, max or argmax",
                f"--method {method.name}+drop, or --method conmoe",
            )
    for layers in scopes(anatomy, scope):
        needed = sum(least_open(routers[layer].selection) for layer in layers)
        pool = sum(routers[layer].slots for layer in layers)
        keep = kept(pool, rate)
        if keep >= needed:
            continue
        selection = routers[layers[0]].selection
        most = math.floor((1.0 - needed / pool) * 1000) / 10
        groups = (
            f", {selection.open_groups} of {selection.groups} groups of them at a time"
            if selection.groups > 1
            else ""
        )
        raise UsageError(
            f"{method.title} cannot remove {rate:.1%} of the experts of this model.",
            f"its routers choose {selection.chosen} experts{groups}, so each layer has to keep "
            f"{least_open(selection)} of {routers[layers[0]].slots}; {keep // len(layers)} would stay",
            f"--rate {most:g}%, or --method {method.name}+drop, which leaves the router alone",
        )
