"""How long ``conmoe-edge fit`` takes on a true-size checkpoint, beside how long it has to take.

    python benchmarks/make_olmoe_shape.py --out /data/olmoe-shape --fsync
    python -m benchmarks.fit_olmoe_shape --model /data/olmoe-shape --out /data/olmoe-fit

Runs ``fit`` and then ``chat`` in processes of their own and measures their peak memory. Before and
after ``fit`` it measures what this machine can do; the better of the two counts, so the bound is
the harder one. ``fit_bounds.py`` says what the bound of a part is.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.fit_bounds import (
    SEQUENCE,
    Sizes,
    measure_rates,
    parts_of,
    rate_lines,
    table,
    weights_of,
)
from benchmarks.measure import Child, forget, machine, run_child
from conmoe_edge.units import human_size, parse_size

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT = "Write one sentence about the sea."


def memory_line(name: str, child: Child) -> str:
    """Peaks of one child."""
    text = (
        f"{name}: peak resident {human_size(child.peak_rss)}, "
        f"of which not file-backed at most {human_size(child.peak_anonymous)}"
    )
    if child.cgroup_peak is not None:
        text += f"; cgroup peak with page cache {human_size(child.cgroup_peak)}"
    if child.limit is not None:
        text += f" under a hard limit of {human_size(child.limit)}"
    return text


def fit(model: Path, out: Path, args: argparse.Namespace) -> Child:
    """Run ``fit`` on a cold cache."""
    forget(weights_of(model))
    command = [
        *(sys.executable, "-m", "conmoe_edge.cli.main", "fit", str(model)),
        *("--gpu", args.gpu, "--device", "cpu", "--out", str(out)),
        *("--calibration-tokens", str(args.calibration_tokens)),
        *("--offline", "--fresh", "--overwrite", "--yes", "--json"),
        *args.fit_args,
    ]
    return run_child(command, args.limit)


def chat(out: Path, args: argparse.Namespace) -> Child:
    """Ask the package something, once, on a cold cache."""
    forget(weights_of(out))
    command = [
        *(sys.executable, "-m", "conmoe_edge.cli.main", "chat", str(out)),
        *("--gpu", args.chat_gpu, "--device", "cpu", "--prompt", PROMPT),
        *("--max-tokens", "32", "--json"),
    ]
    return run_child(command, args.limit)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, help="made by make_olmoe_shape.py")
    parser.add_argument("--out", type=Path, required=True, help="package to write; is replaced")
    parser.add_argument("--gpu", default="8GB", help="budget of fit")
    parser.add_argument("--chat-gpu", default="4GB", help="budget of chat")
    parser.add_argument("--calibration-tokens", type=int, default=64 * SEQUENCE)
    parser.add_argument("--limit", type=parse_size, help="hard memory limit of both, e.g. 4GiB")
    parser.add_argument("--name", default="olmoe-shape", help="file name of the results")
    parser.add_argument("fit_args", nargs="*", help="more flags for fit, after --")
    return parser.parse_args()


def without_folders(text: str, args: argparse.Namespace) -> str:
    """Results are read elsewhere: names instead of where things lay on this machine."""
    for path in (args.model, args.out, Path(sys.executable)):
        text = text.replace(str(path), path.name).replace(str(path.absolute()), path.name)
    return text


def main() -> None:
    """Measure, run, count, print."""
    args = arguments()
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    sizes = Sizes.of(config, sum(path.stat().st_size for path in weights_of(args.model)))
    folder = args.out.absolute().parent
    before, raw_before = measure_rates(args.model, folder, sizes, scope=1)

    run = fit(args.model, args.out, args)
    if run.returncode:
        sys.exit(f"fit ended with exit code {run.returncode}\n{run.stdout}")
    report = json.loads(run.stdout)
    after, raw_after = measure_rates(args.model, folder, sizes, scope=1)
    rates = before.better(after)
    parts = parts_of(sizes, rates, report, args.out, args.calibration_tokens)

    answer = chat(args.out, args)
    here = machine() | {"torch": raw_before["torch"], "threads": raw_before["threads"]}
    lines = [
        f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads, torch {here['torch']}",
        *rate_lines(rates),
        "",
        f"fit --gpu {args.gpu}, {args.calibration_tokens} calibration tokens",
        *table(parts, run.seconds),
        memory_line("fit", run),
        memory_line("chat", answer) + f", exit code {answer.returncode}",
    ]
    result = {
        "machine": here,
        "rates": asdict(rates),
        "rates_before": raw_before,
        "rates_after": raw_after,
        "parts": [asdict(part) for part in parts],
        "fit": asdict(run) | {"stdout": report},
        "chat": asdict(answer),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (RESULTS / f"{args.name}.json").write_text(
        without_folders(json.dumps(result, indent=2), args) + "\n", encoding="utf-8"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
