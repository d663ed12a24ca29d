"""Write a package as a plain checkpoint, one decoder layer at a time.

Each layer is loaded as ``from_pretrained`` would load it, its experts are put together from the prototypes, and the
whole is written under the names that ``save_pretrained`` gives: transformers' own loading backwards. So whatever reads
this model's checkpoints reads this one. The folder is whole or absent.

Peak memory: one decoder layer in the checkpoint's number format, and its experts a second time while they are split
into single tensors. Raises ``UnsupportedModel`` for what a plain checkpoint cannot say, ``PackageError`` for a damaged
package, ``NoSpace``, ``OutputExists``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from conmoe_edge.checkpoint.format.manifest import UNCHANGED, Manifest
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.fs.atomic_files import write_bytes, write_json
from conmoe_edge.checkpoint.fs.contained import is_there, read_inside
from conmoe_edge.checkpoint.fs.disk import require_space
from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.checkpoint.package.prototype_reader import PrototypeReader
from conmoe_edge.checkpoint.package.sidefiles import MODEL_CARD, copy_side_files
from conmoe_edge.checkpoint.package.slot_constants import CONSTANTS_FILE, read_constants
from conmoe_edge.checkpoint.package.staged import StagedFolder
from conmoe_edge.checkpoint.tensors.tensor_index import (
    CONFIG_FILE,
    INDEX_FILE,
)
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.checkpoint.tensors.tensor_writer import TensorSource, write_tensors
from conmoe_edge.compress.run.job import Progress
from conmoe_edge.compress.stream.dense_conversion import Dequantised
from conmoe_edge.errors import CheckpointError, OutputExists, UnsupportedModel
from conmoe_edge.export.export_form import Decided, decide
from conmoe_edge.export.slot_experts import check_slots, layer_experts
from conmoe_edge.model.bridge import build_meta, read_config, saved_names, without_quantization
from conmoe_edge.model.config_json import read_to_write
from conmoe_edge.model.experts import part_names
from conmoe_edge.model.streaming import StreamedModel

EXPORT_FILE = "conmoe_export.json"
"""What an exported folder says of where it came from; the mark of a folder that may be replaced."""

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: ``kind`` and ``notes`` as in ``Decided``, ``nbytes`` of all files."""

    folder: Path
    kind: str
    experts: int
    width: int
    nbytes: int
    notes: tuple[str, ...]


