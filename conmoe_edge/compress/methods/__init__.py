"""Consolidation methods behind one interface (``interface.py``). ``METHODS`` is the table that ``fit --method``
chooses from.
"""

from __future__ import annotations

from collections.abc import Mapping

from conmoe_edge.compress.methods.auto import AUTO
from conmoe_edge.compress.methods.conmoe import CONMOE
from conmoe_edge.compress.methods.hc_smoe import HC_SMOE
from conmoe_edge.compress.methods.interface import Method
from conmoe_edge.compress.methods.m_smoe import M_SMOE
from conmoe_edge.compress.methods.mc_smoe import MC_SMOE
from conmoe_edge.compress.methods.mergemoe import MERGEMOE
from conmoe_edge.compress.methods.mone import MONE
from conmoe_edge.compress.methods.pruning import ONE_SHOT

_ALL: tuple[Method, ...] = (
    AUTO,
    CONMOE,
    *ONE_SHOT,
    MONE,
    HC_SMOE,
    M_SMOE,
    MC_SMOE,
    MERGEMOE,
)

METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
