"""``conmoe.json``: round trip, stable bytes, and a manifest from hell for every rule."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conmoe_edge.checkpoint.format.layout import SMALL_RECORD
from conmoe_edge.checkpoint.format.manifest import (
    CacheSettings,
    ExpertId,
    LayerOriginal,
    LayerOverview,
    Manifest,
    PrototypeEntry,
    RecordLayout,
    RecordPart,
    SlotRecord,
)
from conmoe_edge.checkpoint.package.manifest_io import (
    from_json,
    load_manifest,
    save_manifest,
    to_json,
    verify_package,
)
from conmoe_edge.errors import PackageError

FILE = "prototypes-00001.safetensors"
SHA = hashlib.sha256(b"").hexdigest()
LAYOUT = RecordLayout(
    "source",
    (
        RecordPart("gate_up_proj", (8, 4), "bfloat16", 0, 64),
        RecordPart("down_proj", (4, 4), "float32", 64, 64),
    ),
    4096,
)


def manifest(**changes: Any) -> Manifest:
    """Two layers of three slots, two prototypes; a scale, a constant and a dropped slot."""
    first, second = ExpertId(1, 0), ExpertId(1, 2)
    values: dict[str, Any] = {
        "source": {"name": "demo", "revision": None, "fingerprint": {"id": "ä"}},
        "method": "conmoe",
        "rate": 0.5,
        "scope": 2,
        "precision": "source",
        "layouts": (LAYOUT,),
        "prototypes": (
            PrototypeEntry(first, FILE, 4096, 0, 0.75),
            PrototypeEntry(second, FILE, 8192, 0, 0.25),
        ),
        "slots": {
            1: (SlotRecord(first), SlotRecord(first), SlotRecord(second)),
            10: (SlotRecord(second, 0.5), SlotRecord(None), SlotRecord(None, constant=0)),
        },
        "files": {
            FILE: {"size": 12288, "sha256": SHA},
            "config.json": {"size": 2, "sha256": SHA},
            "constants.safetensors": {"size": 0, "sha256": SHA},
        },
        "plan": {"terms": [{"name": "dense weights", "nbytes": 7}]},
        "receipt": {"loss": 2.5},
        "tool_version": "0.1.0",
    }
    return Manifest(**(values | changes))


def test_round_trip(tmp_path: Path) -> None:
    written = save_manifest(tmp_path, manifest())
    assert (
        written.name == "conmoe.json" and written.size == (tmp_path / "conmoe.json").stat().st_size
    )
    assert load_manifest(tmp_path) == manifest()


def test_bytes_do_not_depend_on_the_order_of_anything() -> None:
    shuffled = manifest(
        slots=dict(reversed(manifest().slots.items())),
        files=dict(reversed(manifest().files.items())),
        source=dict(reversed(manifest().source.items())),
    )
    assert to_json(shuffled) == to_json(manifest())
    assert to_json(from_json(to_json(manifest()))) == to_json(manifest())


def test_the_map_is_written_as_documented() -> None:
    value = json.loads(to_json(manifest()))
    assert value["remap"] == {"1": [[1, 0], [1, 0], [1, 2]], "10": [[1, 2], None, None]}
    assert value["scales"] == {"10": [0.5, 1.0, 1.0]}
    assert value["constants"] == {"10": [None, None, 0]}
    text = to_json(manifest()).decode()
    assert '  "1": [[1, 0], [1, 0], [1, 2]],\n' in text, "one line a layer"
    assert text.index('"1": [[') < text.index('"10": [[')


def test_a_plain_map_has_neither_scales_nor_constants() -> None:
    slots = {1: manifest().slots[1]}
    value = json.loads(to_json(manifest(slots=slots)))
    assert value["scales"] == {} and value["constants"] == {}


def test_cache_settings_come_back_and_older_manifests_have_none(tmp_path: Path) -> None:
    assert b'"cache"' not in to_json(manifest())
    assert from_json(to_json(manifest())).cache == ()
    chosen = CacheSettings(7, "layer-lru", 0.0, (4, 3), 0.5, {"lru": 0.25, "layer-lru": 0.5})
    plain = CacheSettings(2, "lru")
    layouts = len(manifest().layouts)
    cache = (chosen, plain)[:layouts]
    save_manifest(tmp_path, manifest(cache=cache))
    assert load_manifest(tmp_path).cache == cache
    with pytest.raises(PackageError, match="one a layout"):
        save_manifest(tmp_path, manifest(cache=(plain,) * (layouts + 1)))


def test_rerouted_layers_come_back_and_older_manifests_have_none(tmp_path: Path) -> None:
    assert b"rerouted" not in to_json(manifest())
    one = manifest(rerouted=(10,))
    save_manifest(tmp_path, one)
    found = load_manifest(tmp_path)
    assert found == one
    assert found.open_slots(10) == [True, False, True], "a constant may be chosen"
    assert found.open_slots(1) == [True, True, True]
    assert manifest().open_slots(10) == [True, True, True], "dropped, but the router is as it was"


def test_notes_come_back_and_older_manifests_have_none(tmp_path: Path) -> None:
    assert b"notes" not in to_json(manifest())
    one = manifest(notes=("layer 3: too few tokens", "another"))
    save_manifest(tmp_path, one)
    assert load_manifest(tmp_path) == one


def overview(**changes: Any) -> LayerOverview:
    values = {
        "weights": (0.25, 0.0, 1e-9),
        "tokens": (12, 0, 1),
        "distances": (0.0, 1.25, None),
    }
    return LayerOverview(**(values | changes))


def test_an_overview_comes_back_and_older_manifests_have_none(tmp_path: Path) -> None:
    whole = manifest(overview={1: overview(), 10: overview(distances=(None, None, None))})
    save_manifest(tmp_path, whole)
    assert load_manifest(tmp_path) == whole
    assert "overview" not in json.loads(to_json(manifest()))


@pytest.mark.parametrize(
    "found",
    [
        {1: overview()},
        {1: overview(), 10: overview(), 11: overview()},
        {1: overview(), 10: overview(weights=(0.5, 0.5))},
        {1: overview(), 10: overview(tokens=(1, 2, 3, 4))},
        {1: overview(), 10: overview(distances=(0.0, 0.0, -1.0))},
        {1: overview(), 10: overview(weights=(0.5, -0.5, 0.0))},
        {1: overview(), 10: overview(tokens=(1, 2, -3))},
    ],
)
def test_an_overview_of_other_slots_is_refused(found: dict[int, LayerOverview]) -> None:
    with pytest.raises(PackageError, match="damaged"):
        from_json(to_json(manifest(overview=found)))


def test_a_ratio_of_infinity_becomes_null() -> None:
    value = json.loads(
        to_json(manifest(receipt={"ratio": float("inf"), "kl": [float("nan"), 1.0]}))
    )
    assert value["receipt"] == {"ratio": None, "kl": [None, 1.0]}


def test_no_prototype_at_all_is_possible() -> None:
    empty = manifest(
        prototypes=(), layouts=(), slots={1: (SlotRecord(None), SlotRecord(None, constant=3))}
    )
    assert from_json(to_json(empty)) == empty


Change = Callable[[dict[str, Any]], object]


def _large(value: dict[str, Any], nbytes: int, offset: int) -> None:
    """Records of ``nbytes``, the first at ``offset``, in a file that has room for both."""
    value["layouts"][0].update(nbytes=nbytes)
    for number, one in enumerate(value["prototypes"]):
        one.update(offset=offset + number * (SMALL_RECORD + 4096))
    value["files"][FILE].update(size=8 * SMALL_RECORD)


def test_records_share_pages_below_a_size() -> None:
    """What is refused of large records is right for small ones, and whole pages for large ones."""
    value = json.loads(to_json(manifest()))
    value["layouts"][0].update(nbytes=4096 - 64)
    value["prototypes"][1].update(offset=8192 - 64)
    assert from_json(json.dumps(value).encode()).layouts[0].nbytes == 4096 - 64
    _large(value, SMALL_RECORD, SMALL_RECORD)
    assert from_json(json.dumps(value).encode()).layouts[0].nbytes == SMALL_RECORD


WRONG: dict[str, Change] = {
    "unknown field": lambda v: v.update(extra=1),
    "missing field": lambda v: v.pop("remap"),
    "unknown field inside": lambda v: v["prototypes"][0].update(extra=1),
    "rate of one": lambda v: v.update(rate=1.0),
    "negative rate": lambda v: v.update(rate=-0.1),
    "rate as text": lambda v: v.update(rate="0.5"),
    "scope of zero": lambda v: v.update(scope=0),
    "huge scope": lambda v: v.update(scope=10**30),
    "true for a number": lambda v: v.update(scope=True),
    "map to a layer that is not there": lambda v: v["remap"]["1"].__setitem__(0, [5, 0]),
    "map to an expert that is no prototype": lambda v: v["remap"]["1"].__setitem__(0, [1, 1]),
    "negative expert": lambda v: v["remap"]["1"].__setitem__(0, [1, -1]),
    "map of three numbers": lambda v: v["remap"]["1"].__setitem__(0, [1, 0, 0]),
    "map of text": lambda v: v["remap"]["1"].__setitem__(0, "1,0"),
    "map of fractions": lambda v: v["remap"]["1"].__setitem__(0, [1.5, 0]),
    "empty layer": lambda v: v["remap"].update({"1": []}),
    "layer that is no number": lambda v: v["remap"].update(x=[None]),
    "negative layer": lambda v: v["remap"].update({"-1": [None]}),
    "layer far out": lambda v: v["remap"].update({"99999999": [None]}),
    "cycle in place of a map": lambda v: v.update(remap={"1": {"1": [1, 0]}}),
    "too few scales": lambda v: v["scales"]["10"].pop(),
    "scales for no layer": lambda v: v["scales"].update({"3": [1.0]}),
    "infinite scale": lambda v: v["scales"]["10"].__setitem__(0, float("inf")),
    "scale that is not a number": lambda v: v["scales"]["10"].__setitem__(0, float("nan")),
    "too many constants": lambda v: v["constants"]["10"].append(None),
    "negative constant": lambda v: v["constants"]["10"].__setitem__(2, -1),
    "constants without their file": lambda v: v["files"].pop("constants.safetensors"),
    "prototype twice": lambda v: v["prototypes"].append(v["prototypes"][1]),
    "prototypes not sorted": lambda v: v["prototypes"].reverse(),
    "prototype beyond the experts": lambda v: v["prototypes"][1].update(id=[1, 3]),
    "prototype of no layer": lambda v: v["prototypes"][1].update(id=[2, 0]),
    "record not aligned": lambda v: v["prototypes"][1].update(offset=8192 - 32),
    "record of odd size": lambda v: v["layouts"][0].update(nbytes=4096 - 32),
    "large record that is no pages": lambda v: _large(v, SMALL_RECORD + 64, SMALL_RECORD),
    "large record between pages": lambda v: _large(v, SMALL_RECORD, SMALL_RECORD + 64),
    "record in the header": lambda v: v["prototypes"][0].update(offset=0),
    "negative offset": lambda v: v["prototypes"][0].update(offset=-4096),
    "record after the end": lambda v: v["prototypes"][1].update(offset=12288),
    "offset beyond 64 bits": lambda v: v["prototypes"][1].update(offset=4096 << 64),
    "records overlap": lambda v: v["prototypes"][1].update(offset=4096),
    "layout that is not there": lambda v: v["prototypes"][1].update(layout=1),
    "infinite weight": lambda v: v["prototypes"][1].update(weight=float("inf")),
    "negative weight": lambda v: v["prototypes"][1].update(weight=-0.5),
    "file that is not there": lambda v: v["prototypes"][1].update(file="other.safetensors"),
    "file outside": lambda v: v["prototypes"][1].update(file="../prototypes-00001.safetensors"),
    "files outside": lambda v: v["files"].update({"../x": v["files"]["config.json"]}),
    "absolute file": lambda v: v["files"].update({"/etc/passwd": v["files"]["config.json"]}),
    "file of a drive": lambda v: v["files"].update({"C:x": v["files"]["config.json"]}),
    "negative size": lambda v: v["files"]["config.json"].update(size=-1),
    "checksum of another length": lambda v: v["files"]["config.json"].update(sha256="ab"),
    "part outside its record": lambda v: v["layouts"][0]["parts"][1].update(offset=4096 - 0),
    "parts overlap": lambda v: v["layouts"][0]["parts"][1].update(offset=0),
    "part not aligned": lambda v: v["layouts"][0]["parts"][1].update(offset=96),
    "part of another size": lambda v: v["layouts"][0]["parts"][1].update(nbytes=60),
    "part of no known format": lambda v: v["layouts"][0]["parts"][1].update(dtype="object"),
    "parts of one name": lambda v: v["layouts"][0]["parts"][1].update(name="gate_up_proj"),
    "shape that overflows": lambda v: v["layouts"][0]["parts"][1].update(shape=[1 << 52] * 8),
    "record not a multiple": lambda v: v["layouts"][0].update(nbytes=4097),
    "record of nothing": lambda v: v["layouts"][0].update(nbytes=0),
    "layout without parts": lambda v: v["layouts"][0].update(parts=[]),
    "rerouted layer that is not there": lambda v: v.update(rerouted=[3]),
    "rerouted twice": lambda v: v.update(rerouted=[10, 10]),
    "rerouted not sorted": lambda v: v.update(rerouted=[10, 1]),
    "nothing to route to": lambda v: (
        v.update(rerouted=[10]),
        v["remap"].update({"10": [None] * 3}),
        v["constants"].update({"10": [None] * 3}),
    ),
    "no version": lambda v: v.pop("format_version"),
    "version of zero": lambda v: v.update(format_version=0),
    "version as text": lambda v: v.update(format_version="1"),
    "version as truth": lambda v: v.update(format_version=True),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_manifest(case: str, tmp_path: Path) -> None:
    value = json.loads(to_json(manifest()))
    WRONG[case](value)
    (tmp_path / "conmoe.json").write_text(json.dumps(value))
    with pytest.raises(PackageError) as caught:
        load_manifest(tmp_path)
    error = caught.value
    assert "damaged" in error.what and error.why and error.fix
    assert "\n" not in error.what + error.why + error.fix


def test_newer_format_says_to_update(tmp_path: Path) -> None:
    value = json.loads(to_json(manifest())) | {"format_version": 2, "something": "new"}
    (tmp_path / "conmoe.json").write_text(json.dumps(value))
    with pytest.raises(PackageError) as caught:
        load_manifest(tmp_path)
    assert "newer" in caught.value.what and "pip install --upgrade conmoe-edge" in caught.value.fix


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", "[" * 200_000, '{"a":' * 50_000, "\xff"]
)
def test_hardly_a_manifest(text: str, tmp_path: Path) -> None:
    (tmp_path / "conmoe.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PackageError, match="damaged"):
        load_manifest(tmp_path)


def test_no_package(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(PackageError) as caught:
            load_manifest(folder)
        assert "no package" in caught.value.what and "conmoe-edge fit" in caught.value.fix


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 1.5},
        {"prototypes": manifest().prototypes[::-1]},
        {"source": {"x": object()}},
        {"source": {"x": float("nan")}},
        {"files": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_could_not_be_read_is_not_written(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PackageError):
        save_manifest(tmp_path, manifest(**changes))
    assert list(tmp_path.iterdir()) == []


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "../x", "\0", "a", "1"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 10), max_size=5), values)
def test_any_value_anywhere(path: list[int], value: Any) -> None:
    """Replace what lies at a random place by anything: our error, or a consistent manifest."""
    root = json.loads(to_json(manifest()))
    here: Any = root
    for depth, step in enumerate(path):
        keys = sorted(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            break
        key = keys[step % len(keys)]
        if depth == len(path) - 1 or not isinstance(here[key], dict | list):
            here[key] = copy.deepcopy(value)
            break
        here = here[key]
    try:
        data = json.dumps(root).encode()
        got = from_json(data)
    except PackageError as error:
        assert "\n" not in error.what + error.why + error.fix
        return
    known = {entry.id for entry in got.prototypes}
    for row in got.slots.values():
        assert all(slot.prototype is None or slot.prototype in known for slot in row)
    for entry in got.prototypes:
        assert entry.offset + got.layouts[entry.layout].nbytes <= got.files[entry.file]["size"]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_byte_anywhere(data: st.DataObject) -> None:
    raw = bytearray(to_json(manifest()))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        from_json(bytes(raw))
    except PackageError as error:
        assert "\n" not in error.what + error.why + error.fix


@pytest.fixture
def package(tmp_path: Path) -> Path:
    contents = {FILE: b"x" * 12288, "config.json": b"{}", "constants.safetensors": b"abc"}
    files = {}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    save_manifest(tmp_path, manifest(files=files))
    return tmp_path


@pytest.mark.parametrize("deep", [False, True])
def test_sound_package(deep: bool, package: Path) -> None:
    assert verify_package(package, deep=deep).rate == 0.5


@pytest.mark.parametrize("name", [FILE, "config.json", "constants.safetensors"])
def test_damaged_package_names_the_file(name: str, package: Path) -> None:
    content = (package / name).read_bytes()
    (package / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if name != "config.json":
        verify_package(package)  # the size is right: only the checksum can tell
    with pytest.raises(PackageError) as caught:
        verify_package(package, deep=True)
    assert name in caught.value.what
    (package / name).write_bytes(content[:-1])
    with pytest.raises(PackageError) as caught:
        verify_package(package)
    assert name in caught.value.what
    (package / name).unlink()
    with pytest.raises(PackageError) as caught:
        verify_package(package)
    assert name in caught.value.why


def test_originals_come_back_and_older_manifests_have_none(tmp_path: Path) -> None:
    known = {1: LayerOriginal(96, 1000, 2000, 0.25), 10: LayerOriginal(64, 500, 1000)}
    whole = manifest(originals=known)
    save_manifest(tmp_path, whole)
    assert load_manifest(tmp_path) == whole
    assert "originals" not in json.loads(to_json(manifest()))


@pytest.mark.parametrize(
    "found",
    [
        {1: LayerOriginal(96, 1000, 2000)},
        {1: LayerOriginal(96, 1000, 2000), 10: LayerOriginal(0, 1000, 2000)},
        {1: LayerOriginal(96, 1000, 2000), 10: LayerOriginal(1, 1, 1, -0.5)},
    ],
)
def test_originals_of_other_layers_are_refused(found: dict[int, LayerOriginal]) -> None:
    with pytest.raises(PackageError, match="damaged"):
        from_json(to_json(manifest(originals=found)))
