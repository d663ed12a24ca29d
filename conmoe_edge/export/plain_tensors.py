"""A package's tensors under the names that ``save_pretrained`` gives, one decoder layer at a time.

Each layer is loaded as ``from_pretrained`` would load it, its experts are put together from the prototypes, and
transformers' own loading is run backwards. A package that left the model unchanged gives the model's own tensors, a
quantised one expanded.

Peak memory: one decoder layer in the checkpoint's number format, and its experts a second time while they are split
into single tensors. Raises ``UnsupportedModel`` for what a plain checkpoint cannot say, ``PackageError`` and
``CheckpointError`` for a damaged package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from conmoe_edge.checkpoint.format.layout import neurons
from conmoe_edge.checkpoint.format.manifest import UNCHANGED
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.package.opened_package import OpenedPackage
from conmoe_edge.checkpoint.package.prototype_reader import PrototypeReader
from conmoe_edge.checkpoint.package.slot_constants import CONSTANTS_FILE, read_constants
from conmoe_edge.checkpoint.quantised.expanded import ExpandedTensors
from conmoe_edge.checkpoint.quantised.stored import stored_in
from conmoe_edge.checkpoint.tensors.tensor_reader import Lazy, ShardReader
from conmoe_edge.compress.stream.dense_conversion import Dequantised
from conmoe_edge.errors import CheckpointError
from conmoe_edge.export.export_form import Decided, decide
from conmoe_edge.export.slot_experts import check_slots, layer_experts
from conmoe_edge.model.bridge import build_meta, read_config, saved_names, without_quantization
from conmoe_edge.model.experts import part_names
from conmoe_edge.model.record_match import token_size
from conmoe_edge.model.source_facts import read_source
from conmoe_edge.model.streaming import StreamedModel


def plain_config(package: Path) -> PretrainedConfig:
    """The model's config without what makes it a package."""
    return without_quantization(read_config(package))


@contextmanager
def open_plain(
    opened: OpenedPackage, kept: Mapping[int, tuple[int, ...]] | None = None
) -> Iterator[PlainTensors]:
    """The tensors of a package as a plain checkpoint has them.

    Args:
        opened: the package.
        kept: decoder layer -> the router slots that stay; by default what the package says.

    Raises:
        UnsupportedModel: a plain checkpoint of this model cannot hold this.
    """
    with ShardReader(opened.index) as reader:
        if opened.manifest.method == UNCHANGED:
            found = read_source(opened.folder, stored_in(opened.index))
            expanded = ExpandedTensors(reader, found.scheme)
            plain = PlainTensors(opened, found.config, expanded, _dtype(found.config, expanded))
        else:
            config = plain_config(opened.folder)
            dtype = _dtype(config, reader)
            plain = PlainTensors(opened, config, Dequantised(reader), dtype, kept)
        try:
            yield plain
        finally:
            plain.close()


