"""How long a ``fit`` has to take on a machine: the work that cannot be left out over what the machine does best.

* read: every byte of the checkpoint once from the disk, or what has to come from the hub (the experts twice more where
  the layers are surveyed); every byte of the package once, for the receipt;
* attention: for every calibration and every held-out token, the attention projections, half of the score matrix (it is
  causal), the router, shared experts and layers without experts; twice for calibration tokens where the package's own
  stream is followed too;
* experts: for the same tokens, the three projections of the chosen experts;
* method: where records are rounded with error feedback, half of every Gram matrix (they are symmetric), one Cholesky
  factor of each, and for R rows of C columns R C^2 for what columns make up for each other. With ``auto`` beside that:
  - what neurons are worth: gate and up of every expert on its tokens, half a Gram matrix of the activations, its factor
    and its inverse, and where there are bits to choose one more factor;
  - the refit: gate and up of every prototype as it is stored, three products of its down projection (what it gives, the
    gradient, what its change gives), one factor and one solution of its equations;
* survey: the original over the sequences that stand-ins are made from, and twice over three others; stand-ins once over
  three, and three divisions of them over three more; what neurons are worth, on the first;
* distance: the Gram matrices of each scope's experts, half of them, for methods that compare weights;
* write: every byte of the package that is not a link, fsync included;
* receipt: the held-out tokens through the attention and the consolidated experts of the package, where slots that share
  a prototype cost one evaluation (their expected number, from the reassignment map and even routing); the head for the
  original and for the consolidated model.

A part's FLOPs are divided by the best rate over fp32 and bf16, whichever the run used. Parts add up: nothing is assumed
to overlap. What is no part of the above (norms, softmax, checksums, sorting tokens by expert, grids of scales, the
journal, the check of the finished package, Python itself) has no bound and counts fully against the run.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from benchmarks.measure import BLOCK, disk_read_rate, disk_write_rate, forget, run_child

SEQUENCE = 512
_REFITS = "auto"
_FITTED, _MEASURED, _DIVISIONS = (2, 6, 4), 3, 3
"""Of the survey, as ``compress/phases`` has them: stand-ins are made from a fourth of the sequences, at least two, at
most six, and measured on three; divisions that are tried, fewer where two are alike."""
_AS_THEY_ARE = ("source", "bf16", "mxfp4", "lowrank")
"""Precisions that nothing is rounded to with feedback; for the others the package's own stream is followed too."""
_COMPARE_WEIGHTS = ("conmoe",)
_FREE = "free"
"""Precision of a package whose prototypes have kinds of their own."""


