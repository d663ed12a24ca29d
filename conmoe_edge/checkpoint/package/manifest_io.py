"""``conmoe.json`` to and from ``Manifest``, and the check of a whole package. No torch here.

A manifest may come from another machine: every number, name and reference in it is checked
before anything is opened by it (``manifest_schema`` has the shape, this file what must agree with
what). The same manifest always gives the same bytes.

Peak memory: the manifest. Raises ``PackageError`` and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from conmoe_edge.checkpoint.format.finite_json import finite
from conmoe_edge.checkpoint.format.layout import record_alignment
from conmoe_edge.checkpoint.format.manifest import (
    CONSTANTS_FILE,
    FORMAT_VERSION,
    MANIFEST_NAME,
    PREDICTOR_FILE,
    CacheSettings,
    ExpertId,
    LayerOriginal,
    LayerOverview,
    Manifest,
    PrefetchSettings,
    PrototypeEntry,
    RecordLayout,
    RecordPart,
    SlotRecord,
)
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile, write_bytes
from conmoe_edge.checkpoint.fs.contained import is_there, open_inside, read_inside
from conmoe_edge.checkpoint.package.manifest_schema import ManifestJson
from conmoe_edge.checkpoint.tensors.tensor_index import CONFIG_FILE, read_json_object
from conmoe_edge.errors import CheckpointError, PackageError

_MOST_BYTES = 64 << 20
_AGAIN = "Make the package again with conmoe-edge fit, or copy it again from where it came from."


def save_manifest(path: Path, manifest: Manifest) -> WrittenFile:
    """Write the manifest to ``path`` (a file, or the folder that shall hold ``conmoe.json``).

    Raises:
        PackageError: the manifest is not one that ``load_manifest`` would take.
    """
    data = to_json(manifest)
    # What cannot be read back must not be written: a mistake is cheaper here than when the
    # package is run.
    from_json(data)
    return write_bytes(path / MANIFEST_NAME if path.is_dir() else path, data)


def load_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of the package in ``folder``.

    Raises:
        PackageError: no package, another format version, or anything in it that is wrong.
    """
    if not is_there(folder, MANIFEST_NAME):
        raise PackageError(
            f"{folder} is no package of conmoe-edge.",
            f"It has no {MANIFEST_NAME}." if folder.is_dir() else "There is no such folder.",
            f"Make one with: conmoe-edge fit MODEL --out {folder}",
        )
    try:
        data = read_inside(folder, MANIFEST_NAME, _MOST_BYTES)
    except CheckpointError as error:
        raise PackageError(error.what, error.why, _AGAIN) from error
    return from_json(data, str(folder / MANIFEST_NAME))


