"""Loss against bytes: packages of this project beside llama.cpp's types, with an importance matrix from the same text.

    python -m benchmarks.frontier --llama-python /data/llama/bin/python
    python -m benchmarks.frontier --model ./checkpoint --parts experts --seeds 0 --fit "--bits 2.6" --types IQ2_S Q2_K
    python -m benchmarks.frontier --only ours                  # and --only llama
    python -m benchmarks.frontier --report-only

An arm is a part (``experts``: what is dense stays as it is; ``whole``: the whole file in few bits), a
set of flags of ``fit`` or one of llama.cpp's types, and a seed. The seed draws the calibration
windows (``fit --seed``), and the importance matrix is taken on the same ones; the held-out text is
the same for all arms. Ours are commands: ``conmoe-edge fit MODEL --seed S FLAGS``, then ``eval``.
llama.cpp's quantisers run on each expert by itself, and what comes back is measured by the code of
``eval``, so that only the weights differ. ``--llama-python`` (or ``CONMOE_LLAMA_PYTHON``) is a Python with
``llama-cpp-python`` and ``gguf``.

Every arm is written under --work when it is done, and is not run again; ``results/frontier.{json,txt,md,svg}``
are made from them at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.frontier_report import LLAMA, OURS, PARTS, key_of, lines
from benchmarks.measure import machine
from benchmarks.plots import frontier_svg
from conmoe_edge.checkpoint.fs.atomic_files import write_json

RESULTS = Path(__file__).resolve().parent / "results"
TYPES = (
    *("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS"),
    *("Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M"),
)
BITS = (4.5, 3.44, 3.06, 2.56, 2.31, 2.06, 1.75)
"""Sizes of llama.cpp's types, in bits a weight."""
DENSE = {"experts": ("--dense-precision", "source"), "whole": ()}
"""Where only experts are compared, all else stays; the whole file is the plan's to divide, as for any user."""
BUDGET = "1TiB"
"""More than any arm needs: its flags decide, and nothing else is to be decided by the budget."""
DENSE_BITS, EDGES_BITS = 4.5, 6.5625
"""Of llama.cpp's files beside experts of less than 5 bits: Q4_K, and Q6_K for embeddings and head."""
VARIABLE = "CONMOE_LLAMA_PYTHON"


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    options.work.mkdir(parents=True, exist_ok=True)
    ledger = options.work / "frontier.json"
    failed = []
    if not options.report_only:
        data = _opened(ledger, options)
        for system, run in ((LLAMA, _llama_arms), (OURS, _our_arms)):
            if options.only in (None, {LLAMA: "llama", OURS: "ours"}[system]):
                failed += run(options, data, ledger)
    data = json.loads(ledger.read_text(encoding="utf-8"))
    _report(data, options.results)
    for key, why in failed:
        sys.stderr.write(f"{key}: {why}\n")
    return 1 if failed else 0


