"""One new token at a time through a model on a CPU: in as few calls as its layers allow.

transformers takes a token through a decoder layer in many small calls: on two cores, 26 of the 121 ms of a step of
OLMoE's shape were spent between them, 9 of 97 with what is put in here. Where a layer, its attention or its router are
the usual ones, each is one call of the operator (``offload/fastpath/decoder_layer.py``, ``attention.py``,
``router.py``); they look at what they are given, and everything but single tokens goes transformers' way.

Memory: what those modules say. Raises nothing.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from conmoe_edge.offload.compute.torch_backend import Machine
from conmoe_edge.offload.fastpath.attention import attend_in_one_call
from conmoe_edge.offload.fastpath.attention_function import suit_attention
from conmoe_edge.offload.fastpath.decoder_layer import layers_in_one_call
from conmoe_edge.offload.fastpath.router import route_in_one_call
from conmoe_edge.offload.kernels.cpu.bindings import operator


def suit_single_tokens(model: PreTrainedModel, machine: Machine) -> bool:
    """Let ``model`` take single tokens through the operator wherever it can; whether it can anywhere."""
    engine = operator()
    if engine is None or not suit_attention(model, machine):
        return False
    attend_in_one_call(model, engine)
    route_in_one_call(model, engine)
    layers_in_one_call(model, engine)
    return True
