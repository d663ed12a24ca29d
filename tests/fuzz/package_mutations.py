"""What an attacker, or a bad disk, does to a package: one change to one file, and the manifest made to agree with it.

Sizes and digests in the manifest are set to those of the changed file afterwards, so that nothing is refused for its
checksum alone. A change is a function of the generator that it is given, and says in words what it did.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

MANIFEST, CONFIG, INDEX = "conmoe.json", "config.json", "model.safetensors.index.json"
ADVISORY = (
    "notes",
    "plan",
    "receipt",
    "overview",
    "originals",
    "cache",
    "tool_version",
    "source",
    "rate",
)
"""What stands in the manifest for readers, or changes speed alone."""

_NUMBERS = (0, -1, 1, 2, 3, 7, 8, 63, 64, 4096, 65535, 65536, 2**31, 2**53, 2**63, 2**64, 10**30)
_FLOATS = (0.0, -0.0, 0.5, -1.5, 1e-320, 1e30, 1e38, 1e308, -1e308, 3.5e38)
_TEXTS = (
    "",
    "int8",
    "bfloat16",
    "float8_e4m3fn",
    "bool",
    "complex64",
    "../config.json",
    "\0",
    "9" * 300,
)
_FORMATS = (
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "I16",
    "F16",
    "BF16",
    "I32",
    "F32",
    "I64",
    "F64",
    "C64",
    "F4",
    "?",
)
_NAMED = {"NaN": "@nan@", "Infinity": "@inf@", "-Infinity": "@-inf@"}


@dataclass(frozen=True, slots=True)
class Change:
    """What was done, and whether the package has to run as before, or be refused."""

    words: str
    harmless: bool = False


def change(folder: Path, random: Random) -> Change:
    """Change the package in ``folder``, whose files may be replaced but not written to."""
    kinds: list[tuple[int, Callable[[Path, Random], Change]]] = [
        (8, manifest_field),
        (1, manifest_text),
        (5, header),
        (6, content),
        (1, length),
        (3, config_field),
        (1, index_field),
    ]
    (one,) = random.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])
    done = one(folder, random)
    agree(folder)
    return done


def agree(folder: Path) -> None:
    """Sizes and digests of the manifest become those of the files, where it can still be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        files = manifest["files"]
        for name, facts in files.items():
            data = (folder / name).read_bytes()
            told = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            if facts.keys() == told.keys() and isinstance(facts["sha256"], str):
                facts.update(told)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return
    if json.loads(path.read_bytes()) != manifest:
        put(path, json.dumps(manifest).encode())


def put(path: Path, data: bytes) -> None:
    """Another file under the name: what stood there is shared with other cases."""
    path.unlink()
    path.write_bytes(data)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, one in inner:
        yield from _places(one, (*path, key))


def _some_place(value: Any, random: Random) -> tuple[Any, ...]:
    """A place, its key on the first level drawn first: long lists do not take all."""
    first = random.choice(sorted(value))
    return random.choice(list(_places(value[first], (first,))))


def _other(value: Any, random: Random) -> Any:
    """Something else in the place of ``value``."""
    near: list[Any] = []
    if isinstance(value, int) and not isinstance(value, bool):
        near = [
            value + 1,
            value - 1,
            value * 2,
            -value,
            value + 4096,
            float(value),
            str(value),
            value + 64,
        ]
    elif isinstance(value, float):
        near = [-value, value * 1e300, int(value)]
    elif isinstance(value, str):
        near = [value + "x", value[:-1], value.upper(), "../" + value]
    elif isinstance(value, list):
        near = [value * 2, value[:-1], value[::-1], [*value, None], [value]]
    elif isinstance(value, dict):
        near = [dict(list(value.items())[:-1]), {**value, "extra": 1}, list(value)]
    far = [None, True, False, [], {}, *_NAMED.values(), *_NUMBERS, *_FLOATS, *_TEXTS]
    return random.choice(near if near and random.random() < 0.6 else far)


def _written(value: Any) -> bytes:
    """JSON with the numbers that JSON has not, under the names that Python takes."""
    text = json.dumps(value)
    for name, mark in _NAMED.items():
        text = text.replace(json.dumps(mark), name)
    return text.encode()