Prototypes = Sequence[tuple[int, int]]
"""Neurons of a prototype, and how many of all layers together have so many."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers of a checkpoint that the work depends on.

    Attributes:
        layers: all decoder layers.
        moe_layers: those with routed experts.
        queries, keys: width of all heads' queries, and of keys (and values).
        shared: neurons of a layer's shared experts together.
        dense_width: of a layer without experts.
        nbytes: of the checkpoint.
    """

    layers: int
    moe_layers: int
    experts: int
    top_k: int
    hidden: int
    width: int
    queries: int
    keys: int
    shared: int
    dense_width: int
    vocab: int
    nbytes: int

    @classmethod
    def of(cls, config: Mapping[str, Any], nbytes: int) -> Sizes:
        """From ``config.json`` of a model with attention of the usual kind and gated experts.

        Raises:
            ValueError: a kind of model that was not looked at.
        """
        kind = config["model_type"]
        if kind not in ("olmoe", "qwen3_moe", "deepseek", "gpt_oss"):
            raise ValueError(f"no bounds are known for {kind}")
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head = config.get("head_dim") or hidden // heads
        width = config.get("moe_intermediate_size") or config["intermediate_size"]
        counts = ("num_experts", "n_routed_experts", "num_local_experts")
        layers = config["num_hidden_layers"]
        return cls(
            layers=layers,
            moe_layers=layers - config.get("first_k_dense_replace", 0),
            experts=next(config[name] for name in counts if name in config),
            top_k=config["num_experts_per_tok"],
            hidden=hidden,
            width=width,
            queries=heads * head,
            keys=config["num_key_value_heads"] * head,
            shared=config.get("n_shared_experts", 0) * width,
            dense_width=config["intermediate_size"],
            vocab=config["vocab_size"],
            nbytes=nbytes,
        )

    def attention_flops(self, tokens: int) -> float:
        """Attention projections, causal scores, router, shared experts, layers without experts."""
        projections = 2 * 2 * self.hidden * (self.queries + self.keys)
        scores = 2 * 2 * self.queries * (SEQUENCE + 1) / 2  # QK and AV, over the mean context
        router = 2 * self.hidden * self.experts
        gated = 3 * 2 * self.hidden
        total = self.layers * (projections + scores)
        total += self.moe_layers * (router + gated * self.shared)
        total += (self.layers - self.moe_layers) * gated * self.dense_width
        return tokens * total

    def experts_flops(self, tokens: int, evaluations: float) -> float:
        """Gate, up and down; ``evaluations`` of experts per token, all layers added."""
        return tokens * evaluations * 3 * 2 * self.hidden * self.width

    def head_flops(self, tokens: int) -> float:
        """Logits."""
        return tokens * 2 * self.hidden * self.vocab

    def distance_flops(self, scope: int) -> float:
        """Half a Gram matrix over the experts of every scope."""
        numel = 3 * self.hidden * self.width
        whole, rest = divmod(self.moe_layers, scope)
        pools = [scope * self.experts] * whole + ([rest * self.experts] if rest else [])
        return float(sum(pool**2 * numel for pool in pools))

    def rounding_flops(self, tokens: int, prototypes: Prototypes) -> float:
        """Gram matrices of what comes to every prototype, their factors, and columns that make up for each other.

        Args:
            tokens: of calibration.
            prototypes: of all layers.
        """
        inner, total = self.hidden, 0.0
        for width, count in prototypes:
            grams = self.visits(tokens, prototypes) * (inner**2 + width**2)
            factors = (inner**3 + width**3) / 3
            total += count * (grams + factors + 2 * width * inner**2 + inner * width**2)
        return total

    def narrowing_flops(self, tokens: int, *, choosing_bits: bool) -> float:
        """What the neurons of every expert are worth, and what noise in its down projection costs."""
        width = self.width
        seen = tokens * self.top_k * (2 * 2 * self.hidden * width + width**2)
        solved = self.experts * width**3 * (1 + 1 / 3 * choosing_bits)
        return self.moe_layers * (seen + solved)

    def refit_flops(self, tokens: int, prototypes: Prototypes, *, rounds: bool) -> float:
        """Activations, products with down projections and their equations; where nothing is rounded the Gram matrices
        of the activations, too (else they are those of ``rounding_flops``).
        """
        total = 0.0
        for width, count in prototypes:
            products = (2 + 3) * 2 * self.hidden * width + (0 if rounds else width**2)
            system = width**3 / 3 + 2 * width**2 * self.hidden
            total += count * (self.visits(tokens, prototypes) * products + system)
        return total

    def visits(self, tokens: int, prototypes: Prototypes) -> float:
        """Tokens that come to a prototype, if routing were even and every slot led to one."""
        return tokens * self.top_k * self.moe_layers / sum(count for _, count in prototypes)

    def survey_flops(self, tokens: int, prototypes: Prototypes, *, choosing_bits: bool) -> Survey:
        """``tokens``: of calibration."""
        least, most, share = _FITTED
        fitted = max(least, min(most, tokens // SEQUENCE // share)) * SEQUENCE
        measured = _MEASURED * SEQUENCE
        original, others = fitted + 2 * measured, (1 + _DIVISIONS) * measured
        left = sum(width * count for width, count in prototypes) / self.width
        evaluations = self.moe_layers * self.top_k * left / (self.moe_layers * self.experts)
        return Survey(
            self.attention_flops(original + others),
            self.experts_flops(original, self.moe_layers * self.top_k)
            + self.experts_flops(others, evaluations),
            self.narrowing_flops(fitted, choosing_bits=choosing_bits),
        )


@dataclass(frozen=True, slots=True)
class Survey:
    """FLOPs of a survey."""

    attention: float
    experts: float
    narrowing: float

    def all(self) -> float:
        """Together."""
        return self.attention + self.experts + self.narrowing


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


def measure_rates(model: Path | None, folder: Path, sizes: Sizes, scope: int) -> tuple[Rates, Any]:
    """Rates of this machine now, and the raw answer of the matrix measurement. Without a ``model`` on the disk what is
    read is no longer than what is written: a file is written in ``folder`` to be read.
    """
    write = disk_write_rate(folder)
    if model is None:
        read, how = _own_read_rate(folder)
    else:
        read, how = disk_read_rate(max(weights_of(model), key=lambda path: path.stat().st_size))
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


def _own_read_rate(folder: Path) -> tuple[float, str]:
    path = folder / "read-rate"
    try:
        with path.open("wb") as file:
            for _ in range(64):
                file.write(bytes(BLOCK))
            file.flush()
            os.fsync(file.fileno())
        forget([path])
        return disk_read_rate(path)
    finally:
        path.unlink(missing_ok=True)


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
    sizes: Sizes,
    rates: Rates,
    report: dict[str, Any],
    out: Path,
    calibration_tokens: int,
    source_rate: float | None = None,
) -> list[Part]:
    """Every part that the report names, with its bound; unknown names have none.

    Args:
        source_rate: bytes a second that the checkpoint comes with, where that is not from this disk.
    """
    manifest = json.loads((out / "conmoe.json").read_text(encoding="utf-8"))
    method = str(manifest["method"])
    if method == "unchanged":  # a model that fits as it is comes over, and that is all
        seconds = {name: float(spent) for name, spent in dict(report["seconds"]).items()}
        own, work = sizes.nbytes / (source_rate or rates.read), f"{sizes.nbytes / 1e9:.2f} GB"
        rest = [Part(name, spent, None, "") for name, spent in sorted(seconds.items())]
        return [Part("fetch", sum(seconds.values()), own, work), *rest]
    held_out = int(report["receipt"]["tokens"])
    kept = [(int(one["width"]), int(one["prototypes"])) for one in report["division"]]
    rounds = manifest["precision"] not in _AS_THEY_ARE
    changes = rounds or any(width < sizes.width for width, _ in kept)
    changes |= sum(count for _, count in kept) < sizes.moe_layers * sizes.experts
    solves = method == _REFITS and changes
    streams = 2 if rounds or method == _REFITS else 1
    seen = calibration_tokens + held_out
    package = sum(path.stat().st_size for path in weights_of(out))
    own = sum(path.stat().st_size for path in weights_of(out) if path.stat().st_nlink == 1)
    choosing = manifest["precision"] == _FREE

    attention = sizes.attention_flops(streams * calibration_tokens + held_out)
    experts = sizes.experts_flops(seen, sizes.moe_layers * sizes.top_k)
    solving = sizes.rounding_flops(calibration_tokens, kept) if rounds else 0.0
    if solves:
        solving += sizes.narrowing_flops(calibration_tokens, choosing_bits=choosing)
        solving += sizes.refit_flops(calibration_tokens, kept, rounds=rounds)
    distance = sizes.distance_flops(int(manifest["scope"])) if method in _COMPARE_WEIGHTS else 0.0
    surveyed = None
    if "survey" in report["seconds"]:
        surveyed = sizes.survey_flops(calibration_tokens, kept, choosing_bits=choosing)
    again_attention = sizes.attention_flops(held_out)
    again_experts = sizes.experts_flops(held_out, evaluations(manifest, sizes.top_k))
    heads = 2 * sizes.head_flops(held_out)
    again = (
        again_attention / rates.gemm["attention"]
        + again_experts / rates.experts()
        + heads / rates.gemm["head"]
    )
    fetched = report.get("fetching")
    source = sizes.nbytes if fetched is None else int(fetched["nbytes"])
    reading = source / (source_rate or rates.read) + package / rates.read
    bounds = {
        "read": (reading, f"{(source + package) / 1e9:.2f} GB"),
        "attention": (attention / rates.gemm["attention"], f"{attention / 1e12:.2f} TFLOP"),
        "experts": (experts / rates.experts(), f"{experts / 1e12:.2f} TFLOP"),
        "method": (solving / rates.gemm["attention"], f"{solving / 1e12:.2f} TFLOP"),
        "distance": (distance / rates.gemm["distance"], f"{distance / 1e12:.2f} TFLOP"),
        "write": (own / rates.write, f"{own / 1e9:.2f} GB"),
        "receipt": (again, f"{(again_attention + again_experts + heads) / 1e12:.2f} TFLOP"),
    }
    if surveyed is not None:
        spent = surveyed.experts / rates.experts()
        spent += (surveyed.attention + surveyed.narrowing) / rates.gemm["attention"]
        bounds["survey"] = (spent, f"{surveyed.all() / 1e12:.2f} TFLOP")
    bounds = {name: one for name, one in bounds.items() if one[0]}
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


def rate_lines(rates: Rates) -> list[str]:
    """The rates behind the bounds."""
    lines = [f"disk read {rates.read / 1e9:.2f} GB/s, write {rates.write / 1e9:.2f} GB/s"]
    gemm = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.gemm.items())
    return [*lines, f"matrix products in GFLOP/s: {gemm}"]
