"""``fit`` of a model on the hub: its weights come once, part by part, and nothing before all refusals are past."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, save_tokenizer
from local_hub import Fault, Hub, bytes_file, folder_repository, local_hub
from safetensors.torch import load_file, save_file

from conmoe_edge import api
from conmoe_edge.checkpoint.fs.durable import CRASH_STATUS, CRASH_VARIABLE
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.errors import (
    ConmoeError,
    DoesNotFit,
    NoSpace,
    OutputExists,
)
from conmoe_edge.offload.simulate.machine_file import MACHINE_FILE
from tests.patience import PATIENCE

NAME = "org/tiny"
HEADERS = 1 << 17
"""Read of every shard before anything is decided; the weights of these models lie within it and beyond."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, each longer than what is read to see a header."""
    folder = tmp_path_factory.mktemp("source") / "model"
    wide = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 128}
    save_tiny("qwen3_moe", folder, mlp_only_layers=[], **wide)
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text("the quick brown fox jumps over the lazy dog 012 " * 30)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda name: ("layers.1" in name, "layers.2" in name, name))
    third = len(names) // 3
    weight_map = {}
    for number, start in enumerate(range(0, len(names), third + 1), start=1):
        file = f"model-{number:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[start : start + third + 1]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(one.numel() * one.element_size() for one in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(path.stat().st_size > 2 * HEADERS for path in folder.glob("*.safetensors"))
    return folder


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub({NAME: folder_repository(source)})
    with local_hub(hub, tmp_path / "cache", monkeypatch):
        yield hub


def fit(source: Path, out: Path, **more: Any) -> api.FitReport:
    settings: dict[str, Any] = {
        "budget": "4GB",
        "device": "cpu",
        "rate": 0.5,
        "method": "auto",
        "calibration": source.parent / "text.txt",
        "calibration_tokens": 512,
    }
    return api.fit(more.pop("model", NAME), out, **{**settings, **more})


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != MACHINE_FILE
    }


def weights(source: Path) -> int:
    return sum(path.stat().st_size for path in source.glob("*.safetensors"))


def allowance(source: Path) -> int:
    """What headers may cost."""
    return HEADERS * len(list(source.glob("*.safetensors")))


@pytest.mark.parametrize("dense_precision", ["source", "int8"])
def test_same_bytes_as_from_the_cache_and_every_weight_once(
    dense_precision: str, source: Path, hub: Hub, tmp_path: Path
) -> None:
    report = fit(source, tmp_path / "parts", dense_precision=dense_precision)
    assert hub.weight_bytes() <= weights(source) + allowance(source)
    assert report.plan.fetching is not None
    assert report.plan.fetching.nbytes <= weights(source) < 1.1 * report.plan.fetching.nbytes
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    whole = fit(
        source, tmp_path / "whole", dense_precision=dense_precision, keep_source=True, passes=1
    )
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    assert digests(whole.out) == digests(report.out)
    hub.forget()
    fit(source, tmp_path / "again", dense_precision=dense_precision, passes=1)
    assert hub.weight_bytes() == 0, "a model that is whole in the cache is read from there"
    assert digests(tmp_path / "again") == digests(report.out)


def test_a_folder_gives_the_same_weights(source: Path, hub: Hub, tmp_path: Path) -> None:
    fit(source, tmp_path / "parts")
    fit(source, tmp_path / "local", model=str(source), passes=1)
    ours, theirs = digests(tmp_path / "parts"), digests(tmp_path / "local")
    named = {"conmoe.json"}  # says where the model came from
    assert {k: v for k, v in ours.items() if k not in named} == {
        k: v for k, v in theirs.items() if k not in named
    }


@pytest.mark.parametrize("levers", [{"rate": 0.5}, {"rate": "auto", "bits": 3.0}], ids=str)
def test_two_passes_are_the_local_default(
    source: Path, hub: Hub, tmp_path: Path, levers: Any
) -> None:
    fit(source, tmp_path / "parts", passes=2, **levers)
    plan = api.plan(
        NAME, budget="4GB", device="cpu", calibration_tokens=512, passes=2, **levers
    ).fetching
    assert plan is not None
    assert weights(source) < hub.weight_bytes() <= plan.nbytes + 2 * allowance(source)
    fit(source, tmp_path / "whole", keep_source=True, **levers)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert load_manifest(tmp_path / "whole").notes == ()


