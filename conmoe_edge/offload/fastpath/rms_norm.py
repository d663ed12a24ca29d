"""Root-mean-square norms of few tokens on a CPU, by the operator.

transformers' norms are five to eight tensor operations each; a layer has two to four of them, and
between two tokens' weights each operation is cold. ``EdgeNorm`` stands where one was, keeps it for
everything else than a few rows, and is only put there when ``fast_norm`` has seen the two agree on
random numbers: nothing is known of a model's own class but its name and its numbers.

Memory: nothing beside the norm. Raises nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conmoe_edge.offload.compute.fused_linear import call_at_once
from conmoe_edge.offload.kernels.cpu.bindings import Operator, RmsNorm

_MOST_NUMBERS = 1 << 15
"""Beyond this torch's operations on whole batches are as good, and run on all threads."""
_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_FORMATS = (torch.bfloat16, torch.float32)
_ROWS = 8


class EdgeNorm(nn.Module):
    """A norm of a loaded model, for inference only. ``weight`` is the one that it had."""

    def __init__(self, like: nn.Module, norm: RmsNorm, engine: Operator) -> None:
        """Take the place of ``like``, which computes ``norm``."""
        super().__init__()
        self.weight = like.weight
        self._engine, self._norm = engine, norm
        self._like = (like,)  # in a tuple, so that it is not a submodule

    __call__ = call_at_once

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., width] -> the same, in its format."""
        x, norm = hidden_states, self._norm
        few = x.numel() <= _MOST_NUMBERS and x.device.type == "cpu" and x.is_contiguous()
        if few and x.dtype in _FORMATS and self.current() is not None:
            return self._engine.rms_norm(norm, x)
        return self._like[0](x)

    def current(self) -> RmsNorm | None:
        """The norm, as long as its weight lies where it lay."""
        place = self._parameters["weight"].data_ptr()  # pyright: ignore[reportOptionalMemberAccess]
        return self._norm if place == self._norm.place else None


def fast_norm(module: nn.Module, engine: Operator) -> EdgeNorm | None:
    """``module`` by the operator, or ``None`` where it is something else than a root-mean-square norm."""
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if not type(module).__name__.endswith("RMSNorm") or epsilon is None or weight is None:
        return None
    own = dict(module.named_parameters())
    if list(own) != ["weight"] or weight.ndim != 1 or list(module.children()):
        return None
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return None  # a norm in fp32 gives transformers' own numbers
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, weight.numel(), generator=generator, device="cpu")
    x = (x * torch.logspace(-2, 2, _ROWS, device="cpu").unsqueeze(1)).to(weight.dtype)
    try:
        with torch.no_grad():
            wanted = module(x)
    except Exception:  # it takes something else
        return None
    if not isinstance(wanted, Tensor) or wanted.shape != x.shape or wanted.dtype != x.dtype:
        return None
    for plus_one in (False, True):
        for early in (True, False):
            norm = RmsNorm(weight.detach(), epsilon, plus_one, early)
            if _same(engine.rms_norm(norm, x), wanted):
                return EdgeNorm(module, norm, engine)
    return None


def _epsilon(module: nn.Module) -> float | None:
    values = [getattr(module, name, None) for name in _EPSILONS]
    return next((float(value) for value in values if isinstance(value, (int, float))), None)


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Equal in bf16 but for a few roundings that fell to the other side."""
    close = torch.allclose(found.double(), wanted.double(), rtol=2.0**-7, atol=0.0)
    return close and float((found != wanted).float().mean()) < 0.01