def _edit(path: Path, random: Random) -> tuple[Any, ...]:
    value = json.loads(path.read_bytes())
    place = _some_place(value, random)
    holder = value
    for step in place[:-1]:
        holder = holder[step]
    last, how = place[-1], random.random()
    if how < 0.12:
        del holder[last]
        words = "removed"
    elif how < 0.2 and isinstance(holder, list):
        holder.insert(last, copy.deepcopy(random.choice(holder)))
        words = "one more"
    else:
        new = _other(holder[last], random)
        words = f"{holder[last]!r:.60} -> {new!r:.60}"
        holder[last] = new
    put(path, _written(value))
    return place, words


def manifest_field(folder: Path, random: Random) -> Change:
    place, words = _edit(folder / MANIFEST, random)
    return Change(f"{MANIFEST} {place}: {words}", place[0] in ADVISORY)


def manifest_text(folder: Path, random: Random) -> Change:
    """Keys that stand twice, and text that is no JSON."""
    path = folder / MANIFEST
    text = path.read_bytes()
    value = json.loads(text)
    how = random.randrange(4)
    if how == 0:
        key = random.choice(sorted(value))
        new = json.dumps({key: _other(value[key], random)}).encode()[1:-1]
        put(path, b"{" + new + b"," + text.lstrip()[1:])
        return Change(f"{MANIFEST}: {key} stands twice", False)
    if how == 1:
        at = random.randrange(len(text))
        put(path, text[:at])
        return Change(f"{MANIFEST} ends at byte {at}")
    if how == 2:
        at = random.randrange(len(text))
        put(path, text[:at] + bytes([random.randrange(256)]) + text[at + 1 :])
        return Change(f"{MANIFEST}: another byte at {at}")
    put(path, b"[" * 100_000)
    return Change(f"{MANIFEST} is deep")


def config_field(folder: Path, random: Random) -> Change:
    place, words = _edit(folder / CONFIG, random)
    return Change(f"{CONFIG} {place}: {words}")


def index_field(folder: Path, random: Random) -> Change:
    place, words = _edit(folder / INDEX, random)
    return Change(f"{INDEX} {place}: {words}")


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _tensor_file(folder: Path, random: Random) -> Path:
    """One of the files; kinds of files are drawn first."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        kinds.setdefault(path.name.split("-")[0].split(".")[0], []).append(path)
    return random.choice(kinds[random.choice(sorted(kinds))])


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(table: dict[str, Any], values: bytes, size: int = 0) -> bytes:
    """The file; its header is filled up to ``size`` bytes, so that the data lie where they lay."""
    text = json.dumps(table).encode()
    text = text.ljust(max(size, -(-(8 + len(text)) // 64) * 64 - 8))
    return struct.pack("<Q", len(text)) + text + values


def header(folder: Path, random: Random) -> Change:
    path = _tensor_file(folder, random)
    data = path.read_bytes()
    table, values = split(data)
    names = sorted(set(table) - {"__metadata__"})
    name = random.choice(names)
    entry = table[name]
    how = random.choice(
        ["dtype", "shape", "offsets", "name", "gone", "swapped", "more", "fold", "any"]
    )
    if how == "dtype":
        entry["dtype"] = random.choice(_FORMATS)
    elif how == "shape":
        entry["shape"] = random.choice(
            [
                entry["shape"][::-1],
                [*entry["shape"], 1],
                [1, *entry["shape"]],
                entry["shape"][:-1],
                [one + 1 for one in entry["shape"]],
                [0, *entry["shape"]],
                [2**62, 4],
                [-1],
            ]
        )
    elif how == "fold" and len(entry["shape"]) > 1:  # as many numbers in another shape
        first, second, *rest = entry["shape"]
        divisor = random.choice([one for one in (2, 4, 8, second) if second % one == 0] or [1])
        entry["shape"] = [first * divisor, second // divisor, *rest]
    elif how == "offsets":
        step = random.choice([-64, -2, -1, 1, 2, 64, 4096, 2**40, 2**63])
        entry["data_offsets"][random.randrange(2)] += step
    elif how == "name":
        table[random.choice([name + "x", name.replace(".0", ".1"), "../x", ""])] = table.pop(name)
    elif how == "gone":
        del table[name]
    elif how == "swapped":
        other = random.choice(names)
        table[name], table[other] = table[other], table[name]
    elif how == "more":
        table["constants.99"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(values)] * 2}
    else:
        key = random.choice(sorted(entry))
        entry[key] = _other(entry[key], random)
    size = struct.unpack("<Q", data[:8])[0]
    text = _written(table)
    if random.random() < 0.5 and how in ("shape", "dtype", "fold") and isinstance(entry, dict):
        values = _sized(entry, values)
    put(path, joined(json.loads(text), values, size))
    return Change(f"{path.name} header, {name}: {how} {entry!r:.120}")


def _sized(entry: dict[str, Any], values: bytes) -> bytes:
    """The last tensor's place and bytes as its shape and format say, so that the header is sound in itself."""
    widths = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "I16": 2, "F16": 2, "BF16": 2}
    widths |= {"I32": 4, "F32": 4, "I64": 8, "F64": 8, "C64": 8}
    try:
        count = widths[entry["dtype"]]
        for one in entry["shape"]:
            count *= one
        start, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return values
    if end != len(values) or not 0 <= count < 1 << 20:
        return values
    entry["data_offsets"] = [start, start + count]
    return values[:start] + (values[start:] + bytes(count))[:count]


