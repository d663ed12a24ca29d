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
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> Exported:
    """Write a package as a plain checkpoint, or as GGUF.

    Args:
        package: folder that ``fit`` wrote.
        out: the folder (``hf``) or file (``gguf``) to write; whole or absent at any moment.
        form: ``hf`` or ``gguf``.
        outtype, pre_tokenizer: for ``gguf``: the number format of matrices (``auto``, ``f32``, ``f16``, ``bf16``), and
            llama.cpp's name of the pre-tokenizer where it is not found out.
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
    from conmoe_edge.export.gguf import export_gguf

    return export_gguf(
        Path(package),
        Path(out),
        outtype=outtype,
        pre_tokenizer=pre_tokenizer,
        overwrite=overwrite,
        progress=progress,
    )
