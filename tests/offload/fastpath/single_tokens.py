"""Tiny models that take single tokens as loaded packages do, and what they answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from conmoe_edge.compat import cache_argument, cache_of
from conmoe_edge.integrations.dense_weights import finish_dense, products_for
from conmoe_edge.offload.compute.torch_backend import Machine
from conmoe_edge.offload.fastpath.attention import FusedAttention
from conmoe_edge.offload.fastpath.decoder_layer import FusedLayer
from conmoe_edge.offload.fastpath.install import install
from conmoe_edge.offload.fastpath.kv_cache import STEP_TOKENS
from conmoe_edge.offload.fastpath.report import FastPathReport
from tests.families import tiny_model

IDS = torch.tensor([[5, 17, 33, 80, 12, 64, 9, 9]])


def of_family(name: str, **changes: Any) -> Any:
    """A tiny model in bf16 with its own experts and everything else that loading puts into one."""
    return installed(name, **changes)[0]


def installed(name: str, **changes: Any) -> tuple[Any, FastPathReport]:
    """``of_family`` and its report."""
    torch.manual_seed(0)
    model: Any = tiny_model(name, dtype=torch.bfloat16, **changes).eval()
    finish_dense(model, products_for(torch.device("cpu")))
    return model, install(model, Machine("cpu", native_bf16=False), 2 * STEP_TOKENS)


def random_parts(model: Any) -> Any:
    """``model`` with norms, biases, sinks and corrections that are not what they are made with."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, one in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name and one.ndim == 1 and name.endswith("weight"):
                one.add_(torch.randn(one.shape, generator=generator) * 0.2)
            elif name.endswith(("bias", "sinks")):
                one.copy_(torch.randn(one.shape, generator=generator) * 0.3)
    return model


def modules_behind(model: Any, kind: type) -> list[Any]:
    """The modules whose ``forward`` has a ``kind`` in front of it."""
    return [module for module in model.modules() if isinstance(vars(module).get("forward"), kind)]


@contextmanager
def layers_of_transformers() -> Iterator[None]:
    """Layers as transformers has them; their attention is one call all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedLayer, "prepare", lambda *_: None)
        yield


@contextmanager
def transformers_only() -> Iterator[None]:
    """Without the one calls of attention and layers, with native products, norms and routers as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedAttention, "place", lambda *_: None)
        yield


def steps(model: Any, tokens: list[int], cache: Any = None) -> tuple[torch.Tensor, Any]:
    """Logits of a prompt (where there is no cache yet) and of single tokens after it, and the cache."""
    rows = []
    with torch.inference_mode():
        if cache is None:
            out = model(IDS, use_cache=True)
            cache = cache_of(out)
            rows.append(out.logits[0, -1])
        for token in tokens:
            out = model(torch.tensor([[token]]), **cache_argument(model, cache))
            rows.append(out.logits[0, -1])
    return torch.stack(rows), cache