def _opened(ledger: Path, options: Any) -> dict[str, Any]:
    """The ledger of this model and text; a new one knows the original's sizes and loss."""
    from conmoe_edge.checkpoint.sources.locate import locate

    settings = {
        "model": options.model,
        "tokens": options.tokens,
        "calibration_tokens": options.calibration_tokens,
    }
    if ledger.is_file():
        data = json.loads(ledger.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if data["settings"][name] != value:
                raise SystemExit(
                    f"{ledger} is about {name} {data['settings'][name]}; give another --work"
                )
        return data
    import conmoe_edge
    from benchmarks.frontier_llama import sizes_of

    folder = locate(options.model, offline=True).path
    sizes = sizes_of(folder)
    alone = conmoe_edge.evaluate(
        folder, against="none", tokens=options.tokens, continuations=0, device="cpu", offline=True
    )
    data = {
        "settings": settings,
        "model": options.model if options.model == "demo" else folder.name,
        "tokens": alone.quality.tokens,
        "loss": alone.quality.loss,
        "weights": {
            "experts": sizes.experts,
            "whole": sizes.all_weights,
        },
        "machine": machine(),
        "arms": {},
    }
    write_json(ledger, data)
    return data


def _our_arms(options: Any, data: dict[str, Any], ledger: Path) -> list[tuple[str, str]]:
    """Run what is not there yet; return what failed."""
    failed = []
    for seed in options.seeds:
        for part in options.parts:
            for flags in options.fit or _own_flags(options, part):
                key = key_of(part, OURS, flags, seed)
                if key in data["arms"]:
                    continue
                try:
                    row = _our_arm(options, part, flags, seed)
                except RuntimeError as error:
                    failed.append((key, str(error)))
                    continue
                _done(data, ledger, key, row)
    return failed


def _own_flags(options: Any, part: str) -> list[str]:
    """The arms where none were named: bits for the experts; for the whole file a budget, which is that of what runs
    llama.cpp's file with experts of so many bits, and the plan decides what has which bits.
    """
    if part == "experts":
        return [f"--bits {bits:g}" for bits in BITS]
    import conmoe_edge
    from benchmarks.frontier_llama import sizes_of
    from conmoe_edge.checkpoint.sources.locate import locate

    sizes = sizes_of(locate(options.model, offline=True).path)
    plan = conmoe_edge.plan(options.model, budget=BUDGET, device="cpu", offline=True).plan
    beside = sum(term.nbytes for term in plan.terms if term.name != "Dense weights")
    return [
        f"--gpu {(sizes.whole(bits, DENSE_BITS, EDGES_BITS) + beside) / 1e6:.3f}MB" for bits in BITS
    ]


def _our_arm(options: Any, part: str, flags: str, seed: int) -> dict[str, Any]:
    import conmoe_edge
    from conmoe_edge.checkpoint.package.manifest_io import load_manifest
    from conmoe_edge.checkpoint.package.slot_constants import CONSTANTS_FILE
    from conmoe_edge.compress.stream.streamed_model import prototype_bytes

    out = options.work / "package"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "conmoe_edge", "fit", options.model, "--out", str(out)]
    command += ["--device", "cpu", "--seed", str(seed), "--offline", "--fresh"]
    command += [] if "--gpu" in flags else ["--gpu", BUDGET]
    command += [*DENSE[part], *shlex.split(flags), "--overwrite", "--yes", "--quiet"]
    if options.calibration_tokens is not None:
        command += ["--calibration-tokens", str(options.calibration_tokens)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    took = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"fit ended with {done.returncode}")
    measured = conmoe_edge.evaluate(
        out,
        against=options.model,
        tokens=options.tokens,
        continuations=0,
        device="cpu",
        offline=True,
    )
    found = measured.quality
    manifest = load_manifest(out)
    constants = out / CONSTANTS_FILE
    extra = constants.stat().st_size if constants.is_file() else 0
    row = {
        "loss_original": found.reference_loss,
        "loss": found.loss,
        "kl": found.kl,
        "top1_agreement": found.top1_agreement,
        "exact_match": {kind: asdict(one) for kind, one in measured.exact_match.items()},
        "experts_bytes": prototype_bytes(manifest) + extra,
        "file_bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
        "fit_seconds": took,
    }
    shutil.rmtree(out, ignore_errors=True)
    return row