def test_one_pass_says_so(source: Path, hub: Hub, tmp_path: Path) -> None:
    report = fit(source, tmp_path / "out")
    assert any("--passes 2" in note for note in report.notes)


class Watch(threading.Thread):
    """The most bytes that a folder held at any moment."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.done = folder, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            total = 0
            for place, _, names in os.walk(self.folder):
                for name in names:
                    try:
                        total += Path(place, name).stat().st_size
                    except OSError:
                        continue
            self.most = max(self.most, total)


@pytest.mark.parametrize(
    "levers", [{}, {"dense_precision": "int8"}, {"method": "conmoe", "scope": 2}]
)
def test_no_more_disk_than_the_plan_says(
    levers: dict[str, Any], source: Path, hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    watch = Watch(tmp_path / "disk")
    watch.start()
    report = fit(source, tmp_path / "disk" / "out", **levers)
    watch.done.set()
    watch.join()
    assert report.plan.fetching is not None
    extra = 256 << 10  # headers, manifest, journal, tokenizer
    assert watch.most > report.plan.fetching.disk_bytes // 2, "nothing was seen"
    assert watch.most <= report.plan.fetching.disk_bytes + extra


def child(run: Any, crash_at: int) -> int:
    def main() -> None:
        os.environ[CRASH_VARIABLE] = str(crash_at)
        run()

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("dense_precision", ["source", "int8"])
def test_killed_and_resumed_fetches_what_is_missing(
    dense_precision: str, source: Path, hub: Hub, tmp_path: Path
) -> None:
    fit(source, tmp_path / "whole", dense_precision=dense_precision)
    layer = weights(source) // 3
    for step in (20, 45, 75, 110):
        out = tmp_path / str(step) / "out"
        hub.forget()
        run = lambda out=out: fit(source, out, dense_precision=dense_precision)  # noqa: E731
        assert child(run, step) == CRASH_STATUS
        run()
        assert digests(out) == digests(tmp_path / "whole"), f"killed at step {step}"
        # headers twice; what was in flight; dense weights again where the first phase had not ended
        assert hub.weight_bytes() <= weights(source) + 2 * allowance(source) + layer


@pytest.mark.parametrize(
    "fault",
    [
        Fault("*.safetensors", times=9, cut_after=70_000),
        Fault("*.safetensors", times=2, status=503, skip=6),
        Fault("*.safetensors", times=20, wait=0.02),
        Fault("*.safetensors", times=1, status=403, skip=8),
    ],
    ids=["broken", "503", "slow", "signed address ran out"],
)
def test_broken_and_slow_connections(fault: Fault, source: Path, hub: Hub, tmp_path: Path) -> None:
    fit(source, tmp_path / "well", method="conmoe")
    hub.faults.append(fault)
    fit(source, tmp_path / "out", method="conmoe")
    assert fault.times == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "well")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("*.safetensors", etag="0" * 64, skip=3), "ETag"),
        (Fault("*.safetensors", no_ranges=True, skip=3), "whole files only"),
        (Fault("*.safetensors", status=404, skip=3), ""),
        (Fault("*.safetensors", cut_after=0, skip=3), "broke off"),
    ],
    ids=["another file", "no ranges", "gone", "nothing comes"],
)
def test_what_cannot_be_trusted_is_refused_by_name(
    fault: Fault, said: str, source: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conmoe_edge.checkpoint.sources.hub_ranges._FIRST_WAIT", 0.001)
    hub.faults.append(fault)
    with pytest.raises(ConmoeError) as caught:
        fit(source, tmp_path / "out", method="conmoe")
    assert said in caught.value.why
    assert not (tmp_path / "out").exists()


def test_changed_between_two_runs(source: Path, hub: Hub, tmp_path: Path) -> None:
    """The file of a commit never changes on an honest hub; elsewhere it is noticed by the fingerprint."""
    with pytest.raises(KeyboardInterrupt):
        fit(source, tmp_path / "out", progress=_stop)
    files = dict(hub.repositories[NAME])
    name = min(one for one in files if one.endswith(".safetensors"))
    data = bytearray((source / name).read_bytes())
    data[-1] ^= 1
    hub.repositories[NAME] = {**files, name: bytes_file(bytes(data), large=True)}
    with pytest.raises(ConmoeError, match="other settings"):
        fit(source, tmp_path / "out")


def _stop(step: Any) -> None:
    if step.stage == "calibrate" and step.step == 1:
        raise KeyboardInterrupt


def _without(name: str) -> Any:
    return lambda hub: hub.repositories.update(
        {NAME: {k: v for k, v in hub.repositories[NAME].items() if not k.startswith(name)}}
    )


def _config(**changes: Any) -> Any:
    def change(hub: Hub) -> None:
        files = dict(hub.repositories[NAME])
        config = json.loads(b"".join(files["config.json"].read(0, files["config.json"].size)))
        files["config.json"] = bytes_file(json.dumps({**config, **changes}).encode())
        hub.repositories[NAME] = files

    return change


@pytest.mark.parametrize(
    ("change", "levers", "error"),
    [
        (_without("tokenizer"), {}, ConmoeError),
        (_without("model.safetensors.index.json"), {}, ConmoeError),
        (_config(quantization_config={"quant_method": "no-such-form"}), {}, ConmoeError),
        (_config(model_type="llama", architectures=["LlamaForCausalLM"]), {}, ConmoeError),
        (None, {"budget": "1MB"}, DoesNotFit),
        (None, {"calibration": Path("absent.txt")}, ConmoeError),
        (None, {"calibration_tokens": 10**9, "rate": 0.5}, ConmoeError),
        (None, {"free": 10_000}, NoSpace),
        (None, {"exists": True}, OutputExists),
        (None, {"keep_source": True, "free": 10_000}, NoSpace),
        (None, {"rate": "auto", "exists": True}, OutputExists),
    ],
)
def test_a_refusal_fetches_no_weight(
    change: Any,
    levers: dict[str, Any],
    error: type[ConmoeError],
    source: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levers = dict(levers)
    if change is not None:
        change(hub)
    if (free := levers.pop("free", None)) is not None:
        monkeypatch.setattr("conmoe_edge.checkpoint.fs.disk.free_bytes", lambda path: free)
    if levers.pop("exists", False):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "conmoe.json").write_text("{}")
    with pytest.raises(error):
        fit(source, tmp_path / "out", **levers)
    assert hub.weight_bytes() <= allowance(source)


def test_unchanged_models_come_whole(source: Path, hub: Hub, tmp_path: Path) -> None:
    report = fit(source, tmp_path / "out", rate="auto")
    assert report.plan.plan.unchanged and report.plan.fetching is not None
    assert report.plan.fetching.cache_bytes == report.plan.fetching.nbytes
    assert hub.weight_bytes() <= weights(source) + allowance(source)


def test_the_token_goes_to_the_hub_alone(
    source: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.token = "hf_secret"
    fit(source, tmp_path / "out", method="conmoe")
    there = [one for one in hub.asked if not one.path.startswith("/cdn/")]
    elsewhere = [one for one in hub.asked if one.path.startswith("/cdn/")]
    assert there and all(one.authorization == "Bearer hf_secret" for one in there)
    assert elsewhere and all(one.authorization is None for one in elsewhere)
    assert {one.host.partition(":")[0] for one in elsewhere} == {"localhost"}


def test_without_redirects(source: Path, hub: Hub, tmp_path: Path) -> None:
    for host in (None, "127.0.0.1"):
        hub.cdn_host = host
        out = tmp_path / str(host)
        fit(source, out, method="conmoe")
    assert digests(tmp_path / "None") == digests(tmp_path / "127.0.0.1")


def test_plan_of_the_same_model(source: Path, hub: Hub, tmp_path: Path) -> None:
    report = api.plan(NAME, budget="4GB", device="cpu", rate=0.5, calibration_tokens=512)
    assert hub.weight_bytes() <= allowance(source)
    value = report.to_json()["fetching"]
    assert value["nbytes"] == report.anatomy.total_bytes
    assert value["disk_bytes"] > report.plan.disk_bytes
    assert fit(source, tmp_path / "out").plan.fetching == report.fetching
    local = api.plan(str(source), budget="4GB", device="cpu", rate=0.5)
    assert local.fetching is None and local.to_json()["fetching"] is None