def content(folder: Path, random: Random) -> Change:
    """Other numbers: of a whole tensor, or some of them."""
    path = _tensor_file(folder, random)
    data = bytearray(path.read_bytes())
    table, _ = split(bytes(data))
    start = 8 + struct.unpack("<Q", data[:8])[0]
    name = random.choice(sorted(set(table) - {"__metadata__"}))
    entry = table[name]
    first, last = (start + one for one in entry["data_offsets"])
    pattern = random.choice(
        [
            *("nan", "infinity", "huge", "ones", "zeros", "noise", "flip", "far"),
        ]
    )
    wide = {"BF16": "bf16", "F32": "f32", "F16": "f16"}.get(entry["dtype"], "raw")
    bits = {
        ("nan", "f32"): struct.pack("<f", float("nan")),
        ("infinity", "f32"): struct.pack("<f", float("inf")),
        ("huge", "f32"): struct.pack("<f", 3e38),
        ("nan", "f16"): b"\x00\x7e",
        ("infinity", "f16"): b"\x00\x7c",
        ("huge", "f16"): b"\xff\x7b",
    }
    usual = {
        "nan": b"\xc0\x7f",
        "infinity": b"\x80\x7f",
        "huge": b"\x7f\x7f",
        "far": b"\xff\xff\xff\x7f",
    }
    run = bits.get((pattern, wide)) or usual.get(pattern)
    count = last - first
    if not count:
        return Change(f"{path.name}: {name} is empty")
    if pattern == "flip":
        for _ in range(random.choice([1, 8, 200])):
            data[first + random.randrange(count)] ^= 1 << random.randrange(8)
    else:
        whole = random.random() < 0.4
        length = count if whole else min(count, random.choice([4, 8, 64, 512]))
        at = first if whole else first + random.randrange(0, count - length + 1) // 4 * 4
        if run is not None:
            part = (run * (length // len(run) + 1))[:length]
        elif pattern == "ones":
            part = b"\xff" * length
        elif pattern == "zeros":
            part = bytes(length)
        else:
            part = random.randbytes(length)
        data[at : at + length] = part
    put(path, bytes(data))
    return Change(f"{path.name}: {pattern} in {name}")


def length(folder: Path, random: Random) -> Change:
    path = _tensor_file(folder, random)
    data = path.read_bytes()
    cut = random.choice([0, 4, 8, 9, 100, len(data) // 2, len(data) - 1, len(data) - 4096])
    if random.random() < 0.3:
        put(path, data + bytes(random.choice([1, 64, 4096])))
        return Change(f"{path.name} is longer")
    put(path, data[: max(0, cut)])
    return Change(f"{path.name} ends at byte {cut}")


def edit_values(path: Path, name: str, edit: Callable[[bytearray], None]) -> None:
    """Change the bytes of one tensor of a file where they lie; the manifest is left to ``agree``."""
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    first, last = (start + one for one in split(bytes(data))[0][name]["data_offsets"])
    part = data[first:last]
    edit(part)
    assert len(part) == last - first, "a tensor keeps its size"
    data[first:last] = part
    put(path, bytes(data))
