"""Write a package as a GGUF file, for llama.cpp and what is built on it, one decoder layer at a time.

The tensors are those of the plain checkpoint (``plain_tensors.py``), under llama.cpp's names and in its shapes
(``llama/``). A package with fewer neurons in its experts becomes a smaller file that llama.cpp loads as it is. The file
appears under its name when it is whole and on the disk.

Quantised files are made by llama.cpp's library from a whole file that stands beside meanwhile, with an importance
matrix that is measured while that one is written (``llama/importance.py``).

Peak memory: as of ``plain_tensors.py``, and one tensor in the format of the file. Raises ``UnsupportedModel`` for what
llama.cpp would compute otherwise, ``CalibrationError`` for a package without a tokenizer, ``PackageError`` for a
damaged package, ``NoSpace``, ``OutputExists``.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch

from conmoe_edge.checkpoint.format.manifest import UNCHANGED
from conmoe_edge.checkpoint.fs.atomic_files import finish, temporary_name
from conmoe_edge.checkpoint.fs.disk import disk_errors, require_space
from conmoe_edge.checkpoint.package.opened_package import OpenedPackage, open_package
from conmoe_edge.compress.run.job import Progress
from conmoe_edge.compress.stream.calibration_text import CalibrationText, TokenSet, token_sets
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
from conmoe_edge.export.llama.importance import Importance, ImportancePass
from conmoe_edge.export.llama.quantise import find_llama, quantise, types_in
from conmoe_edge.export.llama.vocabulary import vocabulary_of
from conmoe_edge.export.plain_tensors import PlainTensors, open_plain
from conmoe_edge.model.generation_file import read_generation
from conmoe_edge.model.tokenizers import load_tokenizer
from conmoe_edge.plan.request import SEQUENCE_LENGTH
from conmoe_edge.units import human_size

OUTTYPES = ("auto", *FLOATS)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a file is quantised.

    Attributes:
        kind: one of ``plan.gguf_types.FILE_TYPES``.
        text: what the importance matrix is measured on; ``None`` for no matrix.
        tokens: how many tokens of it.
        python: the Python that has llama-cpp-python; by default this one.
    """

    kind: str
    text: CalibrationText | None = None
    tokens: int = 16384
    python: Path | None = None


def export_gguf(
    package: Path,
    out: Path,
    *,
    outtype: str = "auto",
    quantisation: Quantisation | None = None,
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> Exported:
    """Write the package in ``package`` as the GGUF file ``out``.

    Args:
        package: a folder that ``fit`` wrote.
        out: the file.
        outtype: number format of matrices, one of ``OUTTYPES``; ``auto`` is the model's own. Of a quantised file, that
            which is quantised.
        quantisation: how the file is quantised; by default it is not.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, where it is not found out.
        overwrite: replace an existing file.
        progress: called after every layer.
    """
    tell = progress or (lambda step: None)
    _check_target(out, overwrite)
    opened = open_package(package)
    with open_plain(opened) as plain, disk_errors(out):
        export = _Export(opened, plain, _dtype(outtype, plain), pre_tokenizer, tell)
        # Nobody is sent after llama.cpp's library for a package that cannot be written at all.
        python = None if quantisation is None else find_llama(quantisation.python)
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_name(out) as part:
            if quantisation is None or python is None:
                export.write(part)
            else:
                _quantised(export, quantisation, python, part)
            finish(part, out)
        decided, notes = plain.decided, export.notes
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


class _Export:
    """One export: the file in a floating-point format, and notes on it."""

    def __init__(
        self,
        opened: OpenedPackage,
        plain: PlainTensors,
        dtype: torch.dtype,
        pre_tokenizer: str | None,
        tell: OnProgress,
    ) -> None:
        config = plain.decided.config
        self.plain, self.tell = plain, tell
        self.notes: list[str] = []
        self._name = str(opened.manifest.source.get("name") or opened.folder.name)
        self._dtype = dtype
        plain_already = opened.manifest.method == UNCHANGED
        self._architecture = architecture_of(config, plain=plain_already)
        self._tensors = GgufTensors(self._architecture, config, dtype)
        size = config.vocab_size
        ends = read_generation(opened.folder, size).eos_token_id
        end = ends[0] if isinstance(ends, list) and ends else ends
        self.tokenizer = load_tokenizer(opened.folder)
        self._vocabulary = vocabulary_of(
            self.tokenizer, size, end if isinstance(end, int) else None, pre_tokenizer
        )

    def write(self, path: Path, tokens: TokenSet | None = None) -> Importance:
        """The whole file; with ``tokens`` the importance of its matrices, measured on them."""
        writer = open_writer(path, self._architecture)
        try:
            writer.add_type(gguf.GGUFType.MODEL)
            writer.add_name(self._name)
            writer.add_file_type(file_type(self._dtype))
            self.notes += self._architecture.add_fields(writer, self.plain.decided.config)
            self._vocabulary.add_to(writer)
            if self._vocabulary.inexact:
                self.notes.append(
                    f"llama.cpp cuts some texts otherwise than this tokenizer: {self._vocabulary.inexact}. So it does "
                    "with every file of such a model."
                )
            described = (portion for _, portion in self.plain.described())
            require_space(path, describe(writer, self._tensors, described))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            return self._write_data(writer, tokens)
        finally:
            writer.close()

    def _write_data(self, writer: gguf.GGUFWriter, tokens: TokenSet | None) -> Importance:
        layers, tell = self.plain.layers, self.tell
        measured = None
        if tokens is not None:
            measured = ImportancePass(self.plain, tokens, self._tensors.name_of)
        tell(Progress("write", 0, layers + 1, shown(None)))
        for number, (layer, portion) in enumerate(self.plain.portions(), start=1):
            write_portion(writer, self._tensors, portion)
            if measured is not None:
                measured.take(layer, portion)
            portion.clear()
            if number <= layers:
                tell(Progress("write", number, layers + 1, shown(number - 1)))
        tell(Progress("write", layers + 1, layers + 1, "done"))
        return {} if measured is None else measured.found


def _quantised(export: _Export, asked: Quantisation, python: Path, part: Path) -> None:
    """Write ``part`` by way of a file in a floating-point format."""
    tokens = None
    if asked.text is not None:
        length = min(SEQUENCE_LENGTH, export.plain.decided.config.max_position_embeddings)
        tokens, _ = token_sets(
            asked.text,
            export.tokenizer,
            length=length,
            tokens=asked.tokens,
            held_out_tokens=length,
        )
    with tempfile.TemporaryDirectory(prefix=f".{part.name}.", dir=part.parent) as work:
        wide = Path(work) / "wide.gguf"
        importance = export.write(wide, tokens)
        export.tell(Progress("quantise", 0, 1, asked.kind))
        threads = torch.get_num_threads()
        quantise(wide, part, asked.kind, importance, python=python, threads=threads)
        export.tell(Progress("quantise", 1, 1, asked.kind))
    sizes = ", ".join(f"{kind} {human_size(size)}" for kind, size in types_in(part).items())
    export.notes.append(f"{asked.kind} as llama.cpp makes it of these shapes: {sizes}.")
    if tokens is not None:
        export.notes.append(f"Columns are weighed as they were measured on {tokens.tokens} tokens.")