def export_hf(
    package: Path,
    out: Path,
    *,
    kept: Mapping[int, tuple[int, ...]] | None = None,
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> Exported:
    """Write the package in ``package`` as a plain checkpoint ``out``.

    Args:
        package: a folder that ``fit`` wrote.
        out: the folder to write; one that an export wrote is replaced with ``overwrite``.
        kept: decoder layer -> the router slots that stay; by default what the package says.
        overwrite: replace an earlier export.
        progress: called after every layer.
    """
    _check_target(out, overwrite)
    opened = open_package(package)
    manifest = opened.manifest
    if manifest.method == UNCHANGED:
        raise UnsupportedModel(
            f"{package} is a plain checkpoint already.",
            "the model fitted as it was, and nothing was changed",
            f"use it as it is; for GGUF: conmoe-edge export {package} FILE.gguf --format gguf",
        )
    config = plain_config(package)
    with ShardReader(opened.index) as reader:
        run = _Export(package, manifest, config, reader, kept)
        require_space(out, run.estimate())
        settings = {"package": str(package.resolve()), "files": manifest.files}
        with StagedFolder(
            out, settings, overwrite=overwrite, fresh=True, marker=EXPORT_FILE
        ) as staged:
            try:
                nbytes = run.write(staged.path, progress or (lambda step: None))
            except BaseException:
                staged.discard()  # there is nothing to go on from
                raise
            staged.commit()
    decided = run.decided
    experts = len(next(iter(decided.kept.values())))
    return Exported(out, decided.kind, experts, decided.width, nbytes, decided.notes)


def _check_target(out: Path, overwrite: bool) -> None:
    """Before anything is read: whether ``out`` may be written."""
    if not out.exists():
        return
    ours = out.is_dir() and ((out / EXPORT_FILE).is_file() or not any(out.iterdir()))
    if not overwrite:
        raise OutputExists(
            f"{out} exists already.", "", "--overwrite to replace it, or another folder"
        )
    if not ours:
        raise OutputExists(
            f"{out} exists and was not written by an export.",
            "even with --overwrite only such a folder, or an empty one, is replaced",
            "another folder, or remove this one yourself",
        )


def plain_config(package: Path) -> PretrainedConfig:
    """The model's config without what makes it a package."""
    return without_quantization(read_config(package))


class _Export:
    """One export: the package's tensors as the loader wants them, layer by layer."""

    def __init__(
        self,
        package: Path,
        manifest: Manifest,
        config: PretrainedConfig,
        reader: ShardReader,
        kept: Mapping[int, tuple[int, ...]] | None,
    ) -> None:
        self.package = package
        self.manifest = manifest
        dense = Dequantised(reader)
        self.dtype = _dtype(config, reader)
        self.model = StreamedModel(
            config,
            list(dense),
            lambda keys: {key: dense[key] for key in keys},
            dtype=self.dtype,
            experts_dtype=self.dtype,
            device=torch.device("cpu"),
        )
        self._check_layers()
        self.experts = {layer: module for layer, (_, module) in self.model.experts.items()}
        self.decided: Decided = decide(manifest, config, self.experts, kept)
        check_slots(manifest, self.experts)
        self._saved = build_meta(self.decided.config, self.dtype)
        self._prototypes = PrototypeReader(package, manifest)
        self._constants = read_constants(
            package / CONSTANTS_FILE,
            SlotMap.of_manifest(manifest),
            config.get_text_config().hidden_size,
        )

    def _check_layers(self) -> None:
        described = {layer: len(row) for layer, row in self.manifest.slots.items()}
        found = {
            layer: getattr(module, part_names(module)[0]).shape[0]
            for layer, (_, module) in self.model.experts.items()
        }
        if described != found:
            raise CheckpointError(
                f"The package in {self.package} does not match its config.json.",
                "they name different layers or numbers of experts",
                "Make the package again with conmoe-edge fit, or copy it again from where it came from.",
            )

    def estimate(self) -> int:
        """Bytes that will be written, tokenizer and the like apart."""
        tied = set(getattr(self._saved, "all_tied_weights_keys", None) or {})
        return sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in self._saved.state_dict().items()
            if name not in tied
        )

    def write(self, folder: Path, progress: OnProgress) -> int:
        """All files; returns their bytes."""
        layers = len(self.model.layers)
        places: dict[str, str] = {}
        total = 0
        data = 0
        try:
            for number, layer in enumerate((None, *range(layers))):
                progress(Progress("write", number, layers + 1, _shown(layer)))
                tensors = self._outside() if layer is None else self._layer(layer)
                name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
                written = write_tensors(
                    folder / name, [_source(one, tensors[one]) for one in sorted(tensors)]
                )
                places.update(dict.fromkeys(tensors, name))
                total += written.size
                data += sum(t.numel() * t.element_size() for t in tensors.values())
                del tensors
        finally:
            self._prototypes.close()
        index = {"metadata": {"total_size": data}, "weight_map": dict(sorted(places.items()))}
        files = [write_json(folder / INDEX_FILE, index), *copy_side_files(self.package, folder)]
        if is_there(self.package, MODEL_CARD):
            card = read_inside(self.package, MODEL_CARD)
            files.append(write_bytes(folder / MODEL_CARD, card))
        files.append(write_json(folder / CONFIG_FILE, self._config()))
        files.append(write_json(folder / EXPORT_FILE, self._origin()))
        progress(Progress("write", layers + 1, layers + 1, "done"))
        return total + sum(file.size for file in files)

    def _outside(self) -> dict[str, Tensor]:
        """What is outside the decoder layers, a tied head once."""
        self.model.load_outside()
        tied = set(getattr(self.model.model, "all_tied_weights_keys", None) or {})
        inside = f"{self.model.prefix}."
        tensors = {
            name: tensor
            for name, tensor in self.model.model.state_dict().items()
            if not name.startswith(inside) and name not in tied
        }
        saved = saved_names(self._saved, tensors)
        self.model.drop_outside()
        return saved

    def _layer(self, index: int) -> dict[str, Tensor]:
        path = f"{self.model.prefix}.{index}"
        with self.model.layer(index, with_experts=False) as layer:
            tensors = {
                f"{path}.{name}": self._sliced(f"{path}.{name}", tensor, index)
                for name, tensor in layer.state_dict().items()
                if not tensor.is_meta
            }
        if index in self.experts:
            fused = layer_experts(
                self.experts[index],
                self.manifest.slots[index],
                self.decided.kept[index],
                self.decided.width,
                self._prototypes,
                self._constants.get(index),
                self.dtype,
            )
            experts_path = self.model.experts[index][0]
            tensors.update({f"{experts_path}.{name}": part for name, part in fused.items()})
        return saved_names(self._saved, tensors)

    def _sliced(self, name: str, tensor: Tensor, layer: int) -> Tensor:
        """A tensor of the router without the slots that go."""
        axis = self.decided.sliced.get(name)
        if axis is None:
            return tensor
        return tensor.index_select(axis, torch.tensor(self.decided.kept[layer]))

    def _config(self) -> dict[str, Any]:
        """The package's own ``config.json``, without its quantization and with the new sizes."""
        raw = read_to_write(self.package, CONFIG_FILE)
        raw.pop("quantization_config", None)
        config = self.decided.config
        text = config.get_text_config()
        place = raw
        if text is not config:
            place = next(
                (
                    v
                    for n, v in raw.items()
                    if isinstance(v, dict) and getattr(config, n, None) is text
                ),
                raw,
            )
        aliases = getattr(type(text), "attribute_map", {})
        for field, value in self.decided.changes.items():
            for alias, real in aliases.items():
                if real == field:
                    place.pop(alias, None)
            place[field] = value
        raw.setdefault("architectures", [type(self._saved).__name__])
        raw["dtype"] = str(self.dtype).removeprefix("torch.")
        raw.pop("torch_dtype", None)
        return raw

    def _origin(self) -> dict[str, Any]:
        return {
            "kind": self.decided.kind,
            "notes": list(self.decided.notes),
            "method": self.manifest.method,
            "rate": self.manifest.rate,
            "prototypes": len(self.manifest.prototypes),
            "receipt": json.loads(json.dumps(self.manifest.receipt)),
            "source": self.manifest.source,
            "tool_version": self.manifest.tool_version,
        }


def _dtype(config: PretrainedConfig, reader: ShardReader) -> torch.dtype:
    """The config's number format; that of the largest floating-point tensor where it names none."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    if isinstance(dtype, torch.dtype):
        return dtype
    floating = [one for one in reader.values() if one.dtype.is_floating_point]
    return max(floating, key=lambda one: one.nbytes).dtype if floating else torch.bfloat16


def _source(name: str, tensor: Tensor) -> TensorSource:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSource(name, dtype, tuple(tensor.shape), lambda: tensor)


def _shown(layer: int | None) -> str:
    return "embeddings and head" if layer is None else f"layer {layer + 1}"
