"""Write a package as a plain checkpoint, one decoder layer at a time.

The tensors have the names that ``save_pretrained`` gives (``plain_tensors.py``), so whatever reads this model's
checkpoints reads this one. The folder is whole or absent. Peak memory: as of ``plain_tensors.py``.

Raises ``UnsupportedModel`` for what a plain checkpoint cannot say, ``PackageError`` for a damaged package, ``NoSpace``,
``OutputExists``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import UNCHANGED, Manifest
from conmoe_edge.checkpoint.fs.atomic_files import write_bytes, write_json
from conmoe_edge.checkpoint.fs.contained import is_there, read_inside
from conmoe_edge.checkpoint.fs.disk import require_space
from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.checkpoint.package.sidefiles import MODEL_CARD, copy_side_files
from conmoe_edge.checkpoint.package.staged import StagedFolder
from conmoe_edge.checkpoint.tensors.tensor_index import (
    CONFIG_FILE,
    INDEX_FILE,
)
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.checkpoint.tensors.tensor_writer import TensorSource, write_tensors
from conmoe_edge.compress.run.job import Progress
from conmoe_edge.errors import OutputExists, UnsupportedModel
from conmoe_edge.export.beside_text import tensors_beside
from conmoe_edge.export.llama.architectures import ARCHITECTURES
from conmoe_edge.export.plain_tensors import PlainTensors, open_plain, plain_config
from conmoe_edge.model.config_json import read_to_write

_BESIDE = "model-beside-text.safetensors"
"""The parts for pictures and sound."""
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
            _as_it_is(package),
        )
    beside = tensors_beside(opened, plain_config(package))
    with open_plain(opened, kept) as plain, ShardReader(opened.index) as reader:
        run = _Export(package, manifest, plain, [TensorSource.of(reader[name]) for name in beside])
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
        decided = plain.decided
    experts = len(next(iter(decided.kept.values())))
    return Exported(out, decided.kind, experts, decided.width, nbytes, decided.notes)


def _as_it_is(package: Path) -> str:
    """What to do with the package of a model that was not changed."""
    if plain_config(package).model_type not in ARCHITECTURES:
        return "use the folder as it is"
    return f"use it as it is; for GGUF: conmoe-edge export {package} FILE.gguf --format gguf"


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


class _Export:
    """One export: the files of the folder."""

    def __init__(
        self,
        package: Path,
        manifest: Manifest,
        plain: PlainTensors,
        beside: Sequence[TensorSource],
    ) -> None:
        self.package = package
        self.manifest = manifest
        self.plain = plain
        self.beside = beside

    def estimate(self) -> int:
        """Bytes that will be written, tokenizer and the like apart."""
        text = sum(
            tensor.numel() * tensor.element_size()
            for _, tensors in self.plain.described()
            for tensor in tensors.values()
        )
        return text + sum(source.nbytes for source in self.beside)

    def write(self, folder: Path, progress: OnProgress) -> int:
        """All files; returns their bytes."""
        layers = self.plain.layers
        places: dict[str, str] = {}
        total = 0
        data = 0
        progress(Progress("write", 0, layers + 1, shown(None)))
        for number, (_, tensors) in enumerate(self.plain.portions(), start=1):
            name = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
            written = write_tensors(
                folder / name, [_source(one, tensors[one]) for one in sorted(tensors)]
            )
            places.update(dict.fromkeys(tensors, name))
            total += written.size
            data += sum(t.numel() * t.element_size() for t in tensors.values())
            tensors.clear()
            if number <= layers:
                progress(Progress("write", number, layers + 1, shown(number - 1)))
        if self.beside:
            written = write_tensors(folder / _BESIDE, self.beside)
            places.update(dict.fromkeys((source.name for source in self.beside), _BESIDE))
            total += written.size
            data += sum(source.nbytes for source in self.beside)
        index = {"metadata": {"total_size": data}, "weight_map": dict(sorted(places.items()))}
        files = [write_json(folder / INDEX_FILE, index), *copy_side_files(self.package, folder)]
        if is_there(self.package, MODEL_CARD):
            card = read_inside(self.package, MODEL_CARD)
            files.append(write_bytes(folder / MODEL_CARD, card))
        files.append(write_json(folder / CONFIG_FILE, self._config()))
        files.append(write_json(folder / EXPORT_FILE, self._origin()))
        progress(Progress("write", layers + 1, layers + 1, "done"))
        return total + sum(file.size for file in files)

    def _config(self) -> dict[str, Any]:
        """The package's own ``config.json``, without its quantization and with the new sizes."""
        raw = read_to_write(self.package, CONFIG_FILE)
        raw.pop("quantization_config", None)
        config = self.plain.decided.config
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
        for field, value in self.plain.decided.changes.items():
            for alias, real in aliases.items():
                if real == field:
                    place.pop(alias, None)
            place[field] = value
        raw.setdefault("architectures", [type(self.plain.saved).__name__])
        raw["dtype"] = str(self.plain.dtype).removeprefix("torch.")
        raw.pop("torch_dtype", None)
        return raw

    def _origin(self) -> dict[str, Any]:
        return {
            "kind": self.plain.decided.kind,
            "notes": list(self.plain.decided.notes),
            "method": self.manifest.method,
            "rate": self.manifest.rate,
            "prototypes": len(self.manifest.prototypes),
            "receipt": json.loads(json.dumps(self.manifest.receipt)),
            "source": self.manifest.source,
            "tool_version": self.manifest.tool_version,
        }


def _source(name: str, tensor: Tensor) -> TensorSource:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSource(name, dtype, tuple(tensor.shape), lambda: tensor)


def shown(layer: int | None) -> str:
    """What is being written, for people."""
    return "embeddings and head" if layer is None else f"layer {layer + 1}"
