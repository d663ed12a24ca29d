"""What becomes of one configuration: a plan at full size, then the commands on a small model of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from benchmarks.published_configs.build import load
from benchmarks.published_configs.collection import Published
from benchmarks.published_configs.full_size import write_headers
from benchmarks.published_configs.shrink import shrunk
from benchmarks.published_configs.small_model import write_small
from conmoe_edge import api
from conmoe_edge.cli.main import main
from conmoe_edge.errors import ConmoeError

_BUDGET_SHARE, _GB = 0.6, 1_000_000_000
_TOLERANCE = 2e-5
_TEXT = "the quick brown fox jumps over the lazy dog 0123456789 " * 60
_TOKENS = 1024


def plan_full(published: Published, work: Path) -> dict[str, Any]:
    """Plan the model at full size for three fifths of its bytes, in RAM."""
    folder = work / "full"
    shutil.rmtree(folder, ignore_errors=True)
    written = write_headers(published.config, folder)
    found: dict[str, Any] = {
        "tensors": written.tensors,
        "bytes": written.nbytes,
        "form": written.form,
    }
    budget = f"{max(1, round(written.nbytes * _BUDGET_SHARE / _GB))}GB"
    started = time.process_time()
    try:
        report = api.plan(str(folder), budget=budget, device="cpu")
        chosen = report.plan.chosen
        found |= {"ok": True, "verdict": f"{budget}: rate {chosen.rate:.2f}, {chosen.precision}"}
    except ConmoeError as error:
        found |= {"ok": False, **_refusal(error)}
    except Exception as error:  # a fault of ours, which this table is there to show
        found |= {"ok": False, "crash": _crash(error)}
    found["cpu_seconds"] = round(time.process_time() - started, 2)
    shutil.rmtree(folder)
    return found


def run_small(published: Published, work: Path) -> dict[str, Any]:
    """``fit`` at rates 0 and 50 %, ``chat`` and ``eval`` of a small model of the same kind.

    Models whose small configurations are the same (Qwen3-30B and Qwen3-235B) share a run.
    """
    try:
        small = shrunk(published.config)
    except (
        Exception
    ) as error:  # of this script, or of a configuration that transformers does not build
        return {"small": {"ok": False, "crash": _crash(error)}}
    digest = hashlib.sha256(json.dumps(small, sort_keys=True).encode()).hexdigest()
    shared = work.parent / f"small-{digest[:16]}.json"
    if shared.is_file():
        return json.loads(shared.read_text())
    folder = work / "small"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = run_commands(small, folder)
    shutil.rmtree(folder)
    shared.write_text(json.dumps(found, indent=1))
    return found


def run_commands(small: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What every command makes of a model with the configuration ``small``; works in the empty ``folder``."""
    source, whole, half = folder / "source", folder / "whole", folder / "half"
    text = folder / "text.txt"
    text.write_text(_TEXT)
    found: dict[str, Any] = {}

    def stage(name: str, call: Callable[[], dict[str, Any]]) -> bool:
        try:
            found[name] = call()
        except ConmoeError as error:
            found[name] = {"ok": False, **_refusal(error)}
        except Exception as error:  # as above
            found[name] = {"ok": False, "crash": _crash(error)}
        return bool(found[name]["ok"])

    def make() -> dict[str, Any]:
        layers = (small.get("text_config") or small).get("num_hidden_layers")
        return {"ok": True, "layers": layers, "numbers": write_small(small, source)}

    def fit(out: Path, rate: float) -> dict[str, Any]:
        api.fit(
            str(source),
            out,
            budget="4GB",
            device="cpu",
            rate=rate,
            calibration=text,
            calibration_tokens=_TOKENS,
        )
        return {"ok": True}

    if (
        stage("small", make)
        and stage("fit 0", lambda: fit(whole, 0.0))
        and stage("logits", lambda: _compare(source, whole))
        and stage("fit 50 %", lambda: fit(half, 0.5))
    ):
        on = ("--device", "cpu", "--json")
        greedy = ("--prompt", "the fox", "--max-tokens", "6", "--temperature", "0")
        stage("chat", lambda: _command("chat", half, *greedy, *on))
        stage("eval", lambda: _command("eval", half, "--text", text, "--tokens", "256", *on))
    return found


def _compare(source: Path, package: Path) -> dict[str, Any]:
    """The largest difference of logits between the package and transformers' own model."""
    reference = load(source)
    tokens = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = reference(input_ids=tokens, use_cache=False).logits
        got = api.load(package, device="cpu")(input_ids=tokens, use_cache=False).logits
    worst = float((got - wanted).abs().max())
    return {"ok": worst <= _TOLERANCE, "difference": worst, "largest": float(wanted.abs().max())}


def _command(*words: Any) -> dict[str, Any]:
    done = CliRunner().invoke(main, [str(word) for word in words], input="")
    if done.exit_code == 0:
        return {"ok": True}
    crash = done.exception if not isinstance(done.exception, SystemExit) else None
    said = done.output.strip()[-600:]
    return {"ok": False, "crash": _crash(crash) if crash else "", "what": said}


def _refusal(error: ConmoeError) -> dict[str, str]:
    return {"what": error.what, "why": error.why, "fix": error.fix}


def _crash(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)
    ours = [
        one for one in where if "conmoe_edge" in one.filename or "published_configs" in one.filename
    ]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({place})"


def trial(published: Published, work: Path, *, small: bool = True) -> dict[str, Any]:
    """Both, as JSON; what is in ``work`` already is not done again."""
    work.mkdir(parents=True, exist_ok=True)
    full = _kept(work / "full.json", lambda: plan_full(published, work))
    done: dict[str, Any] = {}
    # What is refused at full size is refused small.
    if full["ok"] and (small or (work / "small.json").is_file()):
        done = _kept(work / "small.json", lambda: run_small(published, work))
    return {
        "name": published.name,
        "model_type": published.config.get("model_type"),
        "full": full,
        "small": done,
    }


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if path.is_file():
        return json.loads(path.read_text())
    try:
        made = make()
    except Exception as error:  # the configuration itself cannot be built: shown, not hidden
        made = {"ok": False, "crash": _crash(error)}
    path.write_text(json.dumps(made, indent=1))
    return made
