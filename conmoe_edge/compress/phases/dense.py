"""Matrices outside the routed experts in fewer bits: rounded layer by layer, on what comes to them.

Before a layer is looked at, the calibration tokens go through it without its experts, and the Gram matrices of the
inputs of its linear layers are taken: of the package's own stream where the method has one, of the original's
elsewhere. When the original has run, the layer's matrices are rounded with feedback (``dense_rounding.py``), written,
and put into the loaded layer, so that the experts are refitted beside the numbers that will run. An output head is
rounded behind the last layer in the same way. Embeddings are looked up by single rows, for which the nearest is best;
a head that is tied to them is stored with them.

Peak memory: the hidden states of one stream once more, the Gram matrices of a layer, and what one matrix takes to be
rounded. Raises ``CheckpointError`` for a weight that holds NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.forms import Kind
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile
from conmoe_edge.checkpoint.tensors.tensor_writer import write_dense_index, write_tensors
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.solvers.dense_rounding import round_dense
from conmoe_edge.compress.stream.dense_conversion import matrix_sources, sound
from conmoe_edge.compress.stream.expert_hooks import RoutedTap, attach
from conmoe_edge.compress.stream.input_moments import InputMoments
from conmoe_edge.compress.stream.layer_stream import Stream, run_layer
from conmoe_edge.model.bridge import targets_of
from conmoe_edge.model.linears import dense_forms, quantisable_weights
from conmoe_edge.model.streaming import StreamedModel

_FILES = "dense-"
_WEIGHT = ".weight"


class _Seen(Exception):
    """Leaves the model once the head's input is known."""


@dataclass(frozen=True, slots=True)
class DenseForms:
    """How the dense matrices of a model are stored, and when they are rounded.

    Attributes:
        at_once: checkpoint name -> form, of those that are rounded to the nearest before everything else.
        in_layers: decoder layer -> the same, of its linear layers.
        head: of an output head that is not tied, or empty.
    """

    at_once: Mapping[str, Kind]
    in_layers: Mapping[int, Mapping[str, Kind]]
    head: Mapping[str, Kind]

    @classmethod
    def of(cls, model: StreamedModel, precision: str) -> DenseForms:
        """For a model of which nothing is loaded."""
        if precision == "source":
            return cls({}, {}, {})
        layers = {index: model.layer_keys(index) for index in range(len(model.layers))}
        keys = [*model.outside_keys, *(key for names in layers.values() for key in names)]
        shapes = quantisable_weights(model.model, targets_of(model.model, keys))
        forms = dense_forms(shapes, precision)
        in_layers: dict[int, Mapping[str, Kind]] = {
            index: {name: forms[name] for name in names if name in forms}
            for index, names in layers.items()
        }
        output = model.model.get_output_embeddings()
        head: dict[str, Kind] = {
            f"{path}{_WEIGHT}": forms[f"{path}{_WEIGHT}"]
            for path, module in model.model.named_modules()
            if module is output and f"{path}{_WEIGHT}" in forms
        }
        later = {*head, *(name for names in in_layers.values() for name in names)}
        return cls({n: one for n, one in forms.items() if n not in later}, in_layers, head)

    @property
    def later(self) -> frozenset[str]:
        """Names of those that are rounded on the way."""
        return frozenset({*self.head, *(n for names in self.in_layers.values() for n in names)})

    def layer_moments(
        self, run: Run, model: StreamedModel, index: int, stream: Stream
    ) -> InputMoments | None:
        """Of the inputs of a loaded layer's matrices; ``stream`` stays in front of the layer."""
        forms = self.in_layers.get(index)
        if not forms:
            return None
        entered, moments = stream.hidden.clone(), InputMoments()
        module = model.experts[index][1] if index in model.experts else None
        if module is not None:
            attach(module, moments)
        linears = {name: _linear(model, name) for name in forms}
        with run.clock.part("dense"), moments.listening(linears):
            run_layer(model, index, stream, moments)
        if module is not None:
            attach(module, RoutedTap())
        stream.hidden = entered
        return moments

    def round_layer(
        self, run: Run, model: StreamedModel, index: int, moments: InputMoments | None
    ) -> None:
        """Round, write and put in place the matrices of a loaded layer."""
        if moments is not None:
            name = f"{_FILES}layer-{index:05d}.safetensors"
            with run.clock.part("dense"):
                run.journal.add_files([_rounded(run, model, self.in_layers[index], moments, name)])

    def round_head(self, run: Run, model: StreamedModel, stream: Stream) -> None:
        """Round and write the head; ``stream`` is behind the last layer."""
        if not self.head:
            return
        with run.clock.part("dense"):
            model.load_outside()
            moments = InputMoments()
            (head,) = (_linear(model, name) for name in self.head)

            def leave(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                raise _Seen

            with moments.listening(dict.fromkeys(self.head, head)):
                hook = head.register_forward_pre_hook(leave)
                for batch, keep, (start, stop) in zip(
                    stream.batches, stream.keep, stream.spans(), strict=True
                ):
                    moments.keep = keep
                    with suppress(_Seen):
                        model.epilogue(batch, stream.hidden[start:stop].to(model.device))
                hook.remove()
            written = _rounded(run, model, self.head, moments, f"{_FILES}head.safetensors")
            run.journal.add_files([written])
            model.drop_outside()

    def index(self, run: Run) -> list[WrittenFile]:
        """The index of all dense files, once they are there."""
        if not self.later:
            return []
        names = sorted(name for name in run.journal.files if name.endswith(".safetensors"))
        names = [name for name in names if name.startswith(_FILES)]
        return [write_dense_index(run.package, names)]


def _rounded(
    run: Run, model: StreamedModel, forms: Mapping[str, Kind], moments: InputMoments, file: str
) -> WrittenFile:
    sources = []
    for name, kind in forms.items():
        weight = _linear(model, name).weight
        matrix = round_dense(sound(name, weight.detach()), moments.of(name), kind)
        with torch.no_grad():
            weight.copy_(matrix.dequantise(weight.dtype))
        sources += matrix_sources(name, matrix)
    return write_tensors(run.package / file, sources)


def _linear(model: StreamedModel, name: str) -> nn.Linear:
    module = model.model.get_submodule(name.removesuffix(_WEIGHT))
    assert isinstance(module, nn.Linear), "quantisable_weights has looked"
    return module