def _llama_arms(options: Any, data: dict[str, Any], ledger: Path) -> list[tuple[str, str]]:
    """As ``_our_arms``. The original goes through its layers once, the importance matrix is taken once a seed."""
    wanted = [
        (seed, part, kind)
        for seed in options.seeds
        for part in options.parts
        for kind in options.types
        if key_of(part, LLAMA, kind, seed) not in data["arms"]
    ]
    if not wanted:
        return []
    if options.llama_python is None:
        raise SystemExit(f"--llama-python or {VARIABLE} is needed for llama.cpp's arms")
    import numpy as np

    from benchmarks.frontier_llama import (
        hidden_of,
        importance_of,
        llama_arm,
        round_trips,
        sizes_of,
    )
    from conmoe_edge.checkpoint.sources.locate import locate
    from conmoe_edge.compress.stream.match_places import MatchPlaces
    from conmoe_edge.model.tokenizers import tokenizer_of

    failed = []
    folder = locate(options.model, offline=True).path
    sizes = sizes_of(folder)
    held_out = _tokens(folder, options, None)
    places = MatchPlaces(held_out, tokenizer_of(folder, None))
    before = hidden_of(folder, held_out)
    importance: dict[str, Any] = {}
    at = None
    with round_trips(options.llama_python) as trips:
        for seed, part, kind in wanted:
            if at != seed:
                kept = options.work / f"importance-{seed}.npz"
                if not kept.is_file():
                    found = importance_of(folder, _tokens(folder, options, seed))
                    beside = kept.with_suffix(".new.npz")
                    np.savez(beside, **found)  # type: ignore[arg-type]
                    beside.replace(kept)
                importance, at = dict(np.load(kept)), seed
            key = key_of(part, LLAMA, kind, seed)
            try:
                receipt = llama_arm(
                    folder,
                    held_out,
                    before,
                    importance,
                    trips,
                    kind,
                    part == "whole",
                    sizes,
                    places,
                )
            except RuntimeError as error:
                failed.append((key, str(error)))
                continue
            receipt["loss"] = receipt.pop("loss_consolidated")
            _done(data, ledger, key, {k: v for k, v in receipt.items() if k != "per_domain"})
    return failed


def _tokens(folder: Path, options: Any, seed: int | None) -> Any:
    """The calibration text as ``fit --seed`` takes it, or (``None``) the held-out text as ``eval`` does."""
    from conmoe_edge.compress.stream.calibration_text import (
        bundled_text,
        evaluation_set,
        token_sets,
    )
    from conmoe_edge.model.bridge import read_config
    from conmoe_edge.model.probe import longest_in
    from conmoe_edge.model.tokenizers import tokenizer_of
    from conmoe_edge.plan.request import CALIBRATION_TOKENS, SEQUENCE_LENGTH

    text, tokenizer = bundled_text(), tokenizer_of(folder, None)
    longest = longest_in(read_config(folder).get_text_config()) or SEQUENCE_LENGTH
    length = min(SEQUENCE_LENGTH, longest)
    if seed is None:
        return evaluation_set(text, tokenizer, length=length, tokens=options.tokens)
    tokens = options.calibration_tokens or CALIBRATION_TOKENS
    return token_sets(text, tokenizer, length=length, tokens=tokens, held_out_tokens=1, seed=seed)[
        0
    ]


def _done(data: dict[str, Any], ledger: Path, key: str, row: dict[str, Any]) -> None:
    if row["loss_original"] != data["loss"]:
        raise SystemExit(f"{key}: the original loses {row['loss_original']}, not {data['loss']}")
    if ledger.is_file():  # another process may run the other side
        data["arms"] = json.loads(ledger.read_text(encoding="utf-8"))["arms"] | data["arms"]
    data["arms"][key] = row
    write_json(ledger, data)
    rise = row["loss"] - row["loss_original"]
    size = row["experts_bytes"] / 1e6
    print(f"{key}: {size:.2f} MB of experts, {rise:+.4f} nats, KL {row['kl']:.5f}", flush=True)


def _report(data: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "frontier.json", data)
    for name, markdown in (("frontier.txt", False), ("frontier.md", True)):
        text = "\n".join(lines(data, markdown=markdown)) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "frontier.svg").write_text(frontier_svg(data), encoding="utf-8")
    print((folder / "frontier.txt").read_text(encoding="utf-8"), end="")


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier")
    parser.add_argument("--model", default="demo", help="alias or folder (default: demo)")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=["experts"])
    parser.add_argument("--only", choices=("ours", "llama"), help="run one side")
    parser.add_argument("--types", nargs="+", metavar="TYPE", default=list(TYPES))
    parser.add_argument(
        "--fit",
        action="append",
        metavar="FLAGS",
        help='flags of one arm of ours, such as "--bits 2.6"; may be repeated (default: sizes of theirs)',
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens")
    parser.add_argument("--calibration-tokens", type=int, help="default: as fit")
    parser.add_argument("--llama-python", default=os.environ.get(VARIABLE))
    parser.add_argument("--work", type=Path, default=Path("build/frontier"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the report goes")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
