"""The clock on the wall may jump, a day back or ten years on, in the middle of anything: nothing is decided by it."""

from __future__ import annotations

import ast
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, save_tokenizer

import conmoe_edge
from conmoe_edge import api
from conmoe_edge.integrations.load import load_package
from conmoe_edge.memory import bandwidth

_YEARS = 10 * 365.25 * 86400
JUMPS = (0.0, -86400.0, _YEARS, -_YEARS, 3600.0)

MAY_ASK = {
    "memory/bandwidth.py",  # how old a measurement is; one from the future is made again
    "offload/generation/prompt_files.py",  # which file of a prompt was used last: what is deleted first, no more
    "offload/generation/template_process.py",  # the date, for templates that ask for it
    "serve/app.py",  # "created" of the model, for clients
    "serve/front_app.py",  # the same
    "serve/responses_api.py",  # the same, of a response
    "serve/replies.py",  # "created" of an answer, for clients
}


def jumping(patch: pytest.MonkeyPatch) -> None:
    """Every look at the clock on the wall finds it elsewhere."""
    now, jump = time.time, itertools.cycle(JUMPS)
    patch.setattr(time, "time", lambda: now() + next(jump))
    patch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    save_tiny("olmoe", folder)
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text("the quick brown fox jumps over the lazy dog 012 " * 30)
    return folder


def fit(source: Path, out: Path, **more: Any) -> None:
    levers = {"budget": "4GB", "device": "cpu", "rate": 0.5, "calibration_tokens": 512}
    api.fit(str(source), out, calibration=source.parent / "text.txt", **{**levers, **more})


def answer(package: Path) -> list[int]:
    model = load_package(package, device="cpu")
    try:
        prompt = torch.tensor([[5, 9, 2, 7]])
        found = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )
        return found[0].tolist()
    finally:
        model.conmoe.close()


def test_a_fit_and_an_answer_while_the_clock_jumps(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(source, tmp_path / "calm")
    left: list[float] = []
    with monkeypatch.context() as patch:
        jumping(patch)
        fit(
            source,
            tmp_path / "jumping",
            progress=lambda step: left.append(step.seconds_left or 0.0),
        )
        said = answer(tmp_path / "jumping")
    assert min(left) >= 0.0 and max(left) < 3600.0
    for path in sorted((tmp_path / "calm").iterdir()):
        if path.name != "machine.json":
            assert path.read_bytes() == (tmp_path / "jumping" / path.name).read_bytes(), path.name
    assert said == answer(tmp_path / "calm")


def test_a_run_goes_on_after_a_jump(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of an unfinished run, and a lock that nobody holds, from the future and from long ago."""
    fit(source, tmp_path / "whole")
    for number, when in enumerate((time.time() + _YEARS, 1.0)):
        out = tmp_path / f"out{number}"

        def stop(step: Any) -> None:
            if step.stage == "calibrate" and step.step == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(source, out, progress=stop)
        (tmp_path / f".{out.name}.lock").write_text("1\n")
        for path in tmp_path.rglob(f".{out.name}.*"):
            for one in [path, *path.rglob("*")]:
                os.utime(one, (when, when))
        seen: list[tuple[str, int]] = []
        fit(source, out, progress=lambda step, seen=seen: seen.append((step.stage, step.step)))
        assert ("calibrate", 1) in seen and ("calibrate", 0) not in seen
        assert (out / "conmoe.json").read_bytes() == (tmp_path / "whole/conmoe.json").read_bytes()


@pytest.mark.parametrize("age", [_YEARS, -_YEARS, -3600.0])
def test_a_measurement_from_another_time_is_made_again(
    age: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(bandwidth, "memory_bandwidth", lambda: 5e9)
    name = f"memory-{bandwidth.threads()}"
    entry = {name: {"bytes_per_second": 1, "measured": int(time.time() - age)}}
    (tmp_path / "bandwidth.json").write_text(json.dumps(entry))
    assert bandwidth.Meter(tmp_path).memory() == 5e9
    assert json.loads((tmp_path / "bandwidth.json").read_text())[name]["bytes_per_second"] == 5e9


def test_who_asks_the_clock_on_the_wall() -> None:
    """Everything else takes the time by ``perf_counter``, which does not jump."""
    root = Path(conmoe_edge.__file__).parent
    asking = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                wall = (node.value.id, node.attr) in (("time", "time"), ("time", "time_ns"))
                if wall or node.value.id == "datetime":
                    asking.add(path.relative_to(root).as_posix())
    assert asking == MAY_ASK
