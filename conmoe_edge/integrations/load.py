"""Open a package as a transformers model; ``conmoe_edge.load`` calls this.

In: a folder that ``fit`` wrote. Out: a model whose ``generate`` works, with its runtime as ``model.conmoe``. Opens no
socket. Peak memory: the dense weights, the cache slots and the plan's other terms.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from conmoe_edge.checkpoint.format.manifest import UNCHANGED
from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.errors import ConmoeError, OutOfMemory, PackageError
from conmoe_edge.integrations.attach import attach_unchanged
from conmoe_edge.integrations.load_options import LoadOptions, loading
from conmoe_edge.integrations.small_files import read_small_files
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.accelerator import device_named
from conmoe_edge.model.text_part import text_class
from conmoe_edge.offload.compute.miss_split import check_misses
from conmoe_edge.offload.generation.sequence import is_out_of_memory
from conmoe_edge.offload.residency.policies import check_policy
from conmoe_edge.plan.kv_precision import check_kv_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AGAIN = "Make the package again with conmoe-edge fit, or copy it again from where it came from."


def load_package(
    path: Path | str,
    *,
    budget: Budget | None = None,
    device: str | None = None,
    context: int | None = None,
    dtype: torch.dtype | str | None = None,
    slots: tuple[int, ...] | None = None,
    cache_policy: str | None = None,
    misses: str = "copy",
    beside: Callable[[int, int], int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    kv_precision: str | None = None,
) -> PreTrainedModel:
    """Load the package in ``path``.

    Args:
        path: folder of the package.
        budget: what may be used; by default what the package was planned for.
        device: ``cpu``, ``cuda`` or ``cuda:1``, ``hip``, ``mps``, ``xpu``; by default the budget's, else a GPU
            where there is one.
        context: tokens to keep room for; by default what the package was planned for.
        dtype: of the computation; by default the checkpoint's own.
        slots: cache slots of every record layout, instead of what the budget gives.
        cache_policy: ``lru``, ``layer-lru``, ``lfru`` or ``pins``; by default what the package's trace finds best.
        misses: with a GPU, what becomes of prototypes that are not there: ``copy``, or ``auto`` to let the processor
            compute some of them where they lie, which may change a result's last bits.
        beside: bytes that the caller holds beside the model, by the budget's bytes and the tokens of context; they are
            left free on a CPU.
        progress: called with (records read, records to read) while the slots are filled.
        kv_precision: how keys and values are kept, ``source`` or ``int8``; by default what the package says.

    Raises:
        PackageError: the package is damaged.
        DoesNotFit: the budget holds no prototype.
        UsageError: the device is not there, or computes something else than the processor.
        UnsupportedModel: the context cannot be counted with this release of transformers, or the model's cache has no
            form in 8 bits.
    """
    folder = Path(path)
    check_policy(cache_policy)
    check_kv_precision(kv_precision)
    check_misses(misses)
    package = open_package(folder)
    where = _device(device, budget)
    config, generation = read_small_files(package)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    bars, verbosity = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what it would report is looked at below
    try:
        options = LoadOptions(
            budget=budget,
            context=context,
            slots=slots,
            cache_policy=cache_policy,
            misses=misses,
            beside=beside,
            progress=progress,
            package=package,
            kv_precision=kv_precision,
        )
        with loading(options) as whereabouts:
            try:
                loader: Any = text_class(config) or AutoModelForCausalLM
                loaded: Any = loader.from_pretrained(
                    str(folder),
                    config=config,
                    generation_config=generation,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    dtype=dtype or "auto",
                    device_map={"": where} if where.type != "cpu" else None,
                    output_loading_info=True,
                )
            except Exception as error:
                if isinstance(error, ConmoeError) or whereabouts.in_own_code:
                    raise
                raise _not_loaded(folder, error) from error
            model, info = loaded
            _check_complete(info, folder)
            if package.manifest.method == UNCHANGED:
                attach_unchanged(model, folder, package.manifest, where)
    except (SafetensorError, OSError) as error:
        raise PackageError(
            f"The dense weights in {folder} cannot be read.", str(error).strip()[:200], _AGAIN
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    return model


def _device(device: str | None, budget: Budget | None) -> torch.device:
    word = device or (budget.device if budget is not None else None)
    if word is None:
        word = "cuda" if torch.cuda.is_available() else "cpu"
    return device_named(word)


def _not_loaded(folder: Path, error: Exception) -> ConmoeError:
    """What is said of an exception in transformers: sizes that contradict each other fail anywhere inside of it."""
    reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
    if is_out_of_memory(error):
        return OutOfMemory(
            f"The dense weights in {folder} do not fit into the memory that is free.",
            reason,
            "Close other programs, or make a package for a smaller --gpu.",
        )
    return PackageError(f"transformers cannot load the package in {folder}.", reason, _AGAIN)


def _check_complete(info: dict[str, Any], folder: Path) -> None:
    """Every dense weight came from the package, in its shape."""
    for name in sorted(info["missing_keys"]):
        raise PackageError(f"{folder} is incomplete.", f"it has no weights for {name}", _AGAIN)
    for name, *_ in sorted(info["mismatched_keys"]):
        raise PackageError(
            f"{folder} does not match its config.json.", f"{name} has another shape", _AGAIN
        )