def to_json(manifest: Manifest) -> bytes:
    """The bytes of ``conmoe.json``: sorted keys, one line for every prototype, file and layer."""
    slots = sorted(manifest.slots.items())
    scales = {
        str(layer): [slot.scale for slot in row]
        for layer, row in slots
        if any(s.scale != 1.0 for s in row)
    }
    constants = {
        str(layer): [slot.constant for slot in row]
        for layer, row in slots
        if any(s.constant is not None for s in row)
    }
    value: dict[str, Any] = {
        "constants": constants,
        "dense_precision": manifest.dense_precision,
        "files": manifest.files,
        "format_version": manifest.format_version,
        "layouts": [
            {
                "nbytes": layout.nbytes,
                "parts": [
                    {
                        "dtype": part.dtype,
                        "name": part.name,
                        "nbytes": part.nbytes,
                        "offset": part.offset,
                        "shape": list(part.shape),
                    }
                    for part in layout.parts
                ],
                "precision": layout.precision,
            }
            for layout in manifest.layouts
        ],
        "method": manifest.method,
        "plan": finite(manifest.plan),
        "precision": manifest.precision,
        "prototypes": [
            {
                "file": entry.file,
                "id": list(entry.id),
                "layout": entry.layout,
                "offset": entry.offset,
                "weight": entry.weight,
            }
            for entry in manifest.prototypes
        ],
        "rate": manifest.rate,
        "receipt": finite(manifest.receipt),
        "remap": {
            str(layer): [None if slot.prototype is None else list(slot.prototype) for slot in row]
            for layer, row in slots
        },
        "scales": scales,
        "scope": manifest.scope,
        "source": manifest.source,
        "tool_version": manifest.tool_version,
    }
    if manifest.cache:  # left out where there is none, as in packages from before there was any
        value["cache"] = [
            {
                "candidates": one.candidates,
                "pin_share": one.pin_share,
                "policy": one.policy,
                "predicted_hit": one.predicted_hit,
                "quotas": list(one.quotas),
                "slots": one.slots,
            }
            for one in manifest.cache
        ]
    if manifest.rerouted:
        value["rerouted"] = list(manifest.rerouted)
    if manifest.prefill_chunk is not None:
        value["prefill_chunk"] = manifest.prefill_chunk
    if manifest.kv_precision != "source":
        value["kv_precision"] = manifest.kv_precision
    if manifest.prefetch is not None:
        value["prefetch"] = {
            "depth": manifest.prefetch.depth,
            "gain": manifest.prefetch.gain,
            "recall": {str(layer): one for layer, one in manifest.prefetch.recall.items()},
            "resident_share": manifest.prefetch.resident_share,
            "window": manifest.prefetch.window,
        }
    if manifest.notes:
        value["notes"] = list(manifest.notes)
    if manifest.overview:
        value["overview"] = {
            str(layer): {
                "distances": list(one.distances),
                "tokens": list(one.tokens),
                "weights": list(one.weights),
            }
            for layer, one in sorted(manifest.overview.items())
        }
    if manifest.originals:
        value["originals"] = {
            str(layer): {
                "nbytes": one.nbytes,
                "neurons": one.neurons,
                "weights": one.weights,
                "worth": one.worth,
            }
            for layer, one in sorted(manifest.originals.items())
        }
    try:
        return _text(value).encode()
    except (TypeError, ValueError) as error:
        raise PackageError(
            "The manifest cannot be written.", str(error), "report it, with this message"
        ) from error


def from_json(data: bytes, name: str = MANIFEST_NAME) -> Manifest:
    """The manifest in ``data``, fully checked; ``name`` is what messages call it."""
    _check_version(data, name)
    try:
        parsed = ManifestJson.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(step) for step in first["loc"]).encode("unicode_escape").decode()
        raise PackageError(
            f"{name} is damaged.", f"{where}: {first['msg']}"[:200], _AGAIN
        ) from None
    try:
        return _build(parsed)
    except _Wrong as wrong:
        raise PackageError(f"{name} is damaged.", str(wrong), _AGAIN) from None


def verify_package(folder: Path, *, deep: bool = False) -> Manifest:
    """Check that every file of the package is there in its size, and with ``deep`` in its SHA-256
    (reads it all).

    Raises:
        PackageError: naming the file that is missing, too short or changed.
    """
    manifest = load_manifest(folder)
    for name, facts in sorted(manifest.files.items()):
        verify_file(folder, name, facts, deep=deep)
    try:
        read_json_object(folder / CONFIG_FILE)
    except CheckpointError as error:
        raise PackageError(error.what, error.why, _AGAIN) from None
    return manifest


