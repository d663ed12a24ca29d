"""What rounding refitted weights of an MXFP4 model to MXFP4 again costs, beside int4 and beside no rounding.

    python -m benchmarks.mxfp4_refit
    python -m benchmarks.mxfp4_refit --methods auto mergemoe --rates 0.25 --seeds 0 1 2

No trained MXFP4 model comes with this project. The demo model stands in for one: its experts are rounded to MXFP4, and
that is the original. It lies on the disk in bf16, so the plan is told that it is MXFP4. A form says how records are
written: ``bf16``, ``mxfp4``, ``mxfp4/int4`` (down projections in int4, gate and up in MXFP4) or ``int4``.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import conmoe_edge
from conmoe_edge.checkpoint.format.forms import DOWN, Part, quantised_parts
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.compress.run import record_sizes
from conmoe_edge.model.anatomy import ExpertsAnatomy
from conmoe_edge.plan import levers

DEMO = Path(conmoe_edge.__file__).parent / "data" / "demo"
FORMS = ("bf16", "mxfp4", "mxfp4/int4", "int4")
RecordParts = Callable[[ExpertsAnatomy, str], tuple[Part, ...]]
USUAL: RecordParts = levers.record_parts


def rounded_demo(out: Path) -> Path:
    """The demo model with experts whose numbers MXFP4 holds."""
    if out.exists():
        return out
    shutil.copytree(DEMO, out)
    tensors = load_file(out / "model.safetensors")
    for name in [one for one in tensors if ".experts." in one]:
        tensors[name] = quantise(tensors[name], "mxfp4").dequantise(torch.bfloat16)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def _down_in_int4(experts: ExpertsAnatomy, kind: str) -> tuple[Part, ...]:
    found: list[Part] = []
    for part in experts.parts if kind == "mxfp4" else ():
        rows, columns = part.shape
        form = "int4" if part.name == DOWN else "mxfp4"
        found += quantised_parts(part.name, rows, columns, form)
    return tuple(found) or USUAL(experts, kind)


def kl_of(model: Path, out: Path, form: str, method: str, rate: float, seed: int) -> float:
    """Of one fit."""
    parts = _down_in_int4 if form == "mxfp4/int4" else USUAL
    levers.record_parts = record_sizes.record_parts = parts
    shutil.rmtree(out, ignore_errors=True)
    report = conmoe_edge.fit(
        str(model),
        out,
        budget="1TiB",
        device="cpu",
        rate=rate,
        method=method,
        precision=form.split("/", maxsplit=1)[0],
        calibration_tokens=8192,
        seed=seed,
        offline=True,
        fresh=True,
        overwrite=True,
    )
    shutil.rmtree(out)
    assert report.receipt is not None
    return report.receipt["kl"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--methods", nargs="+", default=["auto"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, default=Path("build/mxfp4-refit"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model = rounded_demo(args.work / "demo")
    levers.published_in = lambda anatomy: "mxfp4"
    for method in args.methods:
        for rate in args.rates:
            for form in FORMS:
                found = [
                    kl_of(model, args.work / "package", form, method, rate, seed)
                    for seed in args.seeds
                ]
                text = " ".join(f"{one:.4f}" for one in found)
                print(f"{method} {rate:.0%} {form}: KL {text}", flush=True)


if __name__ == "__main__":
    main()
