"""Tiny models that take single tokens as loaded packages do, and what they answer."""

from __future__ import annotations

from typing import Any

import torch

from conmoe_edge.integrations.dense_weights import finish_dense, products_for
from conmoe_edge.offload.compute.torch_backend import Machine
from conmoe_edge.offload.fastpath.install import suit_single_tokens
from conmoe_edge.offload.fastpath.kv_cache import STEP_TOKENS, keep_cache_growing
from tests.families import tiny_model

IDS = torch.tensor([[5, 17, 33, 80, 12, 64, 9, 9]])


def of_family(name: str) -> Any:
    """A tiny model in bf16 with its own experts and everything else that loading puts into one."""
    torch.manual_seed(0)
    model: Any = tiny_model(name, dtype=torch.bfloat16).eval()
    finish_dense(model, products_for(torch.device("cpu")))
    keep_cache_growing(model, 2 * STEP_TOKENS)
    assert suit_single_tokens(model, Machine("cpu", native_bf16=False))
    return model


def modules_behind(model: Any, kind: type) -> list[Any]:
    """The modules whose ``forward`` has a ``kind`` in front of it."""
    return [module for module in model.modules() if isinstance(vars(module).get("forward"), kind)]


def steps(model: Any, tokens: list[int], cache: Any = None) -> tuple[torch.Tensor, Any]:
    """Logits of a prompt (where there is no cache yet) and of single tokens after it, and the cache."""
    rows = []
    with torch.inference_mode():
        if cache is None:
            out = model(IDS, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1])
        for token in tokens:
            out = model(torch.tensor([[token]]), past_key_values=cache)
            rows.append(out.logits[0, -1])
    return torch.stack(rows), cache
