"""The router of one token, in one call of the operator.

``EdgeRouter`` stands in front of the ``forward`` of every router that is the usual one: a product, softmax over all
slots, the greatest of them, perhaps divided by their sum. As with norms (``rms_norm.py``), the two have agreed on
random numbers before; its code uses no name beyond those of the usual router (``class_match.py``), and one that was
closed for slots (``model/rerouting.py``) is left alone. It answers for single tokens from the first one on, whatever is
resident, so a token's route is the same whatever memory there is.

Memory: a few numbers. Raises nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conmoe_edge.checkpoint.format.quantise import stored
from conmoe_edge.offload.fastpath.class_match import speaks_only_of
from conmoe_edge.offload.kernels.cpu.bindings import Operator, RouterTable

_NAMES = frozenset(
    [
        *("F", "torch", "nn", "functional", "linear", "softmax", "topk", "sum", "reshape", "to"),
        *("dtype", "float", "weight", "hidden_dim", "top_k", "norm_topk_prob"),
    ]
)
"""What the code of the usual router speaks of, in transformers' words."""
_ROWS = 32


class EdgeRouter:
    """Stands in front of the ``forward`` of a router of a loaded model, for inference only."""

    def __init__(self, module: nn.Module, table: RouterTable, engine: Operator) -> None:
        """For ``module``, which computes ``table``."""
        self._own = weakref.WeakMethod(module.forward)
        self._parameters = module._parameters
        self._table, self._engine = table, engine
        self._place = module._parameters["weight"].data_ptr()  # pyright: ignore[reportOptionalMemberAccess]

    def current(self) -> RouterTable | None:
        """The router, as long as its weight lies where it lay."""
        place = self._parameters["weight"].data_ptr()  # pyright: ignore[reportOptionalMemberAccess]
        return self._table if place == self._place else None

    def __call__(self, hidden_states: Tensor) -> Any:
        """[..., H] -> logits [T, E], gates [T, K], slots [T, K]."""
        x = hidden_states
        if x.numel() == self._table.hidden and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            table = self.current()
            if table is not None:
                return self._engine.route(table, x.contiguous())
        own = self._own()
        assert own is not None, "the module is being called, so it is there"
        return own(hidden_states)


def route_in_one_call(model: PreTrainedModel, engine: Operator) -> int:
    """Let the usual routers of ``model`` take single tokens through the operator; how many there are."""
    count = 0
    for module in model.modules():
        table = usual_router(module, engine)
        if table is not None:
            module.forward = EdgeRouter(module, table, engine)  # type: ignore[method-assign]
            count += 1
    return count


def usual_router(module: nn.Module, engine: Operator) -> RouterTable | None:
    """``module`` by the operator, or ``None`` where it is something else than the usual router."""
    own = dict(module.named_parameters())
    weight, chosen = own.get("weight"), getattr(module, "top_k", None)
    if list(own) != ["weight"] or list(module.children()) or list(module.buffers()):
        return None
    if weight is None or weight.ndim != 2 or not isinstance(chosen, int):
        return None
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or chosen > len(weight):
        return None
    if not speaks_only_of(module, _NAMES, ("hidden_states",)):
        return None
    matrix = engine.prepare(stored("plain", weight.detach(), None))
    if matrix is None:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, weight.shape[1], generator=generator, device="cpu").to(torch.bfloat16)
    try:
        with torch.no_grad():
            wanted = module(x)
    except Exception:  # it takes something else
        return None
    if not isinstance(wanted, tuple) or [getattr(one, "ndim", 0) for one in wanted] != [2, 2, 2]:
        return None
    for table in _forms(matrix, chosen, wanted[1].dtype):
        if all(_same(engine.route(table, row.unsqueeze(0)), wanted, n) for n, row in enumerate(x)):
            return table
    return None


def _forms(matrix: Any, chosen: int, dtype: torch.dtype) -> Iterator[RouterTable]:
    if dtype in (torch.bfloat16, torch.float32):
        for normed in (False, True):
            yield RouterTable(matrix, chosen, normed, dtype == torch.bfloat16)


def _same(found: tuple[Tensor, Tensor, Tensor], wanted: tuple[Tensor, ...], row: int) -> bool:
    """Equal but for a rounding that fell to the other side, and for slots of the same probability."""
    logits, gates, slots = (one[row : row + 1] for one in wanted)
    if (
        found[0].dtype != logits.dtype
        or found[1].dtype != gates.dtype
        or slots.dtype != torch.int64
    ):
        return False
    for ours, theirs in ((found[0], logits), (found[1], gates)):
        if not torch.allclose(ours.double(), theirs.double(), rtol=2.0**-6, atol=2.0**-6):
            return False
    chosen, expected = (logits.gather(1, one).double() for one in (found[2], slots))
    return torch.allclose(chosen, expected, rtol=2.0**-6, atol=2.0**-6)
