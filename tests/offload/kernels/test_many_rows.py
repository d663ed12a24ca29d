"""Products of the tokens of a prompt against plain ones, in every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from conmoe_edge.checkpoint.format import low_bits
from conmoe_edge.checkpoint.format.forms import LOW_BITS, Grid, Kind
from conmoe_edge.checkpoint.format.quantise import Matrix, quantise, stored
from conmoe_edge.offload.kernels.cpu import reference
from conmoe_edge.offload.kernels.cpu.bindings import ExpertGate, Operator, Prepared, takes_many

GRIDS = {
    "grid4": Grid(32, "float16", False),
    "grid4, zeros": Grid(64, "float16", True),
    "grid4, bf16": Grid(128, "bfloat16", False),
    "grid4, bf16, zeros": Grid(32, "bfloat16", True),
}
KINDS = ["int8", "int4", "mxfp4", "q6", "q4", "q3", "q2", *GRIDS]
GPT_OSS = ExpertGate(alpha=1.702, limit=7.0, interleaved=True)
Pair = tuple[Matrix, Matrix]


def matrix(kind: str, rows: int, columns: int, seed: int = 0) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    return quantise(weight, "grid4" if kind in GRIDS else kind, GRIDS.get(kind))  # pyright: ignore[reportArgumentType]


def prepared(operator: Operator, one: Matrix) -> Prepared:
    found = operator.prepare(one)
    assert found is not None and takes_many(found.form)
    return found


def activations(*shape: int) -> Tensor:
    """Whose blocks hold a 127, and halves nowhere: rounding leaves no choice."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(-126, 127, shape, generator=generator).float()
    x[..., ::32] = 127.0
    return x * torch.exp2(torch.randint(-2, 3, (*shape[:-1], 1), generator=generator).float())


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(64, 128, 1), (128, 384, 16), (192, 640, 37), (320, 128, 300)]
)
def test_products(operator: Operator, kind: str, rows: int, columns: int, tokens: int) -> None:
    """Whole numbers are exact; what is left is the rounding of fp32 sums."""
    one = matrix(kind, rows, columns)
    x = activations(tokens, columns)
    found, wanted = operator.many_rows(prepared(operator, one), x), reference.product(one, x)
    assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < 2e-6
    few = operator.few_rows([prepared(operator, one)], x.unsqueeze(0))[0]
    assert float((found - few).abs().max() / wanted.abs().max()) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_within_a_hundredth_of_those_of_the_weights(
    operator: Operator, kind: str
) -> None:
    one = matrix(kind, 128, 512)
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(3))
    exact = x.double() @ one.dequantise().double().T
    for dtype in (torch.float32, torch.bfloat16):
        found = operator.many_rows(prepared(operator, one), x.to(dtype))
        assert found.dtype == dtype
        assert float((found.double() - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (7, 19), (66, 33), (5, 16), (131, 40), (70, 300), (9, 2500)]
)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_odd_shapes_of_int8(operator: Operator, rows: int, columns: int, tokens: int) -> None:
    one, x = matrix("int8", rows, columns), activations(tokens, columns)
    wanted = reference.product(one, x)
    found = operator.many_rows(prepared(operator, one), x)
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["int8", "q6", "q4", "q3", "q2"])
def test_the_largest_numbers_fit_into_what_adds_them_up(operator: Operator, kind: Kind) -> None:
    if kind == "int8":
        one = stored(kind, torch.full((64, 96), -128, dtype=torch.int8), torch.ones(64).bfloat16())
    else:
        bits, ones = LOW_BITS[kind], torch.ones(1, 64, 1)
        grid = low_bits.Grid(bits, ones[0], 0 * ones[0])
        codes = torch.full((64, 96), (1 << bits) - 1)
        s = torch.full((64, 3), 15)
        one = stored(kind, *low_bits.store(grid, codes, s, s - 7, 64))
    for x in (torch.ones(7, 96), -torch.ones(7, 96)):
        found = operator.many_rows(prepared(operator, one), x).double()
        assert torch.allclose(found, reference.product(one, x), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_the_same_bits_in_any_company(operator: Operator, kind: str) -> None:
    """Neither how many tokens there are nor threads show in a result."""
    one = prepared(operator, matrix(kind, 256, 512))
    x = torch.randn(33, 512, generator=torch.Generator().manual_seed(5))
    together = operator.many_rows(one, x)
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(operator.many_rows(one, x), together)
            for start, stop in ((0, 1), (1, 8), (8, 33)):
                assert torch.equal(operator.many_rows(one, x[start:stop]), together[start:stop])


def test_an_infinite_activation_is_seen(operator: Operator) -> None:
    x = torch.randn(9, 64)
    x[3, 5] = torch.inf
    for kind in ("int8", "q4"):
        found = operator.many_rows(prepared(operator, matrix(kind, 64, 64)), x)
        assert found[3].isnan().all() and found[[0, 1, 2, *range(4, 9)]].isfinite().all()


def experts(kinds: tuple[str, str], hidden: int, widths: Sequence[int]) -> list[Pair]:
    up, down = kinds
    return [
        (matrix(up, 2 * width, hidden, 10 + i), matrix(down, hidden, width, 20 + i))
        for i, width in enumerate(widths)
    ]


def routes(tokens: int, counts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [
        (
            torch.randperm(tokens, generator=generator)[:count].sort().values,
            torch.rand(count, generator=generator),
        )
        for count in counts
    ]


def computed(
    operator: Operator,
    pairs: Sequence[Pair],
    x: Tensor,
    routed: Sequence[tuple[Tensor, Tensor]],
    gate: ExpertGate,
    biases: Sequence[tuple[Tensor, Tensor]] | None,
    turns: Sequence[range],
    few: int | None = None,
) -> Tensor:
    """The sum of all experts, which are given in several calls."""
    out = torch.zeros(x.shape)
    ready = [(prepared(operator, up), prepared(operator, down)) for up, down in pairs]
    for turn in turns:
        starts = [0]
        for i in turn:
            starts.append(starts[-1] + len(routed[i][0]))
        rows, weights = (torch.cat([routed[i][side] for i in turn]) for side in (0, 1))
        ups, downs = [ready[i][0] for i in turn], [ready[i][1] for i in turn]
        mine = None if biases is None else [biases[i] for i in turn]
        operator.many_experts(ups, downs, x, (starts, rows, weights), out, gate, mine, few)
    return out


CASES = [
    *[(kind, kind, 128, (64, 64, 64), ExpertGate(), False) for kind in KINDS if "bf16" not in kind],
    ("grid4, bf16", "grid4, bf16", 128, (128, 256), ExpertGate(), False),
    ("q3", "q4", 192, (96, 160, 32), ExpertGate(), False),
    ("int8", "q2", 64, (32, 96, 256), ExpertGate(), True),
    ("q2", "int8", 96, (96, 32, 64), GPT_OSS, True),
    ("int8", "int8", 40, (20, 33, 65), GPT_OSS, True),
    ("mxfp4", "mxfp4", 128, (96, 96, 96), GPT_OSS, True),
    ("int4", "int4", 128, (96, 64, 128), ExpertGate(), False),
    ("q4", "q4", 128, (96, 64, 128), GPT_OSS, True),
]


@pytest.mark.parametrize(("up", "down", "hidden", "widths", "gate", "biased"), CASES)
def test_experts(
    operator: Operator,
    up: str,
    down: str,
    hidden: int,
    widths: tuple[int, ...],
    gate: ExpertGate,
    biased: bool,
) -> None:
    """Against the sum of plain experts; in one call, one by one and with other threads the same bits."""
    tokens, counts = 41, (17, 1, 30)[: len(widths)]
    pairs, x = experts((up, down), hidden, widths), activations(tokens, hidden) / 64
    routed, biases = routes(tokens, counts), None
    if biased:
        biases = [
            (torch.randn(2 * width).bfloat16(), torch.randn(hidden).bfloat16()) for width in widths
        ]
    every = range(len(widths))
    found = computed(operator, pairs, x, routed, gate, biases, [every])
    wanted = torch.zeros(x.shape, dtype=torch.float64)
    for i, (first, second) in enumerate(pairs):
        rows, weights = routed[i]
        parts = reference.gated(first, second, x[rows], gate, biases and biases[i])
        wanted[rows] += weights.double().unsqueeze(1) * parts
    assert float((found - wanted).norm() / wanted.norm()) < 2e-3
    for count in (1, 2, 3):
        with threads(count):
            for turns in ([every], [range(i, i + 1) for i in every]):
                again = computed(operator, pairs, x, routed, gate, biases, turns)
                assert torch.equal(again, found)


@pytest.mark.parametrize(("up", "down", "hidden", "widths", "gate", "biased"), CASES)
def test_experts_that_few_tokens_want(
    operator: Operator,
    up: str,
    down: str,
    hidden: int,
    widths: tuple[int, ...],
    gate: ExpertGate,
    biased: bool,
) -> None:
    """Those with up to ``few`` tokens by the kernels of single tokens, the others by those of many, in their order;
    divided among calls as it may be, with any threads, the same bits.
    """
    counts = (2, 9, 1, 0, 3, 1, 8, 4)
    widths = tuple(widths[i % len(widths)] for i in range(len(counts)))
    tokens, every = 23, range(len(counts))
    pairs, x = experts((up, down), hidden, widths), activations(tokens, hidden) / 64
    routed, biases = routes(tokens, counts), None
    if biased:
        biases = [
            (torch.randn(2 * width).bfloat16(), torch.randn(hidden).bfloat16()) for width in widths
        ]
    wanted = torch.zeros(x.shape, dtype=torch.float64)
    for i, (first, second) in enumerate(pairs):
        rows, weights = routed[i]
        if len(rows):
            parts = reference.gated(first, second, x[rows], gate, biases and biases[i])
            wanted[rows] += weights.double().unsqueeze(1) * parts
    for few in (0, 3, tokens, None):
        found = computed(operator, pairs, x, routed, gate, biases, [every], few)
        assert float((found - wanted).norm() / wanted.norm()) < 2e-3
        alone = [range(i, i + 1) for i in every if counts[i]]
        for count, turns in ((1, alone), (3, [range(5), range(5, 8)])):
            with threads(count):
                again = computed(operator, pairs, x, routed, gate, biases, turns, few)
            assert torch.equal(again, found)


@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens_have_the_bits_of_single_ones(operator: Operator, kind: str) -> None:
    """More experts than one call of those kernels takes, in both formats of activations."""
    ((first, second),) = experts((kind, kind), 128, (128,))
    up, down = prepared(operator, first), prepared(operator, second)
    x = torch.randn(19, 128, generator=torch.Generator().manual_seed(2))
    asking = [[5, 6, 11], [6], [0, 18], [3, 4, 5]] * 20
    places = torch.tensor([row for rows in asking for row in rows])
    starts = [0]
    for rows in asking:
        starts.append(starts[-1] + len(rows))
    weights = torch.rand(len(places), generator=torch.Generator().manual_seed(4))
    ups, downs = [up] * len(asking), [down] * len(asking)
    for dtype in (torch.float32, torch.bfloat16):
        narrow = x.to(dtype)
        out = torch.zeros(x.shape)
        operator.many_experts(ups, downs, narrow, (starts, places, weights), out, few=3)
        single = operator.gated_together(ups, downs, narrow, asking)
        wanted = torch.zeros(x.shape)
        for place, (row, weight) in enumerate(zip(places.tolist(), weights, strict=True)):
            wanted[row] = torch.addcmul(wanted[row], single[place], weight)
        assert torch.allclose(out, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
        alone = torch.zeros(x.shape)
        one = torch.ones(1)
        operator.many_experts([up], [down], narrow, ([0, 1], places[:1], one), alone, few=3)
        assert torch.equal(alone[5], single[0])


def test_many_tokens_of_one_expert(operator: Operator) -> None:
    """More of them than a thread takes at a time."""
    pairs, x = experts(("q4", "q4"), 64, (64, 64)), activations(1300, 64) / 64
    routed = routes(1300, (1300, 700))
    found = computed(operator, pairs, x, routed, ExpertGate(), None, [range(2)])
    parts = torch.zeros(x.shape)
    for start in range(0, 1300, 130):
        some = []
        for rows, weights in routed:
            mine = (rows >= start) & (rows < start + 130)
            some.append((rows[mine] - start, weights[mine]))
        parts[start : start + 130] = computed(
            operator, pairs, x[start : start + 130], some, ExpertGate(), None, [range(2)]
        )
    assert torch.equal(parts, found)


def test_what_it_refuses(operator: Operator) -> None:
    pairs, x = experts(("q4", "q4"), 64, (64,)), torch.randn(20, 64)
    up, down = [[prepared(operator, one)] for one in pairs[0]]
    rows, weights, out = torch.arange(5), torch.ones(5), torch.zeros(20, 64)
    for wrong in (
        ([0, 6], rows, weights),
        ([0, 5], rows + 16, weights),
        ([0, 5], rows - 1, weights),
        ([0], rows, weights),
        ([0, 5], rows.int(), weights),
        ([0, 5], rows, weights.bfloat16()),
    ):
        with pytest.raises(ValueError, match="does not take"):
            operator.many_experts(up, down, x, wrong, out)
    with pytest.raises(ValueError, match="does not take"):
        operator.many_experts(up, down, x, ([0, 5], rows, weights), out.bfloat16())
    with pytest.raises(ValueError, match="does not take"):
        operator.many_rows(up[0], torch.randn(20, 32))
    plain = operator.prepare(quantise(torch.randn(64, 64).bfloat16(), "plain"))
    assert plain is not None and not takes_many(plain.form)
    with pytest.raises(ValueError, match="does not take"):
        operator.many_rows(plain, x)
