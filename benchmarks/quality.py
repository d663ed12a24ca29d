"""Every method against every rate, on text that was held out: what each loses at which size.

    python -m benchmarks.quality                              # the demo model, all methods, three seeds
    python -m benchmarks.quality --methods conmoe auto --rates 0.5 --seeds 0
    python -m benchmarks.quality --model ./checkpoint --work /data/quality
    python -m benchmarks.quality --report-only

A cell is (method, rate, scope, seed): one ``fit`` in this process, with the prototypes in the
checkpoint's own format, and its receipt. The seed draws the calibration windows; the held-out text
is the same for all cells, and so is the original's loss on it. The package is deleted once its bytes
are counted. Results are written after every cell under --work, and a cell that is there is not run
again; ``results/quality.{json,txt,svg}`` are made from them at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from benchmarks.plots import quality_svg
from benchmarks.quality_report import Cell, key_of, lines
from conmoe_edge.checkpoint.fs.atomic_files import write_json

RESULTS = Path(__file__).resolve().parent / "results"
BUDGET = "1TiB"
"""More than any cell needs: the rate is forced, and nothing else is to be decided by the budget."""


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    from conmoe_edge.compress.methods import METHODS

    names = options.methods or list(METHODS)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        sys.stderr.write(f"There is no method {unknown[0]}; there are: {', '.join(METHODS)}\n")
        return 2
    options.work.mkdir(parents=True, exist_ok=True)
    ledger = options.work / "quality.json"
    data = _read(ledger, options.model, options.calibration_tokens)
    cells = [
        (name, rate, scope, seed)
        for seed in options.seeds
        for rate in options.rates
        for scope in options.scopes
        for name in names
    ]
    if not options.report_only:
        for number, (name, rate, scope, seed) in enumerate(cells):
            key = key_of(name, rate, scope, seed)
            if key in data["cells"]:
                continue
            data["cells"][key] = _run(options, name, rate, scope, seed)
            write_json(ledger, data)
            said = _said(data["cells"][key])
            print(f"[{number + 1}/{len(cells)}] {key}: {said}", flush=True)
    _report(data, options.results)
    return 0


def _run(options: Any, name: str, rate: float, scope: int, seed: int) -> dict[str, Any]:
    """One cell: what it cost, or why it cannot be."""
    import conmoe_edge
    from conmoe_edge.compress.methods import METHODS
    from conmoe_edge.compress.stream.streamed_model import prototype_bytes

    out = options.work / "package"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    try:
        report = conmoe_edge.fit(
            options.model,
            out,
            budget=BUDGET,
            device="cpu",
            rate=rate,
            scope=scope,
            precision=METHODS[name].precision or "source",
            method=name,
            calibration_tokens=options.calibration_tokens,
            seed=seed,
            offline=True,
            fresh=True,
            overwrite=True,
        )
    except conmoe_edge.ConmoeError as error:
        return {"refused": f"{error.what} {error.why}".strip()}
    from conmoe_edge.checkpoint.package.manifest_io import load_manifest

    took = time.perf_counter() - start
    receipt = report.receipt
    cell = {
        "title": METHODS[name].title,
        "published": METHODS[name].source != "this project",
        "loss_original": receipt["loss_original"],
        "loss": receipt["loss_consolidated"],
        "rise": receipt["loss_consolidated"] - receipt["loss_original"],
        "kl": receipt["kl"],
        "top1_agreement": receipt["top1_agreement"],
        "prototype_bytes": prototype_bytes(load_manifest(out)),
        "package_bytes": report.bytes_written,
        "seconds": took,
    }
    shutil.rmtree(out, ignore_errors=True)
    return cell


def _said(cell: dict[str, Any]) -> str:
    if "refused" in cell:
        return f"refused: {cell['refused']}"
    return f"{cell['rise']:+.4f} nats, KL {cell['kl']:.4f}, {cell['seconds']:.0f} s"


def _report(data: dict[str, Any], folder: Path) -> None:
    cells = {key: Cell.of(key, row) for key, row in data["cells"].items() if "refused" not in row}
    text = "\n".join(lines(list(cells.values()), data)) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "quality.json", data)
    (folder / "quality.txt").write_text(text, encoding="utf-8")
    (folder / "quality.svg").write_text(quality_svg(data), encoding="utf-8")
    print(text, end="")


def _read(path: Path, model: str, tokens: int | None) -> dict[str, Any]:
    fresh = {"model": model, "calibration_tokens": tokens, "machine": machine(), "cells": {}}
    if not path.is_file():
        return fresh
    data = json.loads(path.read_text(encoding="utf-8"))
    if (data["model"], data["calibration_tokens"]) != (model, tokens):
        raise SystemExit(f"{path} is about another model or calibration; give another --work")
    return data


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument("--model", default="demo", help="alias or folder (default: demo)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--scopes", nargs="+", type=int, default=[1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--calibration-tokens", type=int, help="default: as fit")
    parser.add_argument(
        "--work", type=Path, default=Path("build/quality"), help="ledger and package"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the report goes")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
