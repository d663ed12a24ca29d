"""The package that transformers is about to load, checked at each step at which transformers says more about it.

``AutoModelForCausalLM.from_pretrained(folder)`` reads ``config.json`` before it calls anything of ours. Then

- ``package_named`` checks the folder that the config came from, before a model is built or a weights file is looked for
- ``name_dtype`` sees to it that transformers opens no weights file to find out their number format
- ``package_loaded`` compares the files that transformers has chosen with those of the package's index

so that arguments which lead to other files (``subfolder``, ``variant``, another folder than the config's) are refused
and no pickle is opened. Peak memory: that of ``open_package``. Raises ``PackageError``, ``UsageError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conmoe_edge.checkpoint.format.manifest import MANIFEST_NAME
from conmoe_edge.checkpoint.fs.contained import is_there
from conmoe_edge.checkpoint.package.opened_package import OpenedPackage, open_package
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.errors import PackageError, UsageError
from conmoe_edge.integrations.load_options import current_options


class Unnamed:
    """Stands for a number format that nobody has named; transformers only hands it on."""


UNNAMED = Unnamed()


def package_named(config: Any) -> OpenedPackage | None:
    """The package in the folder that ``config`` was read from; ``None`` where it does not say, or holds none."""
    name = getattr(config, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    folder = Path(name)
    if not folder.is_dir() or not is_there(folder, MANIFEST_NAME):
        return None
    return _opened(folder)


def name_dtype(config: Any, package: OpenedPackage | None) -> None:
    """Give a config without a number format that of the package's weights, or ``UNNAMED``."""
    if getattr(config, "dtype", None) is None:
        config.dtype = UNNAMED if package is None else _dtype(package.index)


def check_dtype(dtype: Any) -> None:
    """Refuse a load whose number format only the weights could say.

    Raises:
        UsageError: it is ``UNNAMED``.
    """
    if isinstance(dtype, Unnamed):
        raise UsageError(
            "The number format of the package is not known.",
            "its config.json names none, and the package was not opened by its folder",
            "dtype='bfloat16', say, or AutoModelForCausalLM.from_pretrained(FOLDER)",
        )


def package_loaded(name: str, files: Sequence[str], known: OpenedPackage | None) -> OpenedPackage:
    """The package whose weights are ``files``.

    Args:
        name: what ``from_pretrained`` was given, a folder or an id on the hub.
        files: the weights that transformers is going to read.
        known: a package that was opened already, and is the same where it lies in the same folder.

    Raises:
        PackageError: it is damaged, or ``files`` are not exactly its own.
    """
    if not files:
        raise PackageError(
            "The package has no dense weights.",
            "model.safetensors.index.json names none",
            "Make the package again with conmoe-edge fit, or copy it again from where it came from.",
        )
    folder = Path(name) if name and Path(name).is_dir() else Path(files[0]).parent
    package = known if known is not None and known.is_in(folder) else _opened(folder)
    wanted = sorted(_place(folder / file) for file in package.index.files)
    found = sorted(_place(Path(file)) for file in files)
    if wanted != found:
        other = next(one for one in (*found, *wanted) if one not in wanted or one not in found)
        raise PackageError(
            f"transformers was going to read other weights than those of the package in {folder}.",
            f"{other} is not among both",
            f"from_pretrained({str(folder)!r}) without subfolder, variant and gguf_file",
        )
    return package


def _opened(folder: Path) -> OpenedPackage:
    """The package of the running ``load``, where it is this one."""
    known = current_options().package
    return known if known is not None and known.is_in(folder) else open_package(folder)


def _place(path: Path) -> str:
    """A file's folder, links followed, and its own name in there."""
    return str(path.parent.resolve() / path.name)


def _dtype(index: CheckpointIndex) -> str:
    """Of the largest floating-point tensor."""
    floating = [one for one in index.tensors.values() if "float" in one.torch_name]
    if not floating:
        return "float32"
    return max(floating, key=lambda one: (one.nbytes, one.name)).torch_name
