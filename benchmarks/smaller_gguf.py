"""The smaller GGUF beside the full one: size and perplexity in llama.cpp, at the same type and at the same size.

    python -m benchmarks.smaller_gguf --model demo --work /tmp/gguf --llama-python LLAMA/bin/python

Fits the model for GGUF at several rates (every expert kept, each with fewer neurons), exports each in several types
with an importance matrix, and measures each file on held-out text in llama.cpp itself. Prints a table and writes
``smaller-gguf.json`` into the work folder. What is there already is taken again. Disk: all the files.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from conmoe_edge import api
from conmoe_edge.compress.stream.calibration_text import bundled_text, evaluation_set
from conmoe_edge.model.tokenizers import load_tokenizer

_PROGRAM = Path(__file__).with_name("comparison") / "llama_perplexity.py"
_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Measured:
    """One file: experts' neurons, type, bytes, nats a token on the held-out text."""

    width: int
    kind: str
    weighed: bool
    nbytes: int
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@dataclass(frozen=True, slots=True)
class Bench:
    """Settings of a run."""

    model: str
    work: Path
    llama_python: Path
    budget: str
    kinds: tuple[str, ...]
    tokens: int
    threads: int

    def package(self, rate: float) -> Path:
        """The package at a rate; the model as it is at 0."""
        folder = self.work / f"package-{rate:g}"
        if not folder.exists():
            asked = "auto" if rate == 0 else rate
            api.fit(self.model, folder, budget=self.budget, device="cpu", engine="gguf", rate=asked)
        return folder

    def measure(self, rate: float, kind: str, *, weighed: bool = True) -> Measured:
        """Export and measure one file."""
        name = f"{rate:g}-{kind}{'' if weighed else '-plain'}"
        noted = self.work / f"{name}.json"
        if noted.exists():
            return Measured(**json.loads(noted.read_text(encoding="utf-8")))
        package, path = self.package(rate), self.work / f"{name}.gguf"
        done = api.export(
            package,
            path,
            form="gguf",
            quantise=None if kind == "BF16" else kind,
            outtype="bf16",
            imatrix=weighed,
            llama_python=self.llama_python,
            overwrite=True,
        )
        found = Measured(done.width, kind, weighed, done.nbytes, self.loss(package, path))
        noted.write_text(json.dumps(asdict(found)), encoding="utf-8")
        print(name, found, flush=True)
        return found

    def loss(self, package: Path, path: Path) -> float:
        """Nats a token of a file on the held-out text."""
        tokenizer = load_tokenizer(package)
        rows = evaluation_set(bundled_text(), tokenizer, length=_LENGTH, tokens=self.tokens)
        kept = [
            ids[mask].tolist()
            for ids, mask in zip(rows.ids, rows.mask, strict=True)
            if int(mask.sum()) > 1
        ]
        job = {"path": str(path), "rows": kept, "threads": self.threads}
        done = subprocess.run(
            [str(self.llama_python), str(_PROGRAM)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=True,
        )
        return float(json.loads(done.stdout)["loss"])


def table(rows: list[Measured], full: list[Measured]) -> str:
    """Each smaller file beside the full one of its type, and beside the full one whose size is nearest."""
    lines = [
        "neurons  type    MB      ppl     | full, same type   | full, nearest size",
        "                                 | MB      ppl       | type    MB      ppl",
    ]
    for row in rows:
        same = next(one for one in full if one.kind == row.kind)
        near = min(full, key=lambda one: abs(one.nbytes - row.nbytes))
        lines.append(
            f"{row.width:<8} {row.kind:<7} {row.nbytes / 1e6:<7.2f} {row.perplexity:<7.3f} "
            f"| {same.nbytes / 1e6:<7.2f} {same.perplexity:<9.3f} "
            f"| {near.kind:<7} {near.nbytes / 1e6:<7.2f} {near.perplexity:.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llama-python", type=Path, required=True)
    parser.add_argument("--gpu", default="2GB", help="budget that the model itself fits into")
    parser.add_argument("--rates", type=float, nargs="+", default=[1 / 3, 2 / 3])
    parser.add_argument(
        "--types",
        nargs="+",
        default=["BF16", "Q8_0", "Q5_0", "IQ4_NL", "Q4_0"],
        help="of llama.cpp",
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of held-out text")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        args.model,
        args.work,
        args.llama_python,
        args.gpu,
        tuple(args.types),
        args.tokens,
        args.threads,
    )
    full = [bench.measure(0.0, kind) for kind in bench.kinds]
    small = [bench.measure(rate, kind) for rate in args.rates for kind in bench.kinds]
    least = bench.kinds[-1]
    plain = [bench.measure(rate, least, weighed=False) for rate in (0.0, *args.rates)]
    print(table([*full, *small], full))
    print(f"Without an importance matrix, {least}:")
    for row in plain:
        print(f"{row.width:<8} {row.nbytes / 1e6:<7.2f} {row.perplexity:.3f}")
    found = {"model": args.model, "tokens": args.tokens, "files": [*full, *small, *plain]}
    found["files"] = [asdict(one) for one in found["files"]]
    (args.work / "smaller-gguf.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