class PlainTensors:
    """One package as a plain checkpoint.

    Attributes:
        decided: what becomes of its router slots, and the config of the plain checkpoint.
        dtype: the number format of the checkpoint.
        layers: how many decoder layers there are.
    """

    def __init__(
        self,
        opened: OpenedPackage,
        config: PretrainedConfig,
        dense: Mapping[str, Any],
        dtype: torch.dtype,
        kept: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        self._folder = opened.folder
        self._manifest = opened.manifest
        self._unchanged = opened.manifest.method == UNCHANGED
        self.dtype = dtype
        self._model = StreamedModel(
            config,
            list(dense),
            lambda keys: {key: dense[key] for key in keys},
            dtype=self.dtype,
            experts_dtype=self.dtype,
            device=torch.device("cpu"),
        )
        self.layers = len(self._model.layers)
        self._experts = {layer: module for layer, (_, module) in self._model.experts.items()}
        if self._unchanged:
            self.decided = self._as_it_is(config)
        else:
            self._check_layers(opened.folder)
            self.decided = decide(opened.manifest, config, self._experts, kept)
            check_slots(opened.manifest, self._experts)
        self.saved = build_meta(self.decided.config, self.dtype)
        self._records: PrototypeReader | None = None
        self._constants = read_constants(
            opened.folder / CONSTANTS_FILE,
            SlotMap.of_manifest(opened.manifest),
            token_size(opened.folder, self._experts.values()),
        )

    def close(self) -> None:
        """Close the files of prototypes."""
        if self._records is not None:
            self._records.close()

    def _prototypes(self) -> PrototypeReader:
        if self._records is None:
            self._records = PrototypeReader(self._folder, self._manifest)
        return self._records

    def _as_it_is(self, config: PretrainedConfig) -> Decided:
        """What is written of a model that was not changed."""
        counts = {
            layer: getattr(module, part_names(module)[0]).shape[0]
            for layer, module in self._experts.items()
        }
        module = next(iter(self._experts.values()))
        width = neurons(module.down_proj.shape, bool(module.is_transposed))  # type: ignore[union-attr]
        kept = {layer: tuple(range(count)) for layer, count in counts.items()}
        return Decided("unchanged", kept, max(counts.values()), width, {}, {}, config, ())

    def _check_layers(self, package: Path) -> None:
        described = {layer: len(row) for layer, row in self._manifest.slots.items()}
        found = {
            layer: getattr(module, part_names(module)[0]).shape[0]
            for layer, module in self._experts.items()
        }
        if described != found:
            raise CheckpointError(
                f"The package in {package} does not match its config.json.",
                "they name different layers or numbers of experts",
                "Make the package again with conmoe-edge fit, or copy it again from where it came from.",
            )

    def described(self) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
        """``portions`` without the numbers: tensors on the meta device."""
        state = self.saved.state_dict()
        tied = self._tied(self.saved)
        for layer in (None, *range(self.layers)):
            inside = f"{self._model.prefix}."
            mine = {
                name: tensor
                for name, tensor in state.items()
                if (
                    not name.startswith(inside) and name not in tied
                    if layer is None
                    else name.startswith(f"{inside}{layer}.")
                )
            }
            yield layer, saved_names(self.saved, mine)

    def portions(self) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
        """What is outside the decoder layers (``None``), a tied head once, then layer after layer.

        Yields:
            The layer, and its tensors by the names of the plain checkpoint.
        """
        yield None, self._outside()
        for index in range(self.layers):
            yield index, self._layer(index)

    @staticmethod
    def _tied(model: torch.nn.Module) -> set[str]:
        return set(getattr(model, "all_tied_weights_keys", None) or {})

    def _outside(self) -> dict[str, Tensor]:
        self._model.load_outside()
        tied = self._tied(self._model.model)
        inside = f"{self._model.prefix}."
        tensors = {
            name: tensor
            for name, tensor in self._model.model.state_dict().items()
            if not name.startswith(inside) and name not in tied
        }
        saved = saved_names(self.saved, tensors)
        self._model.drop_outside()
        return saved

    def _layer(self, index: int) -> dict[str, Tensor]:
        path = f"{self._model.prefix}.{index}"
        with self._model.layer(index, with_experts=self._unchanged) as layer:
            tensors = {
                f"{path}.{name}": self._sliced(f"{path}.{name}", tensor, index)
                for name, tensor in layer.state_dict().items()
                if not tensor.is_meta
            }
        if index in self._experts and not self._unchanged:
            fused = layer_experts(
                self._experts[index],
                self._manifest.slots[index],
                self.decided.kept[index],
                self.decided.width,
                self._prototypes(),
                self._constants.get(index),
                self.dtype,
            )
            experts_path = self._model.experts[index][0]
            tensors.update({f"{experts_path}.{name}": part for name, part in fused.items()})
        return saved_names(self.saved, tensors)

    def _sliced(self, name: str, tensor: Tensor, layer: int) -> Tensor:
        """A tensor of the router without the slots that go."""
        axis = self.decided.sliced.get(name)
        if axis is None:
            return tensor
        return tensor.index_select(axis, torch.tensor(self.decided.kept[layer]))


def _dtype(config: PretrainedConfig, tensors: Mapping[str, Lazy]) -> torch.dtype:
    """The config's number format; that of the largest floating-point tensor where it names none."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    if isinstance(dtype, torch.dtype):
        return dtype
    floating = [one for one in tensors.values() if one.dtype.is_floating_point]
    return max(floating, key=lambda one: one.shape.numel()).dtype if floating else torch.bfloat16
