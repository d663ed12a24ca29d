"""Write a package of a true shape with random numbers in its records, without a checkpoint and without a fit.

    python -m benchmarks.comparison.random_package --config DIR/config.json --precision q3 --dense-precision q4 \\
        --out PACKAGE

For measuring speed: forms, layouts, files and manifest are those that ``fit`` writes, through the same writers, and
the numbers in a matrix are random bytes under scales that give its weights a spread of ``STD`` about zero. Embeddings
have a spread of 1, norms are ones and routers those of ``generated_checkpoint.py``, so that activations and routes stay
sane through all layers; with ``--router-skew 0`` all experts are asked for about as often, the worst case for a cache.
Every router slot has an expert of its own. It takes as long as writing the files.

Peak memory: the largest matrix outside the experts, as stored.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.generated_checkpoint import ROUTERS, SKEW, router_row
from conmoe_edge.checkpoint.format.forms import (
    DENSE_KINDS,
    LOW_HEAD,
    Kind,
    kind_of,
    quantised_parts,
)
from conmoe_edge.checkpoint.format.forms import SCALE as RECORD_SCALE
from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.manifest import (
    ExpertId,
    Manifest,
    PrototypeEntry,
    RecordLayout,
    SlotRecord,
)
from conmoe_edge.checkpoint.format.records import form_of, pack
from conmoe_edge.checkpoint.package.dense_names import DENSE_SCALE
from conmoe_edge.checkpoint.package.manifest_io import save_manifest
from conmoe_edge.checkpoint.tensors.tensor_writer import TensorSource, write_dense, write_records
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.model.bridge import build_meta
from conmoe_edge.model.experts import find_experts, part_names
from conmoe_edge.model.linears import dense_forms, quantisable_weights
from conmoe_edge.model.probe import probe
from conmoe_edge.plan.levers import record_parts

STD, EMBEDDING_STD = 0.02, 1.0
FILE = "prototypes-00001-of-00001.safetensors"
DEMO = Path(__file__).resolve().parents[2] / "conmoe_edge" / "data" / "demo"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_SIZES_OF_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEVELS = {"int8": 256, "int4": 16, "q6": 64, "q4": 16, "q3": 8, "q2": 4}


class Drawing:
    """Random tensors from one seed. ``skew``: of the rows of routers."""

    def __init__(self, seed: int = 0, skew: float = SKEW) -> None:
        self.skew = skew
        self._draw = np.random.Generator(np.random.PCG64(seed))

    def numbers(self, shape: tuple[int, ...], dtype: str, std: float) -> Tensor:
        """Normal numbers."""
        values = self._draw.standard_normal(shape, np.float32) * np.float32(std)
        return torch.from_numpy(values).to(getattr(torch, dtype))

    def values(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Random bytes."""
        count = math.prod(shape)
        words = self._draw.integers(0, 1 << 64, -(-count // 8), np.uint64)
        found = torch.from_numpy(words.view(np.uint8)[:count].reshape(shape))
        return found.view(getattr(torch, dtype))


def scales_of(kind: Kind, shape: tuple[int, ...], std: float) -> Tensor:
    """Scales that give weights whose numbers are random bytes a spread of ``std`` about zero.

    Raises:
        ValueError: a form that this does not know.
    """
    if kind == "mxfp4":
        spread = math.sqrt(sum(one * one for one in _SIZES_OF_E2M1) / len(_SIZES_OF_E2M1))
        code = 127 + round(math.log2(std / spread))
        return torch.full(shape, code, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    if kind not in _LEVELS:
        raise ValueError(f"no random numbers are known in {kind}")
    step = std / math.sqrt((_LEVELS[kind] ** 2 - 1) / 12)
    if kind == "int8":
        return torch.full(shape, step, dtype=torch.bfloat16)
    if kind == "int4":  # (q - 8) scale + zero, q about 7.5
        pairs = torch.empty(shape, dtype=torch.bfloat16)
        pairs[..., 0], pairs[..., 1] = step, step / 2
        return pairs
    most, none = 15, 8  # s and z of every group
    pair = torch.tensor([step / most, step / most], dtype=torch.bfloat16)
    scales = torch.full(shape, most | none << 4, dtype=torch.uint8)
    head = pair.repeat(shape[1]).view(torch.uint8)
    scales[:LOW_HEAD] = head.view(LOW_HEAD, -1)
    return scales


def record(layout: RecordLayout, draw: Drawing) -> Tensor:
    """One prototype."""
    parts = {part.name: part for part in layout.parts}
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        if name.endswith(RECORD_SCALE):
            kind = form_of(layout, name.removesuffix(RECORD_SCALE))
            tensors[name] = scales_of(kind, part.shape, STD)
        elif name + RECORD_SCALE in parts:
            tensors[name] = draw.values(part.shape, part.dtype)
        else:
            tensors[name] = draw.numbers(part.shape, part.dtype, STD)
    return pack(layout, tensors)


def dense_sources(model: Any, precision: str, draw: Drawing) -> Iterator[TensorSource]:
    """Everything but the experts."""
    fused = {
        f"{path}.{name}" for path, one in find_experts(model).values() for name in part_names(one)
    }
    forms: dict[str, Kind] = {}
    if precision != "source":
        forms = dense_forms(quantisable_weights(model), precision)
    table = model.get_input_embeddings()
    for name, weight in model.state_dict().items():
        if name in fused:
            continue
        std = EMBEDDING_STD if weight.shape == table.weight.shape and "embed" in name else STD
        if name in forms:
            rows, columns = weight.shape
            values, scales = quantised_parts(name, rows, columns, forms[name])
            yield TensorSource(
                name, values[2], values[1], lambda one=values: draw.values(one[1], one[2])
            )
            kind = kind_of((values[2], values[1]), (scales[2], scales[1]))
            assert kind is not None
            yield TensorSource(
                name + DENSE_SCALE,
                scales[2],
                scales[1],
                lambda kind=kind, one=scales, std=std: scales_of(kind, one[1], std),
            )
            continue
        dtype, shape = str(weight.dtype).removeprefix("torch."), tuple(weight.shape)
        if "norm" in name:
            yield TensorSource(
                name, dtype, shape, lambda w=weight: torch.ones(w.shape, dtype=w.dtype)
            )
        else:
            yield TensorSource(
                name,
                dtype,
                shape,
                lambda s=shape, d=dtype, std=std, n=name: _dense(draw, n, s, d, std),
            )


def _dense(draw: Drawing, name: str, shape: tuple[int, ...], dtype: str, std: float) -> Tensor:
    numbers = draw.numbers(shape, dtype, std)
    if name.endswith(ROUTERS):
        rows = [router_row(one, shape[0], draw.skew) for one in range(shape[0])]
        numbers *= torch.tensor(rows, dtype=numbers.dtype).unsqueeze(1)
    return numbers


def layouts_of(anatomy: ModelAnatomy, kind: str) -> dict[int, RecordLayout]:
    """Layer -> the layout of its records."""
    return {
        layer.index: make_layout(record_parts(layer.experts, kind), kind)
        for layer in anatomy.moe_layers
        if layer.experts is not None
    }


def write(
    settings: dict[str, Any], out: Path, precision: str, dense: str, skew: float = SKEW
) -> int:
    """The package; bytes of its weights.

    Args:
        settings: ``config.json`` of the shape.
        precision, dense: of the records, and of the other matrices.
        skew: of the routers' rows (``router_row``).
    """
    folder = out.with_name(out.name + ".part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = {key: one for key, one in settings.items() if key != "quantization_config"}
    config = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    anatomy, draw = probe(config), Drawing(skew=skew)
    of_layer = layouts_of(anatomy, precision)
    layouts = list(dict.fromkeys(of_layer.values()))
    counts = {
        layer.index: layer.experts.count
        for layer in anatomy.moe_layers
        if layer.experts is not None
    }
    ids = [ExpertId(layer, expert) for layer, count in counts.items() for expert in range(count)]
    names = {one: f"prototypes.{one.layer}.{one.expert}" for one in ids}
    written = write_records(
        folder / FILE,
        {names[one]: of_layer[one.layer].nbytes for one in ids},
        ((names[one], record(of_layer[one.layer], draw)) for one in ids),
    )
    model = build_meta(config, torch.bfloat16)
    files = [written, *write_dense(folder, list(dense_sources(model, dense, draw)))]
    slots = {
        layer: tuple(SlotRecord(ExpertId(layer, expert)) for expert in range(count))
        for layer, count in counts.items()
    }
    manifest = Manifest(
        source={"name": "random", "revision": None, "fingerprint": "0"},
        method="conmoe",
        rate=0.0,
        scope=1,
        precision=precision,
        dense_precision=dense,
        layouts=tuple(layouts),
        prototypes=tuple(
            PrototypeEntry(
                one,
                written.name,
                written.offsets[names[one]],
                layouts.index(of_layer[one.layer]),
                1.0 / len(ids),
            )
            for one in ids
        ),
        slots=slots,
        files={file.name: file.entry() for file in files},
        tool_version="0.1.0",
    )
    save_manifest(folder, manifest)
    settings["quantization_config"] = {"quant_method": "conmoe", "format_version": 1}
    (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    for name in _TOKENIZER:
        shutil.copyfile(DEMO / name, folder / name)
    shutil.rmtree(out, ignore_errors=True)
    folder.rename(out)
    return sum(file.size for file in files if file.name.endswith(".safetensors"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--config", type=Path, required=True, help="config.json of the shape")
    parser.add_argument("--precision", required=True, help="of the records: int4, q3, q2-q3, ...")
    parser.add_argument("--dense-precision", choices=("source", *DENSE_KINDS), default="source")
    parser.add_argument(
        "--router-skew", type=float, default=SKEW, help="0: routers with rows alike"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    settings = json.loads(args.config.read_text(encoding="utf-8"))
    nbytes = write(settings, args.out, args.precision, args.dense_precision, args.router_skew)
    print(f"{args.out.name}: {nbytes:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
