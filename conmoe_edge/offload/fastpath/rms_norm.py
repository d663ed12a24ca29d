"""Root-mean-square norms of few tokens on a CPU, by the operator.

transformers' norms are five to eight tensor operations each, and a layer has two to four of them. ``FusedNorm`` stands
where one of the listed classes (``supported.py``) was, and keeps it for everything but a few rows.

Memory: nothing beside the norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conmoe_edge.offload.compute.fused_linear import call_at_once
from conmoe_edge.offload.fastpath.supported import Norm, Refusal, look_up
from conmoe_edge.offload.kernels.cpu.bindings import Operator, RmsNorm

_MOST_NUMBERS = 1 << 15
"""Beyond this torch's operations on whole batches are as good, and run on all threads."""
_FORMATS = (torch.bfloat16, torch.float32)


class FusedNorm(nn.Module):
    """A norm of a loaded model, for inference only. ``weight`` is the one that it had."""

    def __init__(self, like: nn.Module, norm: RmsNorm, engine: Operator) -> None:
        """Take the place of ``like``, which computes ``norm``."""
        super().__init__()
        self.weight, self.bias = like.weight, getattr(like, "bias", None)
        self._engine, self._norm = engine, norm
        self._shift = 0 if self.bias is None else self.bias.data_ptr()
        self._like = (like,)  # in a tuple, so that it is not a submodule

    __call__ = call_at_once

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., width] -> the same, in its format."""
        x, norm = hidden_states, self._norm
        few = x.numel() <= _MOST_NUMBERS and x.device.type == "cpu" and x.is_contiguous()
        fits = x.dtype in _FORMATS and x.shape[-1] == norm.columns
        if few and fits and self.current() is not None:
            return self._engine.rms_norm(norm, x)
        return self._like[0](x)

    def current(self) -> RmsNorm | None:
        """The norm, as long as its weight lies where it lay."""
        place = self._parameters["weight"].data_ptr()  # pyright: ignore[reportOptionalMemberAccess]
        if self._shift and self.bias.data_ptr() != self._shift:  # pyright: ignore[reportOptionalMemberAccess]
            return None
        return self._norm if place == self._norm.place else None


def fused_norm(module: nn.Module, engine: Operator) -> FusedNorm | Refusal:
    """``module`` by the operator. A norm with weights in another format than bf16 keeps transformers' own numbers."""
    spec = look_up(module, Norm)
    if isinstance(spec, Refusal):
        return spec
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return Refusal(f"the weight of {type(module).__name__} is not bf16 on the CPU")
    epsilon, bias = float(getattr(module, spec.epsilon)), module._parameters.get("bias")
    if spec.shift and (bias is None or bias.dtype != weight.dtype):
        return Refusal(f"{type(module).__name__} without a bias")
    if weight.ndim != 1:
        return Refusal(f"{type(module).__name__} over several axes")
    shift = None if bias is None else bias.detach()
    norm = RmsNorm(weight.detach(), epsilon, spec.plus_one, spec.early, shift)
    return FusedNorm(module, norm, engine)
