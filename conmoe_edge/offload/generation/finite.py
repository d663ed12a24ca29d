"""What a model says must be numbers: logits that are NaN or infinite are an error that names layer and tensor.

NaN goes through every layer unseen and ends as a likeliest token like any other, often as an end mark: an answer of
nothing. ``guard_output`` looks at the logits of every forward of a loaded package, whoever asks for it: chat, server,
``generate``, lm-eval. That is one sum over the vocabulary a step.

Where one is found, the same tokens go through the layers again, each of which is looked at, and then the tensors of the
first one that gives something else than numbers. Nothing of that is done, or kept, while all is well.

Memory: nothing; afterwards one record at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.manifest import CONSTANTS_FILE, Manifest
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.package.slot_constants import read_constants
from conmoe_edge.checkpoint.package.verify_values import NOT_NUMBERS, broken_record
from conmoe_edge.errors import ConmoeError, NotFinite, PackageError
from conmoe_edge.model.all_finite import all_finite
from conmoe_edge.model.experts import find_decoder


@dataclass(frozen=True, slots=True)
class _Package:
    folder: Path
    manifest: Manifest


def guard_output(model: nn.Module, folder: Path, manifest: Manifest) -> None:
    """Look at the logits of every forward of a loaded package.

    The forward raises ``NotFinite`` then.
    """
    package = _Package(folder, manifest)

    def check(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or not logits.numel():
            return
        if kwargs.get("attention_mask") is not None and logits.dim() > 1:
            logits = logits[:, -1]  # rows of padding may hold anything
        if not all_finite(logits):
            why = _culprit(module, package, args, kwargs)
            whole = NOT_NUMBERS not in why and not _broken_setting(module)
            if logits.dtype == torch.float16 and whole:
                raise NotFinite(
                    "The model's numbers leave the range of float16, which ends at 65504.",
                    why,
                    f"compute in float32: AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='float32') "
                    "after import conmoe_edge",
                )
            raise NotFinite(
                "The model computes NaN or infinity instead of an answer.",
                why,
                f"Look for what else is damaged: conmoe-edge inspect {folder} --verify. Then make the package again, "
                "or copy it again from where it came from.",
            )

    model.register_forward_hook(check, with_kwargs=True)


def _culprit(
    model: nn.Module, package: _Package, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    """Layer and tensor, as far as they can be found."""
    setting = _broken_setting(model)
    if setting:
        return setting
    decoder = find_decoder(model)
    if decoder is None:
        return _broken_tensor(model, "") or "all of its weights are numbers"
    layers = model.get_submodule(decoder.prefix)
    assert isinstance(layers, nn.ModuleList), "a decoder is a list of layers"
    first = _first_layer(model, layers, args, kwargs)
    if first is None:
        return _broken_tensor(model, "") or "not a second time: the memory of this machine may fail"
    if not 0 <= first < len(layers):
        where = "what is before the layers" if first < 0 else "what is behind the layers"
        inside = f"{decoder.prefix}."
        return f"{where}: {_broken_tensor(model, '', inside) or _largest(model, '', inside)}"
    prefix = f"{decoder.prefix}.{first}"
    found = _broken_tensor(layers[first], prefix)
    if not found and first in package.manifest.slots:
        found = _broken_experts(package, first)
    return f"decoder layer {first}: {found or _largest(layers[first], prefix)}"


def _broken_setting(model: Any) -> str:
    """A number of the config that is none."""
    for name, value in model.config.to_dict().items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} in config.json is {value}"
    return ""


def _first_layer(
    model: nn.Module, layers: nn.ModuleList, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int | None:
    """The first layer that gives something else than numbers for the same arguments; -1 where it is given such, the
    number of layers where none does and the model all the same, ``None`` where all is well this time.
    """
    wrong: list[int] = []

    def enters(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = given[0] if given else named.get("hidden_states")
        if isinstance(hidden, Tensor) and not all_finite(hidden):
            wrong.append(-1)

    def leaves(index: int) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and not all_finite(hidden):
                wrong.append(index)

        return hook

    hooks = [layers[0].register_forward_pre_hook(enters, with_kwargs=True)]
    hooks += [one.register_forward_hook(leaves(index)) for index, one in enumerate(layers)]
    output = None
    try:
        # Past the hooks of the model itself: the context is not counted again, and this one does not come back here.
        with torch.no_grad(), suppress(RuntimeError, ValueError, ConmoeError):
            output = model.forward(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    if wrong:
        return min(wrong)
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
    return len(layers) if isinstance(logits, Tensor) and not all_finite(logits) else None


def _broken_tensor(module: nn.Module, prefix: str, without: str = "-") -> str:
    for name, tensor in _tensors(module, prefix, without):
        if not all_finite(tensor):
            return f"{name} {NOT_NUMBERS}"
    return ""


def _largest(module: nn.Module, prefix: str, without: str = "-") -> str:
    """Where all weights are numbers, their product was not: what is greatest among them."""
    found = [
        (float(tensor.abs().max()), name)
        for name, tensor in _tensors(module, prefix, without)
        if tensor.numel()
    ]
    if not found:
        return "its weights are numbers, what comes out of them is not"
    size, name = max(found)
    return (
        f"all weights are numbers, the greatest {size:.3g} in {name}; what comes out of them is not"
    )


def _tensors(module: nn.Module, prefix: str, without: str) -> Iterator[tuple[str, Tensor]]:
    dot = f"{prefix}." if prefix else ""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not tensor.is_meta and not name.startswith(without):
            yield dot + name, tensor.detach()


def _broken_experts(package: _Package, layer: int) -> str:
    """What is no number among the constants and the prototypes of a layer."""
    maps = SlotMap.of_manifest(package.manifest)
    try:
        read_constants(package.folder / CONSTANTS_FILE, maps)
    except PackageError as error:
        return error.why
    ids = [package.manifest.prototypes[number].id for number in maps[layer].prototypes]
    try:
        return broken_record(package.folder, package.manifest, ids)
    except PackageError as error:
        return f"{error.what} {error.why}"
