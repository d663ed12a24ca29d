"""Which columns of a matrix matter: the mean square of what comes in there, measured on text.

llama.cpp's quantisation weighs the error of a column by this (its "importance matrix"). The model that is exported runs
over calibration text in the same pass that writes it, layer by layer: the tensors of a portion are loaded into a plain
model of the exported sizes, and what enters each linear layer and each projection of each expert is squared and summed.
An expert that no token chose gets ones, so that its columns count alike.

Peak memory beside the export's own: one decoder layer, the hidden states of all tokens, one batch of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from conmoe_edge.compress.stream import expert_hooks
from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.compress.stream.layer_stream import compute_dtype, open_stream, run_layer
from conmoe_edge.export.plain_tensors import PlainTensors
from conmoe_edge.model.experts import part_names, plain_products, sum_dtype, through_expert
from conmoe_edge.model.streaming import StreamedModel

Importance = dict[str, "np.ndarray"]
"""llama.cpp's name of a matrix -> fp32, one number a column; [E, columns] for the experts of a layer."""


class Sums:
    """Sums of squares of columns, and over how many rows."""

    def __init__(self) -> None:
        self._squares: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}

    def add(self, name: str, rows: Tensor) -> None:
        """rows: [n, columns]."""
        squares = rows.double().square().sum(0)
        self._squares[name] = self._squares[name] + squares if name in self._squares else squares
        self._rows[name] = self._rows.get(name, 0) + len(rows)

    def mean(self, name: str) -> Tensor | None:
        """[columns] fp32; ``None`` where no row came."""
        if not self._rows.get(name):
            return None
        return (self._squares[name] / self._rows[name]).float()


class _Tap(expert_hooks.Tap):
    """The layer's experts, with a note of what enters their projections."""

    def __init__(self, sums: Sums) -> None:
        super().__init__()
        self._sums = sums

    def forward(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]."""
        names = part_names(module)
        out = torch.zeros(hidden.shape, dtype=sum_dtype(hidden), device=hidden.device)
        for expert in range(getattr(module, names[0]).shape[0]):
            rows, place = (index == expert).nonzero(as_tuple=True)
            if not len(rows):
                continue
            real = None if self.keep is None else self.keep[rows]
            plain = plain_products(
                module, {name: getattr(module, name)[expert] for name in names}, hidden.dtype
            )

            def project(
                name: str,
                x: Tensor,
                expert: int = expert,
                real: Tensor | None = real,
                plain: Callable[[str, Tensor], Tensor] = plain,
            ) -> Tensor:
                self._sums.add(f"{name}.{expert}", x if real is None else x[real])
                return plain(name, x)

            value = through_expert(module, hidden[rows], project)
            gates = weights[rows, place].unsqueeze(-1).to(out.dtype)
            out.index_add_(0, rows, value.to(out.dtype) * gates)
        return out.to(hidden.dtype)


class ImportancePass:
    """The exported model over a text, as its layers come by.

    Args:
        plain: what is exported.
        tokens: the text.
        name_of: name of a weight as ``save_pretrained`` has it -> llama.cpp's, ``None`` where it has none.
    """

    def __init__(
        self, plain: PlainTensors, tokens: TokenSet, name_of: Callable[[str], str | None]
    ) -> None:
        expert_hooks.register()
        device = torch.device("cpu")
        self._portion: Mapping[str, Tensor] = {}
        keys = [name for _, portion in plain.described() for name in portion]
        self._model = StreamedModel(
            plain.decided.config,
            keys,
            lambda wanted: {key: self._portion[key] for key in wanted},
            dtype=compute_dtype(device, plain.dtype),
            experts_dtype=plain.dtype,
            device=device,
            experts_implementation=expert_hooks.IMPLEMENTATION,
        )
        self._tokens = tokens
        self._name_of = name_of
        self.found: Importance = {}

    def take(self, layer: int | None, portion: Mapping[str, Tensor]) -> None:
        """The next portion of ``PlainTensors.portions``."""
        self._portion = portion
        if layer is None:
            self._model.load_outside()
            self._stream = open_stream(self._model, self._tokens)
            self._model.drop_outside()
        else:
            self._run(layer)
        self._portion = {}

    def _run(self, index: int) -> None:
        sums = Sums()
        tap = _Tap(sums)
        with self._model.layer(index) as layer, _listening(layer, sums, tap):
            path, module = self._model.experts.get(index, ("", None))
            if module is not None:
                expert_hooks.attach(module, tap)
            run_layer(self._model, index, self._stream, tap if module is not None else None)
            for name, linear in layer.named_modules():
                if isinstance(linear, nn.Linear):
                    weight = f"{self._model.prefix}.{index}.{name}.weight"
                    self._put(weight, sums.mean(name))
            if module is not None:
                self._put_experts(path, module, sums)

    def _put_experts(self, path: str, module: nn.Module, sums: Sums) -> None:
        names = part_names(module)
        count = getattr(module, names[0]).shape[0]
        inner = "gate_up_proj" if module.has_gate else "up_proj"
        targets = {inner: ("gate_proj", "up_proj") if module.has_gate else ("up_proj",)}
        for part, projections in {**targets, "down_proj": ("down_proj",)}.items():
            means = [sums.mean(f"{part}.{expert}") for expert in range(count)]
            some = next((mean for mean in means if mean is not None), None)
            if some is None:
                continue
            rows = [torch.ones_like(some) if mean is None else mean for mean in means]
            for projection in projections:
                self._put(f"{path}.{projection}.weight", torch.stack(rows))

    def _put(self, weight: str, mean: Tensor | None) -> None:
        name = self._name_of(weight)
        if name is not None and mean is not None:
            self.found[name] = mean.numpy()


@contextmanager
def _listening(layer: nn.Module, sums: Sums, tap: _Tap) -> Iterator[None]:
    """Note what enters the linear layers of a decoder layer."""

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        same = tap.keep is not None and len(rows) == len(tap.keep)
        sums.add(name, rows[tap.keep] if same else rows)

    handles = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
