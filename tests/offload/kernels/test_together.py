"""One token each of several answers in one call: every row has the bits that it has alone, whatever its company."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import Grid, Kind
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.offload.kernels.cpu.bindings import Cached, ExpertGate, Prepared, operator
from conmoe_edge.offload.kernels.cpu.structs import GRID_CODES
from tests.families import tiny_model
from tests.offload.kernels.operator_layers import ROOM, Builder, Tables, positions_of
from tests.offload.kernels.test_cpu_layers import SETTINGS, Watch, layers_of, random_parts

ENGINE = operator()
pytestmark = pytest.mark.skipif(ENGINE is None, reason="no compiler here")

KINDS: tuple[Kind, ...] = ("plain", "int8", "int4", "mxfp4", "q6", "q4", "q3", "q2")
FORMS = [(kind, None) for kind in KINDS] + [
    ("grid4", Grid(32, dtype, zeros)) for dtype, zeros in GRID_CODES
]
GPT_OSS = ExpertGate(alpha=1.7, limit=1.0, interleaved=True)


def prepared(rows: int, columns: int, kind: Any, grid: Grid | None, seed: int) -> Prepared:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    matrix = quantise(weight.bfloat16() if kind == "plain" else weight, kind, grid)
    assert ENGINE is not None
    found = ENGINE.prepare(matrix)
    assert found is not None
    return found


@pytest.mark.parametrize(("kind", "grid"), FORMS)
@pytest.mark.parametrize("gate", [ExpertGate(), GPT_OSS])
def test_experts_of_several_tokens(kind: Any, grid: Grid | None, gate: ExpertGate) -> None:
    assert ENGINE is not None
    draw, hidden, tokens = random.Random(1), 192, 19
    widths = (64, 128, 64, 192, 64)
    ups = [prepared(2 * width, hidden, kind, grid, i) for i, width in enumerate(widths)]
    downs = [prepared(hidden, width, kind, grid, 9 + i) for i, width in enumerate(widths)]
    made = torch.Generator().manual_seed(2)
    biases = [
        (torch.randn(2 * width, generator=made).bfloat16(), torch.randn(hidden).bfloat16())
        for width in widths
    ]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(tokens, hidden, generator=made).to(dtype)
        asking = [
            sorted(draw.sample(range(tokens), count))
            for count in (1, draw.randint(2, 3), 4, draw.randint(5, 12), tokens)
        ]
        found = ENGINE.gated_together(ups, downs, x, asking, gate, biases)
        wanted = [
            ENGINE.gated_experts([up], [down], x[row : row + 1], gate, [its])
            for up, down, its, rows in zip(ups, downs, biases, asking, strict=True)
            for row in rows
        ]
        assert torch.equal(found, torch.cat(wanted))


@pytest.mark.parametrize(("kind", "grid"), FORMS)
@pytest.mark.parametrize("columns", [192, 2048])
def test_rows_of_one_matrix(kind: Any, grid: Grid | None, columns: int) -> None:
    """Whatever number of tokens and of matrices are in a call."""
    assert ENGINE is not None
    matrices = [prepared(128, columns, kind, grid, seed) for seed in range(2)]
    x = torch.randn(1, 18, columns, generator=torch.Generator().manual_seed(3)).bfloat16()
    alone = [
        torch.cat([ENGINE.one_row(one, x[0, row : row + 1]) for row in range(18)])
        for one in matrices
    ]
    for tokens in (1, 2, 3, 4, 5, 7, 8, 11, 16, 18):
        found = ENGINE.few_rows(matrices, x[:, :tokens].contiguous())
        assert torch.equal(found, torch.stack(alone)[:, :tokens])


def test_odd_sizes_of_plain_rows() -> None:
    """A row that is no whole number of vectors."""
    assert ENGINE is not None
    made = torch.Generator().manual_seed(7)
    for columns in (5, 17, 24, 40, 63, 200):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = torch.randn(700, columns, generator=made).to(dtype)
            one = ENGINE.prepare(quantise(weight, "plain"))
            assert one is not None
            x = torch.randn(1, 7, columns, generator=made)
            wanted = torch.cat([ENGINE.one_row(one, row) for row in x[0].split(1)])
            assert torch.equal(ENGINE.few_rows([one], x)[0], wanted)


FAMILIES = (
    *("afmoe", "deepseek", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "flex_olmo", "gpt_oss"),
    *("granitemoeshared", "hunyuan_v1_moe", "lfm2_moe", "mimo_v2_flash", "minimax_m2", "mixtral"),
    *("olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next"),
)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_layers_of_several_answers(name: str, kind: Kind) -> None:
    """Answers of different lengths, among which every layer is called for changing ones."""
    assert ENGINE is not None
    torch.manual_seed(0)
    model: Any = tiny_model(name, dtype=torch.bfloat16, **SETTINGS.get(name, {})).eval()
    random_parts(model)
    build = Builder(ENGINE, name, model, kind)
    tables = [build.layer(layer) for layer in layers_of(model)]
    watch = Watch(model)
    states: list[list[tuple[Tensor, Any]]] = []
    with torch.inference_mode():
        for token in (5, 17, 33, 80, 12):
            watch.seen.clear()
            model(torch.tensor([[token]]), position_ids=torch.tensor([[token % 7]]))
            states.append([(x, angles) for x, angles, _ in watch.seen])
    draw = random.Random(5)
    for index, table in enumerate(tables):
        if table.cache is None:
            continue
        alone = [[one.clone() for one in table.cache] for _ in states]
        company = [[one.clone() for one in table.cache] for _ in states]
        held = [0] * len(states)
        for _ in range(12):
            some = sorted(draw.sample(range(len(states)), draw.randint(1, len(states))))
            wanted = []
            for one in some:
                x, angles = states[one][index]
                where = (positions_of(name, angles), Cached.of(*alone[one], held[one]))
                wanted.append(step(table, x[0], where))
            xs = torch.cat([states[one][index][0][0] for one in some])
            places = [
                (positions_of(name, states[one][index][1]), Cached.of(*company[one], held[one]))
                for one in some
            ]
            found = ENGINE.decoder_together(
                *(table.block, table.router, table.experts, xs, places), table.dense
            )
            assert found.out is not None and torch.equal(found.out, torch.cat(wanted))
            for one in some:
                held[one] += 1
                assert all(map(torch.equal, alone[one], company[one]))
                assert held[one] < ROOM


def step(table: Tables, x: Tensor, where: Any) -> Tensor:
    assert ENGINE is not None
    found = ENGINE.decoder(table.block, table.router, table.experts, x, *where, table.dense)
    assert found is not None
    return found[0]


def test_what_does_not_go_together() -> None:
    assert ENGINE is not None
    up, down = prepared(128, 64, "plain", None, 0), prepared(64, 64, "plain", None, 1)
    x = torch.zeros(2, 64)
    for asking in ([[0, 2]], [[]], [[-1]], [[0], [1]]):
        with pytest.raises(ValueError, match="operator"):
            ENGINE.gated_together([up], [down], x, asking)
