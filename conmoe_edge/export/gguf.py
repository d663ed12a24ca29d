"""Write a package as a GGUF file, for llama.cpp and what is built on it, one decoder layer at a time.

The tensors are those of the plain checkpoint (``plain_tensors.py``), under llama.cpp's names and in its shapes
(``llama/``). A package with fewer neurons in its experts becomes a smaller file that llama.cpp loads as it is. The file
appears under its name when it is whole and on the disk.

Peak memory: as of ``plain_tensors.py``, and one tensor in the format of the file. Raises ``UnsupportedModel`` for what
llama.cpp would compute otherwise, ``CalibrationError`` for a package without a tokenizer, ``PackageError`` for a
damaged package, ``NoSpace``, ``OutputExists``.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

from conmoe_edge.checkpoint.fs.atomic_files import finish, temporary_name
from conmoe_edge.checkpoint.fs.disk import disk_errors, require_space
from conmoe_edge.checkpoint.package.opened_package import OpenedPackage, open_package
from conmoe_edge.compress.run.job import Progress
from conmoe_edge.errors import OutputExists, UsageError
from conmoe_edge.export.hf import Exported, OnProgress, shown
from conmoe_edge.export.llama.architectures import architecture_of
from conmoe_edge.export.llama.gguf_file import (
    FLOATS,
    GgufTensors,
    describe,
    file_type,
    open_writer,
    write_portion,
)
from conmoe_edge.export.llama.vocabulary import vocabulary_of
from conmoe_edge.export.plain_tensors import PlainTensors, open_plain
from conmoe_edge.model.generation_file import read_generation
from conmoe_edge.model.tokenizers import load_tokenizer

OUTTYPES = ("auto", *FLOATS)


def export_gguf(
    package: Path,
    out: Path,
    *,
    outtype: str = "auto",
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> Exported:
    """Write the package in ``package`` as the GGUF file ``out``.

    Args:
        package: a folder that ``fit`` wrote.
        out: the file.
        outtype: number format of matrices, one of ``OUTTYPES``; ``auto`` is the model's own.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, where it is not found out.
        overwrite: replace an existing file.
        progress: called after every layer.
    """
    tell = progress or (lambda step: None)
    _check_target(out, overwrite)
    opened = open_package(package)
    with open_plain(opened) as plain, disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_name(out) as part:
            notes = _write(opened, plain, part, _dtype(outtype, plain), pre_tokenizer, tell)
            finish(part, out)
        decided = plain.decided
    experts = len(next(iter(decided.kept.values())))
    return Exported(
        out,
        decided.kind,
        experts,
        decided.width,
        out.stat().st_size,
        (*decided.notes, *notes),
    )


def _check_target(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise UsageError(f"{out} is a folder.", "GGUF is one file", f"{out}/model.gguf, say")
    if out.exists() and not overwrite:
        raise OutputExists(
            f"{out} exists already.", "", "--overwrite to replace it, or another name"
        )


def _dtype(outtype: str, plain: PlainTensors) -> torch.dtype:
    if outtype != "auto":
        return FLOATS[outtype]
    return plain.dtype if plain.dtype in FLOATS.values() else torch.float32


def _write(
    opened: OpenedPackage,
    plain: PlainTensors,
    part: Path,
    dtype: torch.dtype,
    pre_tokenizer: str | None,
    tell: OnProgress,
) -> list[str]:
    """The whole file; returns notes."""
    config = plain.decided.config
    architecture = architecture_of(config)
    size = config.vocab_size
    ends = read_generation(opened.folder, size).eos_token_id
    end = ends[0] if isinstance(ends, list) and ends else ends
    vocabulary = vocabulary_of(
        load_tokenizer(opened.folder), size, end if isinstance(end, int) else None, pre_tokenizer
    )
    tensors = GgufTensors(architecture, config, dtype)
    writer = open_writer(part, architecture)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(str(opened.manifest.source.get("name") or opened.folder.name))
        writer.add_file_type(file_type(dtype))
        notes = architecture.add_fields(writer, config)
        vocabulary.add_to(writer)
        nbytes = describe(writer, tensors, (portion for _, portion in plain.described()))
        require_space(part, nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        layers = plain.layers
        tell(Progress("write", 0, layers + 1, shown(None)))
        for number, (_, portion) in enumerate(plain.portions(), start=1):
            write_portion(writer, tensors, portion)
            portion.clear()
            if number <= layers:
                tell(Progress("write", number, layers + 1, shown(number - 1)))
    finally:
        writer.close()
    tell(Progress("write", layers + 1, layers + 1, "done"))
    return notes
