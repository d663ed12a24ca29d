"""Gram matrices of what linear layers multiply with, taken while a decoder layer runs without its routed experts.

Layers that are given one tensor (queries, keys and values; gate and up) share one matrix. Peak memory: a matrix [K, K]
in fp32 for each input that differs, and the inputs of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from conmoe_edge.compress.stream.expert_hooks import Tap


class InputMoments(Tap):
    """Sums of x x^T over all tokens, of the inputs of some linear layers; its experts give zeros."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}
        self._owner: dict[str, str] = {}
        self._batch: list[tuple[Tensor, int, str]] = []
        super().__init__()

    @property
    def keep(self) -> Tensor | None:
        """[tokens]: false for padding; set when another batch comes."""
        return self._keep

    @keep.setter
    def keep(self, keep: Tensor | None) -> None:
        self._batch.clear()
        self._keep = keep

    def forward(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[T, H] of zeros."""
        return torch.zeros_like(hidden)

    @contextmanager
    def listening(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hooks on ``linears``, by their names, for the time being."""
        with ExitStack() as stack:
            for name, module in linears.items():
                stack.callback(module.register_forward_pre_hook(self._hook(name)).remove)
            yield
            self._batch.clear()

    def of(self, name: str) -> Tensor | None:
        """fp32 [K, K] of the linear layer ``name``; ``None`` where nothing came to it."""
        return self._found.get(self._owner.get(name, ""))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            # All of them are alive, so that one place is one tensor; the version changes with its numbers.
            place = (x.data_ptr(), x.shape, x.stride(), x._version)
            same = (
                other
                for seen, version, other in self._batch
                if (seen.data_ptr(), seen.shape, seen.stride(), version) == place
            )
            first = next(same, name)
            if self._owner.setdefault(name, first) != first:
                raise RuntimeError(f"{name} shares its input with {first} for some tokens only")
            if first == name:
                self._batch.append((x, x._version, name))
                self._add(name, x)

        return take

    def _add(self, name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if self._keep is not None and len(self._keep) == len(rows):
            rows = rows[self._keep.to(rows.device)]
        moments = rows.T @ rows
        before = self._found.get(name)
        self._found[name] = moments if before is None else before.add_(moments)
