"""Packages written by hand from tiny models, and the plain checkpoints they are compared with."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from conmoe_edge.checkpoint.format.forms import Kind, Part, bits_of, quantised_parts
from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.manifest import (
    PREDICTOR_FILE,
    UNCHANGED,
    ExpertId,
    LayerOriginal,
    Manifest,
    PrefetchSettings,
    PrototypeEntry,
    SlotRecord,
)
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.checkpoint.format.records import encode, pack
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.package.dense_names import DENSE_SCALE
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, save_manifest
from conmoe_edge.checkpoint.package.slot_constants import CONSTANTS_FILE
from conmoe_edge.checkpoint.tensors.tensor_writer import (
    TensorSource,
    write_dense,
    write_records,
    write_tensors,
)
from conmoe_edge.compress.solvers.neuron_pruning import take_neurons
from conmoe_edge.model.bridge import saved_names
from conmoe_edge.model.experts import find_experts, part_names

Slots = dict[int, tuple[SlotRecord, ...]]
Choose = Callable[[int, int], SlotRecord]


def identity(model: Any) -> Slots:
    """Every router slot keeps its own expert."""
    return slots_of(model, lambda layer, expert: SlotRecord(ExpertId(layer, expert)))


def slots_of(model: Any, choose: Choose) -> Slots:
    """A map by a function of (layer, expert)."""
    return {
        layer: tuple(choose(layer, expert) for expert in range(count_of(module)))
        for layer, (_, module) in find_experts(model).items()
    }


def count_of(module: Any) -> int:
    return getattr(module, part_names(module)[0]).shape[0]


def thirds(model: Any) -> Slots:
    """Slots 0, 1, 2 share prototype 0, slots 3, 4, 5 prototype 3, and so on; within each layer."""
    return slots_of(model, lambda layer, expert: SlotRecord(ExpertId(layer, expert - expert % 3)))


def write_package(
    model: Any,
    folder: Path,
    slots: Slots,
    constants: Mapping[int, torch.Tensor] | None = None,
    weights: Mapping[ExpertId, float] | None = None,
    plan: dict[str, Any] | None = None,
    in_int8: Collection[str] | Mapping[str, Kind] = (),
    hub_names: bool = False,
    widths: Mapping[ExpertId, int] | None = None,
    kind: Kind = "plain",
    prefill_chunk: int | None = None,
) -> Path:
    """Write ``model`` with its experts consolidated by ``slots``, dense weights ``in_int8`` in 8 bits or as said; with
    ``hub_names`` under the names that its checkpoints have, which other engines read. A prototype named in ``widths``
    keeps so many neurons, the first ones. Prototypes are stored as ``kind``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    experts = find_experts(model)
    ids = sorted(
        {slot.prototype for row in slots.values() for slot in row if slot.prototype is not None}
    )
    layouts: list[Any] = []
    layout_of: dict[ExpertId, int] = {}
    tensors: dict[ExpertId, dict[str, torch.Tensor]] = {}
    for one in ids:
        module: Any = experts[one.layer][1]
        tensors[one] = {
            name: getattr(module, name)[one.expert].detach() for name in part_names(module)
        }
        if widths and one in widths:
            tensors[one] = take_neurons(module, tensors[one], torch.arange(widths[one]))
        parts: list[Part] = []
        for n, t in tensors[one].items():
            plain: Part = (n, tuple(t.shape), str(t.dtype).removeprefix("torch."))
            shape = t.shape[::-1] if module.is_transposed else t.shape
            whole = kind == "plain" or t.ndim != 2
            parts += [plain] if whole else quantised_parts(n, *shape, kind)
        layout = make_layout(parts, "source" if kind == "plain" else kind)
        tensors[one] = encode(layout, tensors[one], transposed=bool(module.is_transposed))
        if layout not in layouts:
            layouts.append(layout)
        layout_of[one] = layouts.index(layout)
    names = {one: f"prototypes.{one.layer}.{one.expert}" for one in ids}
    records = write_records(
        folder / "prototypes-00001-of-00001.safetensors",
        {names[one]: layouts[layout_of[one]].nbytes for one in ids},
        ((names[one], pack(layouts[layout_of[one]], tensors[one])) for one in ids),
    )
    fused = {f"{path}.{name}" for path, module in experts.values() for name in part_names(module)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    weights_outside = {
        key: weight
        for key, weight in model.state_dict().items()
        if key not in fused and key not in tied
    }
    if hub_names:
        weights_outside = saved_names(model, weights_outside)
    forms: dict[str, Kind] = dict.fromkeys(in_int8, "int8")
    if isinstance(in_int8, Mapping):
        forms.update({n: one for n, one in in_int8.items() if isinstance(one, str)})
    dense = write_dense(
        folder,
        [
            TensorSource(
                name, str(t.dtype).removeprefix("torch."), tuple(t.shape), lambda t=t: t.detach()
            )
            for key, weight in weights_outside.items()
            for name, t in dense_tensors(key, weight, forms.get(key))
        ],
    )
    files = [records, *dense]
    if constants:
        files.append(
            write_tensors(
                folder / CONSTANTS_FILE,
                [
                    TensorSource(f"constants.{layer}", "float32", tuple(t.shape), lambda t=t: t)
                    for layer, t in sorted(constants.items())
                ],
            )
        )
    total = sum(count_of(module) for _, module in experts.values())
    manifest = Manifest(
        source={"name": "tiny", "revision": None, "fingerprint": "0"},
        method="conmoe",
        rate=1 - len(ids) / total,
        scope=1,
        precision="source" if kind == "plain" else kind,
        dense_precision=min(forms.values(), key=bits_of) if forms else "source",
        layouts=tuple(layouts),
        prototypes=tuple(
            PrototypeEntry(
                one,
                records.name,
                records.offsets[names[one]],
                layout_of[one],
                (weights or {}).get(one, 0.0),
            )
            for one in ids
        ),
        slots=slots,
        files={file.name: file.entry() for file in files},
        plan=plan or {},
        originals=originals_of(model),
        tool_version="0.1.0",
        prefill_chunk=prefill_chunk,
    )
    save_manifest(folder, manifest)
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    config["quantization_config"] = {"quant_method": "conmoe", "format_version": 1}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def write_unchanged(model: Any, folder: Path, plan: dict[str, Any] | None = None) -> Path:
    """Write ``model`` as a package of a model that fits as it is."""
    model.save_pretrained(folder)
    manifest = Manifest(
        source={"name": "tiny", "revision": None, "fingerprint": "0"},
        method=UNCHANGED,
        rate=0.0,
        scope=1,
        precision="source",
        layouts=(),
        prototypes=(),
        slots={},
        files={},
        plan=plan or {},
    )
    save_manifest(folder, manifest)
    return folder


def originals_of(model: Any) -> dict[int, LayerOriginal]:
    """What the experts of ``model`` are; nothing was measured of them."""
    found = {}
    for layer, (_, module) in find_experts(model).items():
        parts = {name: getattr(module, name)[0] for name in part_names(module)}
        neurons = parts["down_proj"].shape[0 if module.is_transposed else 1]
        weights = sum(one.numel() for one in parts.values())
        nbytes = sum(one.nbytes for one in parts.values())
        found[layer] = LayerOriginal(neurons, weights, nbytes)
    return found


def dense_tensors(name: str, weight: Any, kind: Kind | None) -> list[tuple[str, torch.Tensor]]:
    """What a package stores of a dense weight."""
    if kind is None:
        return [(name, weight)]
    matrix = quantise(weight.detach(), kind)
    assert matrix.scales is not None
    return [(name, matrix.values), (name + DENSE_SCALE, matrix.scales)]


def materialise(model: Any, slots: Slots) -> Any:
    """Fill every router slot of ``model`` with its prototype's weights, in place, for plain
    transformers to run.
    """
    experts = find_experts(model)
    with torch.no_grad():
        originals = {
            layer: {name: getattr(module, name).clone() for name in part_names(module)}
            for layer, (_, module) in experts.items()
        }
        for layer, row in slots.items():
            module = experts[layer][1]
            for expert, slot in enumerate(row):
                assert slot.prototype is not None
                for name in part_names(module):
                    getattr(module, name)[expert] = originals[slot.prototype.layer][name][
                        slot.prototype.expert
                    ]
    return model


def predict(folder: Path, depth: int, share: float, hidden: int = 32) -> Manifest:
    """Give a package a predictor with random maps."""
    manifest = load_manifest(folder)
    generator = torch.Generator().manual_seed(0)
    maps = {
        f"predictor.{layer}": torch.randn(
            hidden + 1, len(one.prototypes), generator=generator
        ).bfloat16()
        for layer, one in list(SlotMap.of_manifest(manifest).items())[1:]
    }
    sources = [
        TensorSource(name, "bfloat16", tuple(t.shape), lambda t=t: t) for name, t in maps.items()
    ]
    written = write_tensors(folder / PREDICTOR_FILE, sources)
    settings = PrefetchSettings(depth, 3, share, 0.1, {})
    manifest = replace(
        manifest, prefetch=settings, files={**manifest.files, written.name: written.entry()}
    )
    save_manifest(folder, manifest)
    return manifest
