"""``config.json`` and ``generation_config.json`` of a package, before transformers builds anything from them.

Peak memory: the model on the meta device.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from conmoe_edge.checkpoint.format.manifest import UNCHANGED
from conmoe_edge.checkpoint.package.opened_package import OpenedPackage
from conmoe_edge.errors import CheckpointError, PackageError, UsageError
from conmoe_edge.integrations.register import QUANT_METHOD
from conmoe_edge.model.bridge import quantization_of, read_config, without_quantization
from conmoe_edge.model.generation_file import read_generation
from conmoe_edge.model.probe import check_model, count_in, facts_of
from conmoe_edge.model.record_match import AGAIN, mismatch
from conmoe_edge.model.size_bounds import bounds_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig


def read_small_files(package: OpenedPackage) -> tuple[PretrainedConfig, GenerationConfig]:
    """The two configs of a package.

    Raises:
        PackageError: one of them is damaged, or is not that of the weights.
        UnsupportedModel: nothing can be built from it here.
    """
    folder, index, manifest = package.folder, package.index, package.manifest
    try:
        config = read_config(folder, bounds_of(index, manifest))
        generation = read_generation(folder, count_in(config.get_text_config(), "vocab_size"))
        facts = facts_of(index.tensors)
    except CheckpointError as error:
        raise PackageError(error.what, error.why, AGAIN) from error
    packed = manifest.method != UNCHANGED
    method = quantization_of(config)
    if method != (QUANT_METHOD if packed else None):
        says = "none" if method is None else repr(method[:60])
        raise mismatch(folder, f"the config's quant_method is {says}")
    try:
        check_model(without_quantization(config), facts, whole=not packed)
    except CheckpointError as error:
        why = ": ".join(filter(None, (error.what.rstrip("."), error.why)))
        raise mismatch(folder, why) from error
    return config, generation


def check_foreign_config(config: Any, package: OpenedPackage | None) -> None:
    """Look at a config that transformers has read itself, from ``package`` where that is known.

    Raises:
        UsageError: it names a kernel on the hub.
        CheckpointError: the package's ``config.json`` is damaged, or names impossible sizes.
    """
    for one in {id(c): c for c in (config, config.get_text_config())}.values():
        for field in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(getattr(one, field, None) or ""):
                raise UsageError(
                    "A package runs with no kernel from the hub.",
                    f"{field} is {str(getattr(one, field))[:60]!r}",
                    "attn_implementation='sdpa', and remove the name from config.json",
                )
    folder = str(getattr(config, "name_or_path", "") or "")
    if folder and (Path(folder) / "config.json").is_file():
        read_config(folder, None if package is None else bounds_of(package.index, package.manifest))
