"""The GPU's operator: against plain formulas in Triton's interpreter, through a package, through its compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import DOWN, UP, Kind
from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.manifest import RecordLayout, SlotRecord
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.checkpoint.format.records import decode, encode, pack, view
from conmoe_edge.checkpoint.format.slot_map import NONE, SlotMap
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.offload.compute import backend
from conmoe_edge.offload.kernels.triton import launch as gpu
from conmoe_edge.offload.kernels.triton.launch import GpuForm, GpuLayer, GpuTable
from tests.families import tiny_model
from tests.hand_packages import identity, slots_of, write_package
from tests.offload.fastpath.single_tokens import steps
from tests.offload.kernels.interpreted import CPU, interpreted_operator

HIDDEN = 128
KINDS: tuple[Kind, ...] = ("plain", "int8", "int4", "mxfp4", "q4", "q3", "q2")
PAIRS = [(kind, kind) for kind in KINDS] + [("q3", "q4"), ("q2", "int8"), ("int4", "q2")]
"""Forms of gate and up rows, and of down rows."""


def layout_of(kinds: Kind | tuple[Kind, Kind], width: int, dtype: str = "bfloat16") -> RecordLayout:
    up, down = (kinds, kinds) if isinstance(kinds, str) else kinds
    parts = []
    for name, rows, columns, kind in ((UP, 2 * width, HIDDEN, up), (DOWN, HIDDEN, width, down)):
        made = gpu._parts(name, rows, columns, kind)
        parts += [(name, shape, dtype) for name, shape, _ in made] if kind == "plain" else made
    return make_layout(parts)


class Lying:
    """Experts of different widths in records in memory, and what they should compute."""

    def __init__(
        self,
        kinds: Kind | tuple[Kind, Kind],
        widths: Sequence[int],
        dtype: str = "bfloat16",
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        layouts = [layout_of(kinds, width, dtype) for width in widths]
        self.table = GpuTable(layouts, list(range(len(widths))), CPU)
        self.records, self.experts = [], []
        for number, (layout, width) in enumerate(zip(layouts, widths, strict=True)):
            given = {
                UP: torch.randn(2 * width, HIDDEN, generator=generator) / 8,
                DOWN: torch.randn(HIDDEN, width, generator=generator) / 8,
            }
            record = pack(layout, encode(layout, given, False))
            self.records.append(record)
            self.experts.append(decode(view(layout, record), torch.float64, False))
            self.table.put(number, record.data_ptr())

    def expected(self, number: int, x: Tensor) -> Tensor:
        """[1, H] -> [1, H] in fp64."""
        up, down = (self.experts[number][name].double() for name in (UP, DOWN))
        gate, rest = (x.double() @ up.T).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * rest) @ down.T


def layer_of(
    table: GpuTable,
    targets: Sequence[int],
    scales: Sequence[float] | None = None,
    constants: Tensor | None = None,
    constant_of: Sequence[int] | None = None,
) -> tuple[GpuLayer, SlotMap]:
    slots = SlotMap(
        0,
        tuple(targets),
        tuple(scales or [1.0] * len(targets)),
        tuple(constant_of or [NONE] * len(targets)),
    )
    layer = GpuLayer.of(table, SlotTensors.of(slots, constants, CPU))
    assert layer is not None
    return layer, slots


def test_it_finds_itself_right() -> None:
    assert gpu.check(interpreted_operator()) == ""


def test_without_a_gpu_there_is_none() -> None:
    assert gpu.gpu_operator(CPU) is None and "no GPU" in gpu.why_not(CPU)


def test_a_kernel_that_computes_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = interpreted_operator()
    own = engine.experts

    def wrong(layer: Any, chosen: Any, wanted: int, x: Tensor) -> None:
        own(layer, chosen, wanted, x)
        chosen.outputs[0, 3] += 0.1

    monkeypatch.setattr(engine, "experts", wrong)
    assert "something else" in gpu.check(engine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scaled", [False, True])
def test_merging_is_that_of_plain_numbers(dtype: torch.dtype, scaled: bool) -> None:
    engine = interpreted_operator()
    lying = Lying("plain", [32] * 5)
    targets = [4, 0, 0, -1, 2, 1, 1, 3]
    factors = [1.0, 0.5, 2.0, 1.0, 0.25, 1.0, 3.0, 1.0] if scaled else None
    layer, known = layer_of(lying.table, targets, factors)
    generator = torch.Generator().manual_seed(3)
    asked = 0
    for count in (1, 3, 6, 8):
        for _ in range(6):
            slots = torch.randint(-1, 9, (1, count), generator=generator)
            gates = torch.rand(1, count, generator=generator).to(dtype)
            chosen = engine.merge(layer, slots, gates, counted=True)
            wanted = known.merge(slots[0].tolist(), gates[0].tolist())
            found = [number for number in chosen.numbers.tolist() if number >= 0]
            assert chosen.numbers.tolist() == [*wanted, *[-1] * (count - len(wanted))]
            assert torch.allclose(
                chosen.weights[: len(found)], torch.tensor(list(wanted.values())), rtol=1e-7
            )
            asked += len(wanted)
    assert lying.table.asked.item() == asked


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [*[(pair, torch.bfloat16) for pair in PAIRS], (("plain", "plain"), torch.float16)],
)
def test_experts_of_any_width(kinds: tuple[Kind, Kind], dtype: torch.dtype) -> None:
    """Against fp64, and each the same bits alone."""
    engine = interpreted_operator()
    widths = (64, 32, 96, 160)
    lying = Lying(kinds, widths, str(dtype).removeprefix("torch."))
    layer, _ = layer_of(lying.table, list(range(len(widths))))
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)
    slots, gates = torch.arange(4).unsqueeze(0), torch.ones(1, 4)
    chosen = engine.merge(layer, slots, gates, counted=False)
    engine.experts(layer, chosen, 0b1111, x)
    together = chosen.outputs.clone()
    for number in range(4):
        wanted = lying.expected(number, x)
        assert torch.allclose(together[number].double(), wanted[0], rtol=1e-4, atol=1e-5)
    chosen.outputs.zero_()
    engine.experts(layer, chosen, 0b0101, x)
    assert torch.equal(chosen.outputs[[0, 2]], together[[0, 2]])
    assert not chosen.outputs[[1, 3]].any()
    engine.experts(layer, chosen, 0b1010, x)
    assert torch.equal(chosen.outputs, together)


def test_the_sum_of_prototypes_and_constants() -> None:
    engine = interpreted_operator()
    lying = Lying("plain", [32, 32, 32])
    generator = torch.Generator().manual_seed(4)
    constants = torch.randn(2, HIDDEN, generator=generator)
    layer, known = layer_of(
        lying.table, [2, 0, -1, 0], [1.0, 0.5, 1.0, 2.0], constants, [-1, 0, 1, 1]
    )
    x = torch.randn(1, HIDDEN, generator=generator).bfloat16()
    for row in ([0, 1, 2, 3], [2, 9, 2, 2], [3, 1, 0, -1]):
        slots, gates = torch.tensor([row]), torch.rand(1, 4, generator=generator)
        chosen = engine.merge(layer, slots, gates, counted=False)
        engine.experts(layer, chosen, 0b1111, x)
        found = engine.combine(layer, chosen, slots, gates, torch.float32)
        wanted = torch.zeros(1, HIDDEN, dtype=torch.float64)
        for number, weight in known.merge(row, gates[0].tolist()).items():
            wanted += weight * lying.expected(number, x)
        for place, gate in known.gated_constants(row, gates[0].tolist()):
            wanted += gate * constants[place].double()
        assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4)
        assert engine.combine(layer, chosen, slots, gates, torch.bfloat16).dtype == torch.bfloat16


def test_what_the_kernels_do_not_take() -> None:
    assert GpuForm.of(layout_of("plain", 32, "float32")) is None
    assert GpuForm.of(layout_of("plain", 24)) is None, "rows are read 16 numbers at a time"
    assert GpuForm.of(make_layout([(UP, (64, HIDDEN), "bfloat16")])) is None
    biased = [(UP, (64, HIDDEN), "bfloat16"), (DOWN, (HIDDEN, 32), "bfloat16")]
    assert GpuForm.of(make_layout(biased)) is not None
    assert GpuForm.of(make_layout([*biased, (UP + "_bias", (64,), "bfloat16")])) is None
    assert GpuForm.of(layout_of("q3", 16)) is None, "a group has 32 columns, a tile 64 rows"
    assert GpuForm.of(layout_of(("q3", "q4"), 32)) is not None
    layouts = [layout_of("plain", 32), layout_of("int8", 32)]
    mixed = GpuTable(layouts, [0, 1], CPU)

    def slots(*targets: int) -> SlotTensors:
        return SlotTensors.of(SlotMap(0, targets, (1.0, 1.0), (NONE, NONE)), None, CPU)

    assert GpuLayer.of(mixed, slots(0, 1)) is None
    assert GpuLayer.of(mixed, slots(1, NONE)) is not None
    with pytest.raises(ValueError, match="not there"):
        GpuLayer.of(mixed, slots(1, 2))


def test_constants_of_another_width_are_refused() -> None:
    lying = Lying("plain", [32])
    with pytest.raises(ValueError, match="width"):
        layer_of(lying.table, [0, NONE], None, torch.zeros(1, HIDDEN + 1), [NONE, 0])


# -- through a package ---------------------------------------------------------------------------------


def package_of(tmp_path: Path, kind: Kind) -> Path:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}
    sizes |= {"num_attention_heads": 8, "num_hidden_layers": 2}  # the interpreter takes its time
    model = tiny_model("olmoe", dtype=torch.bfloat16, **sizes)

    def slot(layer: int, expert: int) -> SlotRecord:
        """Slots that are shared, scaled, dropped and alone."""
        if expert == 3:
            return SlotRecord(None)
        own = identity(model)[layer][expert - expert % 2].prototype
        return SlotRecord(own, 1.0 if expert % 2 == 0 else 0.5)

    return write_package(model, tmp_path, slots_of(model, slot), kind=kind)


def on_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(backend, "gpu_operator", lambda device: interpreted_operator())
        return load_package(folder, **options)


TOKENS = [3, 1, 4]


@pytest.mark.parametrize("kind", ["plain", "int8", "int4", "q3"])
def test_a_package_gives_the_same_bits_at_any_number_of_slots(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = package_of(tmp_path, kind)
    plain: Any = load_package(folder)
    wanted, _ = steps(plain, TOKENS)
    whole = on_gpu(folder, monkeypatch)
    found, _ = steps(whole, TOKENS)
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    if kind == "plain":  # elsewhere a processor rounds activations to 8 bits
        assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    stats, theirs = whole.conmoe.stats(), plain.conmoe.stats()
    assert stats.kernel == "triton" and stats.misses == 0
    assert 0 < stats.hits <= theirs.hits
    for slots in (1, 5):
        few = on_gpu(folder, monkeypatch, slots=(slots,), cache_policy="lru")
        again, _ = steps(few, TOKENS)
        assert torch.equal(again, found)
        assert few.conmoe.stats().misses > 0
        few.conmoe.close()
    whole.conmoe.reset_stats()
    assert whole.conmoe.stats().hits == 0


def test_nothing_is_read_back_where_all_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_gpu(package_of(tmp_path, "plain"), monkeypatch)
    _, cache = steps(model, TOKENS[:2])
    monkeypatch.setattr(Tensor, "tolist", lambda self: pytest.fail("the router was read back"))
    monkeypatch.setattr(Tensor, "item", lambda self: pytest.fail("the router was read back"))
    monkeypatch.setattr(model.conmoe.residency, "visit", None)
    monkeypatch.setattr(model.conmoe.residency, "used", None)
    steps(model, TOKENS[2:], cache)


def test_a_retreat_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_gpu(package_of(tmp_path, "plain"), monkeypatch)
    wanted, _ = steps(model, TOKENS)
    before = model.conmoe.stats().hits
    assert model.conmoe.retreat()
    found, _ = steps(model, TOKENS)
    assert torch.equal(found, wanted)
    stats = model.conmoe.stats()
    assert stats.misses > 0 and stats.hits > before


def test_other_gates_keep_their_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    folder = write_package(model, tmp_path, identity(model))
    wanted, _ = steps(load_package(folder), TOKENS)
    found, _ = steps(on_gpu(folder, monkeypatch), TOKENS)
    assert torch.equal(found, wanted)


def test_both_matrices_have_scales_where_a_module_keeps_them_the_other_way() -> None:
    """A plain weight of such a module is [in, out], which the kernels do not read."""
    for kinds, whole in (
        (("q3", "q4"), True),
        (("q3", "plain"), False),
        (("plain", "int8"), False),
    ):
        layer, _ = layer_of(GpuTable([layout_of(kinds, 32)], [0], CPU), [0])
        assert layer.quantised is whole


# -- the compiler --------------------------------------------------------------------------------------


@cache
def loads(*cards: str) -> dict[str, dict[str, list[str]]]:
    """Card -> kernel and its options -> the widths of its loads, by a process in which nothing is interpreted."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.offload.kernels.compile_kernels",
        *cards,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", ["75", "80", "90"])
