"""gpt-oss-20b's shape in MXFP4: packages of this project beside llama.cpp, with the same bytes under the same cap.

    python -m benchmarks.make_gpt_oss_shape --out /data/gpt-oss-shape
    python -m benchmarks.fit_gpt_oss_shape --model /data/gpt-oss-shape --gpu 16GB --out /data/gpt-oss-16
    python -m benchmarks.fit_gpt_oss_shape --model /data/gpt-oss-shape --gpu 8GB --out /data/gpt-oss-8 --limit 24GiB
    /data/llama/bin/python -m benchmarks.comparison.gpt_oss_gguf --model /data/gpt-oss-shape --out /data/whole.gguf
    /data/llama/bin/python -m benchmarks.comparison.gpt_oss_gguf --model /data/gpt-oss-shape --experts 16 \\
        --out /data/half.gguf
    python -m benchmarks.gpt_oss_speed --llama-python /data/llama/bin/python --work /data/speed --cap 16GB \\
        --ours /data/gpt-oss-16 --llama /data/whole.gguf
    python -m benchmarks.gpt_oss_speed --llama-python /data/llama/bin/python --work /data/speed --cap 8GB \\
        --ours /data/gpt-oss-8 --llama /data/half.gguf /data/whole.gguf

Every arm is a process of its own under the cap (a memory cgroup; page cache counts, no swap), its files dropped from
the page cache before; prompt, steps and clock are those of ``compare.py``. Arms take turns, over all repeats. The GGUF
has the checkpoint's own blocks, so the whole one has the package's numbers; the half one has as many bytes as a package
from which half of the experts' bytes have gone. Routes are the models' own: weights are random, and so is whom a token
asks for. llama.cpp runs with its weights mapped, as they are and repacked for its kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.comparison.capped import run_capped
from benchmarks.measure import forget, machine
from conmoe_edge.units import human_size, parse_size

RESULTS = Path(__file__).resolve().parent / "results"
MARGIN = 256 << 20
"""Left of the cap beside our budget: pages of the cache that buffered reads pass through."""
LOAD_SECONDS = 900.0

Run = dict[str, Any]


def tokens_of(count: int) -> list[int]:
    """The first tokens of the held-out text."""
    code = (
        "import json, sys; from benchmarks.comparison.traces import text_tokens; "
        "print(json.dumps(text_tokens('heldout', 1, int(sys.argv[1]))[0].tolist()))"
    )
    command = [sys.executable, "-c", code, str(count)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def arms_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Name, command and what is its own in a job."""
    budget = f"{(args.cap - MARGIN) >> 20}MiB"
    ours = [sys.executable, "-m", "benchmarks.comparison.our_arm"]
    llama = [args.llama_python, "-m", "benchmarks.comparison.llama_arm"]
    arms = [
        {"name": path.name, "command": ours, "job": {"path": str(path), "budget": budget}}
        for path in args.ours
    ]
    for path in args.llama:
        for repack in (False, True):
            name = f"llama.cpp {path.stem}{' repacked' if repack else ''}"
            arms.append(
                {"name": name, "command": llama, "job": {"path": str(path), "repack": repack}}
            )
    return arms


def run(arm: dict[str, Any], args: argparse.Namespace, tokens: list[int]) -> Run:
    """One arm, once."""
    job = {
        "threads": args.threads,
        "context": -(-(len(tokens) + 1) // 256) * 256,
        "prompt": tokens[: args.prompt_tokens],
        "text": tokens[args.prompt_tokens :],
        "steps": args.tokens,
        "seconds": args.seconds_per_arm,
        **arm["job"],
    }
    path = Path(job["path"])
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    forget(files)
    job_file, notes_file = args.work / "job.json", args.work / "notes.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    notes_file.unlink(missing_ok=True)
    command = [*arm["command"], str(job_file), str(notes_file)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    limit = LOAD_SECONDS + 2 * args.seconds_per_arm
    done = run_capped(command, args.cap, limit, environment)
    notes = json.loads(notes_file.read_text(encoding="utf-8")) if notes_file.exists() else {}
    seconds = notes.get("step_seconds") or []
    return {
        "arm": arm["name"],
        "bytes": sum(one.stat().st_size for one in files),
        "returncode": done.returncode,
        "out_of_memory": done.out_of_memory,
        "stage": notes.get("stage"),
        "peak": done.peak,
        "load_seconds": notes.get("load_seconds"),
        "first_token_seconds": notes.get("first_token_seconds"),
        "step_seconds": seconds,
        "tokens_per_second": 1.0 / statistics.median(seconds) if seconds else None,
        "mean_tokens_per_second": len(seconds) / sum(seconds) if seconds else None,
        "steps_bytes": notes.get("steps_bytes"),
        "tail": "" if done.returncode == 0 else done.tail[-400:],
    }


def lines_of(runs: list[Run], cap: int) -> list[str]:
    """A line for every arm: medians over its repeats."""
    lines = [f"under {human_size(cap)}"]
    lines.append(f"{'arm':<32}{'bytes':>10}{'first s':>9}{'tokens/s':>10}{'mean':>8}{'peak':>10}")
    for name in dict.fromkeys(one["arm"] for one in runs):
        mine = [one for one in runs if one["arm"] == name]
        good = [one for one in mine if one["returncode"] == 0 and one["tokens_per_second"]]
        size = human_size(mine[0]["bytes"])
        if not good:
            word = "out of memory" if mine[0]["out_of_memory"] else f"failed ({mine[0]['stage']})"
            lines.append(f"{name:<32}{size:>10}  {word}")
            continue

        def middle(key: str, of: list[Run] = good) -> float:
            return statistics.median(float(one[key]) for one in of)

        peak = max((one["peak"] or 0) for one in good)
        lines.append(
            f"{name:<32}{size:>10}{middle('first_token_seconds'):>9.1f}{middle('tokens_per_second'):>10.2f}"
            f"{middle('mean_tokens_per_second'):>8.2f}{human_size(peak):>10}"
        )
    return lines


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ours", type=Path, nargs="*", default=[], help="packages")
    parser.add_argument("--llama", type=Path, nargs="*", default=[], help="GGUF files")
    parser.add_argument("--llama-python", required=True, help="interpreter with llama_cpp and gguf")
    parser.add_argument("--work", type=Path, required=True, help="folder for small files")
    parser.add_argument("--cap", type=parse_size, required=True, help="memory of every arm")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48, help="steps of each arm")
    parser.add_argument("--seconds-per-arm", type=float, default=90.0, help="decoding ends then")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", help="file name of the results; gpt-oss-speed-CAP by default")
    return parser.parse_args()


def main() -> None:
    """Turn after turn; results are written after every one."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    tokens = tokens_of(args.prompt_tokens + args.tokens)
    here = machine()
    head = f"{here['cpu']}, {here['cores']} cores, {args.threads} threads"
    runs: list[Run] = []
    lines: list[str] = []
    name = args.name or f"gpt-oss-speed-{round(args.cap / 1e9)}gb"
    RESULTS.mkdir(exist_ok=True)
    for repeat in range(args.repeats):
        for arm in arms_of(args):
            runs.append(run(arm, args, tokens))
            last = runs[-1]
            print(
                f"{repeat} {last['arm']}: {last['tokens_per_second']}", file=sys.stderr, flush=True
            )
            lines = [head, *lines_of(runs, args.cap)]
            (RESULTS / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            text = json.dumps({"machine": here, "cap": args.cap, "runs": runs}, indent=1)
            (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
