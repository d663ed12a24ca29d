"""Consolidation methods behind one interface: what a scope looked like in, who is kept and who stands for whom out.

A method is a pure function ``decide(scope, keep) -> Decision``. Weights reach it only through ``ScopeView.distances``,
which costs a pass over the scope's weights and is called when a method needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from conmoe_edge.compress.methods import conmoe
from conmoe_edge.compress.methods.interface import Decision, ScopeView

Method = Callable[[ScopeView, int], Decision]

METHODS: Mapping[str, Method] = {"conmoe": conmoe.decide}

__all__ = ["METHODS", "Decision", "Method", "ScopeView"]