def test_every_kernel_compiles_and_reads_weights_16_bytes_at_a_time(capability: str) -> None:
    found = loads()[capability]
    assert {name.split()[0] for name in found} == {"rows", "tiles", "planes", "merge", "combine"}
    for name, widths in found.items():
        if name.startswith(("rows", "tiles 64", "planes")):
            assert "v4.b32" in widths, name
        if name.startswith(("rows bf16", "rows fp16")):  # elsewhere scales are read in twos
            assert "b16" not in widths, name


@pytest.mark.parametrize(
    "card",
    [
        "gfx1100",
        pytest.param("gfx1030", marks=pytest.mark.slow),
        pytest.param("gfx942", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles_for_amd(card: str) -> None:
    """ROCm's Triton compiles them where it finds such a card; here its compiler alone does. With 32 threads in a
    wavefront weights are read 16 bytes at a time as well.
    """
    found = loads(card)[card]
    assert {name.split()[0] for name in found} == {"rows", "tiles", "planes", "merge", "combine"}
    for name, widths in found.items():
        if card != "gfx942" and name.startswith(("rows", "tiles 64", "planes")):
            assert {"dwordx4", "b128"} & set(widths), name


def test_a_real_matrix_is_what_the_interpreter_saw() -> None:
    """The tiles that the kernels read are those that ``quantise`` writes: one column of one tile by hand."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(9))
    matrix = quantise(weight, "int4")
    assert matrix.scales is not None
    column = 5
    both = matrix.values.flatten()[column * 32 : column * 32 + 32].int()
    numbers = torch.cat([both & 15, both >> 4]) - 8
    scale, zero = matrix.scales[0].float().unbind(-1)
    assert torch.allclose(numbers * scale + zero, matrix.dequantise()[:, column])
