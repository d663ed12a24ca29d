"""One layer on the device against the same layer on the processor, when a package is opened on a device that no
hardware has confirmed (``model/accelerator.py``).

A compiler, a driver or an operation that computes something else there must not become a model's answer. The first
layer with experts takes some tokens of a real forward on the device; a copy of it takes the same on the processor, with
its prototypes read once more from the files. What one token takes is checked with single tokens, since few rows go
another way than many.

Rounding may send a token to another expert where two were nearly equal, and then its whole row differs. So a few rows
may differ, and the others must agree to what the number format can hold. Memory: that layer on the processor, and one
record of each layout. Takes a forward of 24 tokens up to that layer, and as many of one token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from conmoe_edge.errors import ConmoeError, UsageError
from conmoe_edge.model.accelerator import EXPERIMENTAL, experimental
from conmoe_edge.model.experts import find_decoder
from conmoe_edge.offload.compute.experts_forward import HANDLE, LayerHandle
from conmoe_edge.offload.compute.fused_linear import DenseProducts
from conmoe_edge.offload.compute.torch_backend import MANY_ROWS, Arithmetic, Machine, Routed
from conmoe_edge.offload.compute.torch_layer import TorchBackend
from conmoe_edge.offload.runtime import Runtime
from conmoe_edge.offload.storage.stored_expert import StoredExpert

TOKENS = 24
SINGLES = 4
ALLOWED = 8
"""Of so many rows one may differ."""
_NEAR = {torch.float32: 2e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest difference of a row beside what the layer adds to it."""


class _Stop(Exception):
    """The layer is done; the rest of the model need not run."""


class WideArithmetic(Arithmetic):
    """Experts by torch's products alone, never by the compiled operator: what the device is held against."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._operator = None

    def rows(self, module: nn.Module, expert: StoredExpert, hidden: Tensor) -> Tensor:
        """As many rows as make the operator stand back, whatever is asked for."""
        more = max(0, MANY_ROWS - len(hidden))
        wide = nn.functional.pad(hidden, (0, 0, 0, more))
        return super().rows(module, expert, wide)[: len(hidden)]

    def add_all(
        self,
        module: nn.Module,
        experts: Sequence[StoredExpert],
        hidden: Tensor,
        routed: Sequence[Routed],
        total: Tensor,
    ) -> None:
        """One after the other."""
        for expert, (rows, weights) in zip(experts, routed, strict=True):
            total.index_add_(
                0, rows, self.rows(module, expert, hidden[rows]) * weights.unsqueeze(1)
            )


def check_device(model: nn.Module, runtime: Runtime) -> None:
    """Compare, where the runtime's device is one that wants it.

    Raises:
        UsageError: the device cannot compute the layer, or computes something else.
    """
    word = experimental(runtime.device)
    if word is not None:
        compare_layer(model, runtime, word)


def compare_layer(model: nn.Module, runtime: Runtime, word: str) -> None:
    """The comparison itself; ``word`` names the device in errors.

    Raises:
        UsageError: as ``check_device``.
    """
    decoder = find_decoder(model)
    if decoder is None:
        return
    index = min(decoder.experts)
    name = f"layer {index}"
    layer = model.get_submodule(f"{decoder.prefix}.{index}")
    size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator, union-attr]
    ids = [(7 * place + 3) % size for place in range(TOKENS)]
    with torch.inference_mode(), runtime.reference() as reference:
        other = copy_on_cpu(
            layer,
            None
            if reference is None
            else TorchBackend(torch.device("cpu"), reference, WideArithmetic()),
        )
        batches = [ids, *([one] for one in ids[:SINGLES])]
        wrong = rows = 0
        worst = 0.0
        for batch in batches:
            found, wanted, entered = _both(model, layer, other, batch, runtime.device, word, name)
            if not torch.isfinite(found).all():
                raise _differs(word, name, "it gives numbers that are none")
            added = (wanted - entered).norm(dim=-1)
            apart = (found - wanted).norm(dim=-1) / added.clamp_min(1e-20)
            near = _NEAR.get(getattr(model, "dtype", torch.float32), 4e-2)
            if len(batch) == 1:
                rows += 1
                wrong += int((apart > near).sum())
            elif int((apart > near).sum()) * ALLOWED > len(batch):
                worst = float(apart.median())
                raise _differs(
                    word,
                    name,
                    f"half of {len(batch)} rows differ by {worst:.1%} of what it adds, or more",
                )
        if wrong * SINGLES > rows:
            raise _differs(word, name, f"{wrong} of {rows} single tokens differ")


def copy_on_cpu(layer: nn.Module, experts: TorchBackend | None) -> nn.Module:
    """The layer on the processor: its dense products by torch alone, its prototypes by ``experts``."""
    known: dict[int, Any] = {}
    for module in layer.modules():
        products = getattr(module, "products", None)
        if isinstance(products, DenseProducts):
            plain = DenseProducts(Machine.here(torch.device("cpu")), native=False)
            known[id(products)] = known.get(id(products), plain)
        handle = getattr(module, HANDLE, None)
        if isinstance(handle, LayerHandle):
            mine = LayerHandle(handle.slots.to(torch.device("cpu")))
            mine.use(experts)
            known[id(handle)] = mine
    return copy.deepcopy(layer, known).to("cpu")


def _both(
    model: nn.Module,
    layer: nn.Module,
    other: nn.Module,
    ids: Sequence[int],
    device: torch.device,
    word: str,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the layer makes of a prompt on the device, what on the processor, and what entered: fp32 [T, H]."""
    given: list[Any] = []

    def enters(_module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(tree_map_only(Tensor, lambda one: one.detach().clone(), (args, kwargs)))

    def leaves(_module: nn.Module, _args: Any, _kwargs: Any, out: Any) -> None:
        given.append(out)
        raise _Stop

    hooks = [
        layer.register_forward_pre_hook(enters, with_kwargs=True),
        layer.register_forward_hook(leaves, with_kwargs=True),
    ]
    try:
        model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    except _Stop:
        pass
    except (RuntimeError, TypeError) as error:  # an operation that the device does not have
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise _differs(word, name, f"it cannot be computed: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
    args, kwargs = tree_map_only(Tensor, lambda one: one.cpu(), given[0])
    wanted = _first(other(*args, **kwargs))
    entered = args[0] if args else kwargs["hidden_states"]
    found = _first(given[1]).cpu()
    return found.float()[0], wanted.float()[0], entered.float()[0]


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _differs(word: str, name: str, why: str) -> ConmoeError:
    return UsageError(
        f"{EXPERIMENTAL.get(word, word)} does not compute {name} as the processor does.",
        f"{why}; --device {word} is experimental, and answers would be wrong",
        "--device cpu; please report the machine, its driver and the version of torch",
    )
