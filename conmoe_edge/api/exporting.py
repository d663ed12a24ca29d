"""``export``: a package as a plain checkpoint, or as GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from conmoe_edge.errors import UsageError

if TYPE_CHECKING:
    from conmoe_edge.compress.run.job import OnProgress
    from conmoe_edge.export.hf import Exported


def export(
    package: str | Path,
    out: str | Path,
    *,
    form: str = "hf",
    outtype: str = "auto",
    quantise: str | None = None,
    imatrix: bool = True,
    calibration: str | Path | None = None,
    calibration_tokens: int = 16384,
    llama_python: str | Path | None = None,
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> Exported:
    """Write a package as a plain checkpoint, or as GGUF.

    Args:
        package: folder that ``fit`` wrote.
        out: the folder (``hf``) or file (``gguf``) to write; whole or absent at any moment.
        form: ``hf`` or ``gguf``.
        outtype: of a GGUF file, the number format of matrices: ``auto`` (the model's own), ``f32``, ``f16``, ``bf16``.
        quantise: of a GGUF file, one of llama.cpp's types (``Q4_K_M`` and the like).
        imatrix: weigh columns as they are measured on ``calibration_tokens`` tokens of ``calibration``, a UTF-8 file
            (by default the text that comes with the package).
        llama_python: the Python that has llama-cpp-python; by default this one.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, where it is not found out.
        overwrite: replace what an earlier export wrote.
        progress: called after every layer.

    Raises:
        UnsupportedModel: a plain checkpoint of this model cannot say what the package says, or llama.cpp would compute
            the model otherwise.
        PackageError, OutputExists, NoSpace, UsageError: as their names say.
    """
    if form == "hf":
        from conmoe_edge.export.hf import export_hf

        return export_hf(Path(package), Path(out), overwrite=overwrite, progress=progress)
    if form != "gguf":
        raise UsageError(f"{form!r} is no format.", "there are: hf, gguf", "--format hf")
    from conmoe_edge.compress.stream.calibration_text import bundled_text, read_text
    from conmoe_edge.export.gguf import Quantisation, export_gguf

    text = None
    if quantise is not None and imatrix:
        text = bundled_text() if calibration is None else read_text(Path(calibration))
    python = None if llama_python is None else Path(llama_python)
    quantisation = (
        None if quantise is None else Quantisation(quantise, text, calibration_tokens, python)
    )

    return export_gguf(
        Path(package),
        Path(out),
        outtype=outtype,
        quantisation=quantisation,
        pre_tokenizer=pre_tokenizer,
        overwrite=overwrite,
        progress=progress,
    )
