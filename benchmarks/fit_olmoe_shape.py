"""How long ``conmoe-edge fit`` takes on a true-size checkpoint, beside how long it has to take.

    python benchmarks/make_olmoe_shape.py --out /data/olmoe-shape --fsync
    python -m benchmarks.fit_olmoe_shape --model /data/olmoe-shape --out /data/olmoe-fit

Runs ``fit`` and then ``chat`` in processes of their own and measures their peak memory. Before and
after ``fit`` it measures what this machine can do; the better of the two counts, so the bound is
the harder one. The bound of a part is the work that cannot be left out, divided by that rate:

* read: every byte of the checkpoint once, from the disk (its files are dropped from the cache
  before), and every byte of the package once, for the receipt;
* attention: for every calibration and every held-out token, the attention projections, half of the
  score matrix (it is causal) and the router;
* experts: for the same tokens, the three projections of the chosen experts;
* distance: the Gram matrices of each scope's experts, half of them, as they are symmetric;
* write: every byte of the package that is not a link, fsync included;
* receipt: the held-out tokens through the attention and the consolidated experts of the package,
  where slots that share a prototype cost one evaluation (their expected number, from the
  reassignment map and even routing); the head for the original and for the consolidated model.

A part's FLOPs are divided by the best rate over fp32 and bf16, whichever the run used. Parts add
up: nothing is assumed to overlap. What is no part of the above (norms, softmax, checksums, sorting
tokens by expert, the journal, the check of the finished package, Python itself) has no bound and
counts fully against the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    Child,
    disk_read_rate,
    disk_write_rate,
    forget,
    machine,
    run_child,
)
from conmoe_edge.units import human_size, parse_size

RESULTS = Path(__file__).resolve().parent / "results"
SEQUENCE = 512
PROMPT = "Write one sentence about the sea."


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers of a checkpoint that the work depends on."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    width: int
    vocab: int
    nbytes: int

    @classmethod
    def of(cls, model: Path) -> Sizes:
        """From ``config.json`` and the files. Attention must be as wide as the model."""
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] != "olmoe" or (
            config["num_key_value_heads"] != config["num_attention_heads"]
        ):
            sys.exit(f"{model} is not of OLMoE's shape; write one with make_olmoe_shape.py")
        return cls(
            layers=config["num_hidden_layers"],
            experts=config["num_experts"],
            top_k=config["num_experts_per_tok"],
            hidden=config["hidden_size"],
            width=config["intermediate_size"],
            vocab=config["vocab_size"],
            nbytes=sum(path.stat().st_size for path in weights_of(model)),
        )

    def attention_flops(self, tokens: int) -> float:
        """Attention projections, causal scores and router, all layers."""
        projections = 4 * 2 * self.hidden**2
        scores = 2 * 2 * self.hidden * (SEQUENCE + 1) / 2  # QK and AV, over the mean context
        router = 2 * self.hidden * self.experts
        return tokens * self.layers * (projections + scores + router)

    def experts_flops(self, tokens: int, evaluations: float) -> float:
        """Gate, up and down; ``evaluations`` of experts per token, all layers added."""
        return tokens * evaluations * 3 * 2 * self.hidden * self.width

    def head_flops(self, tokens: int) -> float:
        """Logits."""
        return tokens * 2 * self.hidden * self.vocab

    def distance_flops(self, scope: int) -> float:
        """Half a Gram matrix over the experts of every scope."""
        numel = 3 * self.hidden * self.width
        whole, rest = divmod(self.layers, scope)
        pools = [scope * self.experts] * whole + ([rest * self.experts] if rest else [])
        return float(sum(pool**2 * numel for pool in pools))


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine did best: bytes and FLOPs per second."""

    read: float
    write: float
    gemm: dict[str, float]

    def better(self, other: Rates) -> Rates:
        """The faster of two measurements, one by one."""
        gemm = {name: max(rate, other.gemm[name]) for name, rate in self.gemm.items()}
        return Rates(max(self.read, other.read), max(self.write, other.write), gemm)

    def experts(self) -> float:
        """The rate of gate and up (two thirds of the FLOPs) followed by down (one third)."""
        return 1 / (2 / 3 / self.gemm["experts up"] + 1 / 3 / self.gemm["experts down"])


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the table; ``bound`` is ``None`` where nothing has to happen by our count."""

    name: str
    seconds: float
    bound: float | None
    work: str


def weights_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(folder.glob("*.safetensors"))


def measure_rates(model: Path, folder: Path, sizes: Sizes, scope: int) -> tuple[Rates, Any]:
    """Rates of this machine now, and the raw answer of the matrix measurement."""
    read, how = disk_read_rate(max(weights_of(model), key=lambda path: path.stat().st_size))
    write = disk_write_rate(folder)
    words = {
        "rows": 4096,
        "hidden": sizes.hidden,
        "width": sizes.width,
        "vocab": sizes.vocab,
        "pool": sizes.experts * scope,
    }
    command = [sys.executable, "-m", "benchmarks.measure", "gemm"]
    child = run_child([*command, *(f"{key}={value}" for key, value in words.items())])
    if child.returncode:
        sys.exit("the matrix rates could not be measured")
    raw = json.loads(child.stdout) | {"read_by": how}
    gemm: dict[str, float] = {}
    for rate in raw["rates"]:
        gemm[rate["name"]] = max(gemm.get(rate["name"], 0.0), rate["flops_per_second"])
    return Rates(read, write, gemm), raw


def evaluations(manifest: dict[str, Any], top_k: int) -> float:
    """Expert evaluations per token of the package, all layers added, if routing were even.

    A prototype that m of E slots lead to is evaluated unless none of the k chosen slots is its own.
    """
    total = 0.0
    for row in manifest["remap"].values():
        slots = len(row)
        for shared in Counter(tuple(target) for target in row if target is not None).values():
            total += 1 - comb(slots - shared, top_k) / comb(slots, top_k)
    return total


def parts_of(
    sizes: Sizes, rates: Rates, report: dict[str, Any], out: Path, calibration_tokens: int
) -> list[Part]:
    """Every part that the report names, with its bound; unknown names have none."""
    manifest = json.loads((out / "conmoe.json").read_text(encoding="utf-8"))
    held_out = int(report["receipt"]["tokens"])
    seen = calibration_tokens + held_out
    package = sum(path.stat().st_size for path in weights_of(out))
    own = sum(path.stat().st_size for path in weights_of(out) if path.stat().st_nlink == 1)

    attention = sizes.attention_flops(seen)
    experts = sizes.experts_flops(seen, sizes.layers * sizes.top_k)
    distance = sizes.distance_flops(int(manifest["scope"]))
    again_attention = sizes.attention_flops(held_out)
    again_experts = sizes.experts_flops(held_out, evaluations(manifest, sizes.top_k))
    heads = 2 * sizes.head_flops(held_out)
    again = (
        again_attention / rates.gemm["attention"]
        + again_experts / rates.experts()
        + heads / rates.gemm["head"]
    )
    bounds = {
        "read": ((sizes.nbytes + package) / rates.read, f"{(sizes.nbytes + package) / 1e9:.2f} GB"),
        "attention": (attention / rates.gemm["attention"], f"{attention / 1e12:.2f} TFLOP"),
        "experts": (experts / rates.experts(), f"{experts / 1e12:.2f} TFLOP"),
        "distance": (distance / rates.gemm["distance"], f"{distance / 1e12:.2f} TFLOP"),
        "write": (own / rates.write, f"{own / 1e9:.2f} GB"),
        "receipt": (again, f"{(again_attention + again_experts + heads) / 1e12:.2f} TFLOP"),
    }
    seconds = dict(report["seconds"])
    parts = [
        Part(name, float(seconds.pop(name, 0.0)), bound, work)
        for name, (bound, work) in bounds.items()
    ]
    return parts + [Part(name, float(spent), None, "") for name, spent in sorted(seconds.items())]


def table(parts: Sequence[Part], wall: float) -> list[str]:
    """Part, seconds, bound, ratio; the last line is the whole process."""
    lines = [f"{'part':<14}{'seconds':>10}{'bound':>10}{'ratio':>8}  work"]
    for part in parts:
        bound = "" if part.bound is None else f"{part.bound:.1f}"
        ratio = "" if not part.bound else f"{part.seconds / part.bound:.2f}"
        lines.append(f"{part.name:<14}{part.seconds:>10.1f}{bound:>10}{ratio:>8}  {part.work}")
    other = wall - sum(part.seconds for part in parts)
    total = sum(part.bound or 0.0 for part in parts)
    lines.append(f"{'not in a part':<14}{other:>10.1f}")
    lines.append(f"{'whole process':<14}{wall:>10.1f}{total:>10.1f}{wall / total:>8.2f}")
    return lines


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


def rate_lines(rates: Rates) -> list[str]:
    """The rates behind the bounds."""
    lines = [f"disk read {rates.read / 1e9:.2f} GB/s, write {rates.write / 1e9:.2f} GB/s"]
    gemm = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.gemm.items())
    return [*lines, f"matrix products in GFLOP/s: {gemm}"]


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
    sizes = Sizes.of(args.model)
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