def verify_file(folder: Path, name: str, facts: Mapping[str, Any], *, deep: bool) -> None:
    """Check one file of a package against what ``Manifest.files`` says of it, as ``verify_package`` does.

    Raises:
        PackageError: it is missing, too short or changed.
    """
    path = folder / name
    if not is_there(folder, name):
        raise PackageError(f"{folder} is incomplete.", f"The file {name} is missing.", _AGAIN)
    why = ""
    try:
        with os.fdopen(open_inside(folder, name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != facts["size"]:
                why = f"It has {size} bytes instead of {facts['size']}."
            elif deep and hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                why = "Its content does not match its checksum."
    except CheckpointError as error:
        raise PackageError(error.what, error.why, _AGAIN) from error
    except OSError as error:
        raise PackageError(f"Cannot read {path}.", error.strerror or "", _AGAIN) from error
    if why:
        raise PackageError(f"{path} is damaged.", why, _AGAIN)


class _Wrong(Exception):
    """A manifest whose parts contradict each other; the text says how."""


def _check_version(data: bytes, name: str) -> None:
    """Before the strict check, which would only complain about fields that it does not know yet."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{name} is damaged.", str(error)[:200], _AGAIN) from None
    version = value.get("format_version") if isinstance(value, dict) else None
    if type(version) is not int or version < 1:
        raise PackageError(f"{name} is damaged.", "It has no format version.", _AGAIN)
    if version > FORMAT_VERSION:
        raise PackageError(
            "This package was made by a newer conmoe-edge.",
            f"Its format is {version}; this version knows formats up to {FORMAT_VERSION}.",
            "Update with: pip install --upgrade conmoe-edge",
        )


def _build(parsed: ManifestJson) -> Manifest:
    layouts = tuple(
        RecordLayout(
            layout.precision,
            tuple(
                RecordPart(part.name, tuple(part.shape), part.dtype, part.offset, part.nbytes)
                for part in layout.parts
            ),
            layout.nbytes,
        )
        for layout in parsed.layouts
    )
    prototypes = tuple(
        PrototypeEntry(ExpertId(*entry.id), entry.file, entry.offset, entry.layout, entry.weight)
        for entry in parsed.prototypes
    )
    for row, what in [(parsed.scales, "scales"), (parsed.constants, "constants")]:
        for layer, values in row.items():
            if len(values) != len(parsed.remap.get(layer, ())):
                raise _Wrong(f"{what}.{layer} and remap.{layer} have different lengths")
    if parsed.constants and CONSTANTS_FILE not in parsed.files:
        raise _Wrong(f"there are constants, but no {CONSTANTS_FILE}")
    slots = {
        layer: tuple(
            SlotRecord(None if target is None else ExpertId(*target), scale, constant)
            for target, scale, constant in zip(
                parsed.remap[layer],
                parsed.scales.get(layer) or [1.0] * len(parsed.remap[layer]),
                parsed.constants.get(layer) or [None] * len(parsed.remap[layer]),
                strict=True,
            )
        )
        for layer in sorted(parsed.remap)
    }
    _check_rerouted(parsed.rerouted, slots)
    files = {name: facts.model_dump() for name, facts in sorted(parsed.files.items())}
    _check_prototypes(prototypes, layouts, slots, files)
    if parsed.cache and len(parsed.cache) != len(layouts):
        raise _Wrong("the cache settings are not one a layout")
    prefetch = None
    if parsed.prefetch is not None:
        if PREDICTOR_FILE not in parsed.files:
            raise _Wrong(f"prototypes are read ahead, but there is no {PREDICTOR_FILE}")
        prefetch = PrefetchSettings(**parsed.prefetch.model_dump())
    overview = {
        layer: LayerOverview(tuple(one.weights), tuple(one.tokens), tuple(one.distances))
        for layer, one in sorted(parsed.overview.items())
    }
    _check_overview(overview, slots)
    originals = {
        layer: LayerOriginal(**one.model_dump()) for layer, one in sorted(parsed.originals.items())
    }
    if originals and originals.keys() != slots.keys():
        raise _Wrong("the originals have other layers than the map")
    return Manifest(
        source=parsed.source,
        method=parsed.method,
        rate=parsed.rate,
        scope=parsed.scope,
        precision=parsed.precision,
        dense_precision=parsed.dense_precision,
        layouts=layouts,
        prototypes=prototypes,
        slots=slots,
        files=files,
        plan=parsed.plan,
        receipt=parsed.receipt,
        cache=tuple(
            CacheSettings(
                one.slots,
                one.policy,
                one.pin_share,
                tuple(one.quotas),
                one.predicted_hit,
                dict(one.candidates),
            )
            for one in parsed.cache
        ),
        prefetch=prefetch,
        notes=tuple(parsed.notes),
        overview=overview,
        originals=originals,
        tool_version=parsed.tool_version,
        format_version=parsed.format_version,
        rerouted=tuple(parsed.rerouted),
        prefill_chunk=parsed.prefill_chunk,
        kv_precision=parsed.kv_precision,
    )


def _check_rerouted(layers: list[int], slots: dict[int, tuple[SlotRecord, ...]]) -> None:
    """The layers are there, in order, and their routers have something to choose."""
    if any(first >= second for first, second in pairwise(layers)):
        raise _Wrong("the rerouted layers are not sorted, or one is there twice")
    for layer in layers:
        if layer not in slots:
            raise _Wrong(f"layer {layer} is rerouted, but has no router slots")
        if all(slot.dropped for slot in slots[layer]):
            raise _Wrong(f"layer {layer} is rerouted, but none of its slots may be chosen")


def _check_prototypes(
    prototypes: tuple[PrototypeEntry, ...],
    layouts: tuple[RecordLayout, ...],
    slots: dict[int, tuple[SlotRecord, ...]],
    files: dict[str, dict[str, Any]],
) -> None:
    """The table against the map, the layouts and the files: every reference leads somewhere, no two
    records overlap.
    """
    ids = [entry.id for entry in prototypes]
    known = set(ids)
    if any(first >= second for first, second in pairwise(ids)):
        raise _Wrong("the prototypes are not sorted, or one is there twice")
    for layer, row in slots.items():
        for slot in row:
            if slot.prototype is not None and slot.prototype not in known:
                raise _Wrong(
                    f"remap.{layer} leads to {list(slot.prototype)}, which is no prototype"
                )
    places: dict[str, list[tuple[int, int]]] = {}
    for entry in prototypes:
        where = f"the prototype {list(entry.id)}"
        if entry.id.layer not in slots or entry.id.expert >= len(slots[entry.id.layer]):
            raise _Wrong(f"{where} is no expert of the model")
        if entry.layout >= len(layouts):
            raise _Wrong(f"{where} has a layout that is not there")
        if entry.file not in files:
            raise _Wrong(f"{where} lies in {entry.file}, which is not among the files")
        nbytes = layouts[entry.layout].nbytes
        if entry.offset % record_alignment(nbytes):
            raise _Wrong(f"{where} does not begin on a multiple of {record_alignment(nbytes)}")
        end = entry.offset + nbytes
        if end > files[entry.file]["size"]:
            raise _Wrong(f"{where} ends after the end of {entry.file}")
        places.setdefault(entry.file, []).append((entry.offset, end))
    for file, spans in places.items():
        spans.sort()
        if any(second[0] < first[1] for first, second in pairwise(spans)):
            raise _Wrong(f"two prototypes overlap in {file}")


def _check_overview(
    overview: dict[int, LayerOverview], slots: dict[int, tuple[SlotRecord, ...]]
) -> None:
    """One number for every slot of every layer, or no overview at all."""
    if overview and overview.keys() != slots.keys():
        raise _Wrong("the overview has other layers than the map")
    for layer, one in overview.items():
        if {len(one.weights), len(one.tokens), len(one.distances)} != {len(slots[layer])}:
            raise _Wrong(f"overview.{layer} and remap.{layer} have different lengths")


def _text(value: dict[str, Any]) -> str:
    """JSON with a line for every item of the first two levels: small, and still readable and
    comparable by lines.
    """

    def compact(inner: Any) -> str:
        return json.dumps(
            inner, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(", ", ": ")
        )

    lines = []
    for key, inner in sorted(value.items()):
        if isinstance(inner, dict) and inner:
            items = [
                f"  {compact(name)}: {compact(item)}"
                for name, item in sorted(inner.items(), key=_natural)
            ]
            text = "{\n" + ",\n".join(items) + "\n }"
        elif isinstance(inner, list) and inner:
            text = "[\n" + ",\n".join(f"  {compact(item)}" for item in inner) + "\n ]"
        else:
            text = compact(inner)
        lines.append(f" {compact(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _natural(item: tuple[str, Any]) -> tuple[bool, int, str]:
    """Layers in the order of their numbers, everything else by name."""
    name = item[0]
    number = int(name) if name.isascii() and name.isdigit() else -1
    return number < 0, number, name
