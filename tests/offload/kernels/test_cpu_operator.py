"""The compiled operator against plain products, in every instruction set that this processor has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.checkpoint.format import low_bits
from conmoe_edge.checkpoint.format.forms import LOW_BITS, Grid, Kind
from conmoe_edge.checkpoint.format.quantise import Matrix, quantise, stored
from conmoe_edge.model.kv_rows import pack_rows, unpack_rows
from conmoe_edge.offload.kernels.cpu import bindings as native
from conmoe_edge.offload.kernels.cpu import build, compilers, targets
from conmoe_edge.offload.kernels.cpu.bindings import Operator
from conmoe_edge.offload.kernels.cpu.reference import product
from conmoe_edge.offload.kernels.cpu.self_test import check
from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable

GRIDS = {
    "grid4": Grid(32, "float16", False),
    "grid4, zeros": Grid(16, "float16", True),
    "grid4, bf16": Grid(32, "bfloat16", False),
    "grid4, bf16, zeros": Grid(32, "bfloat16", True),
}
QUANTISED = ["int8", "int4", "mxfp4", "q6", "q4", "q3", "q2", *GRIDS]
KINDS = ["bf16", "fp16", "fp32", *QUANTISED]


def matrix(kind: str, rows: int, columns: int, seed: int = 0) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    return matrix_of(kind, torch.randn(rows, columns, generator=generator) * 0.05)


def matrix_of(kind: str, weight: torch.Tensor) -> Matrix:
    plain = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if kind in plain:
        return quantise(weight.to(plain[kind]), "plain")
    return quantise(weight, "grid4" if kind in GRIDS else kind, GRIDS.get(kind))


def ends_of(kind: str, above: torch.Tensor) -> Matrix:
    """1 where ``above``, else -1; in grid4, whose rounding would put these next to the middle, the numbers 0 and 15."""
    grid = GRIDS.get(kind)
    if grid is None:
        return quantise(torch.where(above, 1.0, -1.0), kind)
    low, high = (15 * above.byte()).chunk(2, 1)
    scales = torch.full((above.shape[1] // grid.group, len(above), 2 if grid.zeros else 1), 0.125)
    scales[..., 1:] = 0.0  # the zero point, if there is one
    return stored("grid4", low | high << 4, scales.to(getattr(torch, grid.dtype)).flatten(1))


def activations(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 96), (192, 544)])
def test_products(operator: Operator, kind: str, rows: int, columns: int) -> None:
    matrices = [matrix(kind, rows, columns, seed) for seed in range(5)]
    prepared = [operator.prepare(one) for one in matrices]
    for x in (activations(5, 3, columns), activations(1, 2, columns)):
        got = operator.few_rows(prepared, x)
        expected = torch.stack(
            [product(one, x[i if len(x) > 1 else 0]) for i, one in enumerate(matrices)]
        )
        assert torch.allclose(got.double(), expected, atol=1e-5, rtol=1e-5)
        exact = x.double() @ torch.stack([one.dequantise().double() for one in matrices]).mT
        assert float((got - exact).norm() / exact.norm()) < (0.01 if kind in QUANTISED else 1e-6)


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32", "int8"])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (7, 19), (66, 33), (5, 16), (131, 40), (70, 300), (9, 2500)]
)
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_odd_shapes(operator: Operator, kind: str, rows: int, columns: int, tokens: int) -> None:
    """Blocks of rows, and tokens that are taken together, with something left over."""
    one = matrix(kind, rows, columns)
    x = activations(1, tokens, columns)
    got = operator.few_rows([operator.prepare(one)], x)
    assert torch.allclose(got[0].double(), product(one, x[0]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_the_same_bits_in_any_company(operator: Operator, kind: str) -> None:
    """The promise behind "same tokens at any budget": neither neighbours nor threads show in a result."""
    matrices = [operator.prepare(matrix(kind, 640, 1024, seed)) for seed in range(4)]
    x = activations(4, 6, 1024)
    together = operator.few_rows(matrices, x)
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            for i, one in enumerate(matrices):
                for t in range(6):
                    alone = operator.few_rows([one], x[i : i + 1, t : t + 1].contiguous())
                    assert torch.equal(alone[0, 0], together[i, t])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_expanding_is_dequantising(operator: Operator, kind: str) -> None:
    one = matrix(kind, 128, 160)
    out = operator.expand(operator.prepare(one), torch.empty(128, 160))
    assert torch.allclose(out, one.dequantise(), atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_expanding_to_bf16_rounds_what_fp32_has(operator: Operator, kind: str) -> None:
    prepared = operator.prepare(matrix(kind, 128, 160))
    wide = operator.expand(prepared, torch.empty(128, 160))
    narrow = operator.expand(prepared, torch.empty(128, 160, dtype=torch.bfloat16))
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("kind", ["q6", "q4", "q3", "q2"])
def test_the_largest_numbers_fit_into_what_adds_them_up(operator: Operator, kind: Kind) -> None:
    bits, ones = LOW_BITS[kind], torch.ones(1, 64, 1)
    grid = low_bits.Grid(bits, ones[0], 0 * ones[0])
    codes = torch.full((64, 96), (1 << bits) - 1)
    s = torch.full((64, 3), 15)
    one = stored(kind, *low_bits.store(grid, codes, s, s - 7, 64))
    for x in (torch.ones(1, 1, 96), -torch.ones(1, 1, 96)):
        assert torch.equal(
            operator.few_rows([operator.prepare(one)], x)[0].double(), product(one, x[0])
        )


def test_halves_of_every_kind(operator: Operator) -> None:
    """Zero, denormal, largest and infinite fp16 numbers keep their values."""
    bits = torch.tensor([0, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x8001, 0xFBFF], dtype=torch.int32)
    halves = bits.to(torch.int16).view(torch.float16).view(1, 8)
    one = quantise(halves, "plain")
    out = operator.expand(operator.prepare(one), torch.empty(1, 8))
    assert torch.equal(out, halves.float())


def test_every_function_computes_what_it_should(operator: Operator) -> None:
    check(operator)


def test_it_is_checked_while_transformers_builds_a_model(operator: Operator) -> None:
    """Which sets a number format of its own for all that is made without one."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        check(operator)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_it_does_not_take(operator: Operator) -> None:
    assert operator.prepare(quantise(torch.randn(32, 64), "int4")) is None  # a tile of 32 rows
    assert operator.prepare(quantise(torch.randn(64, 64).double(), "plain")) is None
    assert operator.prepare(quantise(torch.randn(64, 64).T, "plain")) is None


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "off")
    with pytest.raises(Unavailable, match="CONMOE_OPERATOR=off"):
        build.library()


def test_this_machine_uses_it_where_it_can_compile_it() -> None:
    """The check at the first use lets a right operator pass."""
    try:
        build.library()
    except Unavailable as error:
        pytest.skip(str(error))
    assert native.operator() is not None, native.why_not()


def test_no_compiler_is_a_reason_and_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "no wheel")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    native._state.cache_clear()
    try:
        assert native.operator() is None and native.operator_library() is None
        assert "no C++ compiler" in native.why_not()
    finally:
        native._state.cache_clear()


def test_a_compiler_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(build, "SHIPPED", cache / "no wheel")
    monkeypatch.setattr(targets, "COMMON", ("-std=c++17", "-fno-such-flag"))
    monkeypatch.setattr(compilers, "zig", lambda: None)  # it takes flags that it does not know
    with pytest.raises(Unavailable, match="failed"):
        build.library()
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_experts(operator: Operator, kind: str, dtype: torch.dtype) -> None:
    """Whole experts of different widths against the plain formula, and each of them the same bits alone."""
    widths = (128, 32, 64, 96, 192)
    ups = [matrix(kind, 2 * width, 192, seed) for seed, width in enumerate(widths)]
    downs = [matrix(kind, 192, width, seed + 10) for seed, width in enumerate(widths)]
    x = activations(1, 192).to(dtype)
    first, second = [[operator.prepare(one) for one in side] for side in (ups, downs)]
    together = operator.gated_experts(first, second, x)
    assert kind != "int4" or len({one.group for one in downs}) > 1
    for i in range(len(widths)):
        gate, up = product(ups[i], x.float()).float().chunk(2, -1)
        expected = product(downs[i], torch.nn.functional.silu(gate) * up)
        # An activation on the edge between two numbers may fall to either side.
        near = 1e-5 if downs[i].kind == "plain" else 2e-3
        assert torch.allclose(together[i : i + 1].double(), expected, atol=near, rtol=1e-4)
        alone = operator.gated_experts(first[i : i + 1], second[i : i + 1], x)
        assert torch.equal(alone[0], together[i])


def test_gates_of_any_size(operator: Operator) -> None:
    """Where silu is as good as 0 or as its argument, and where it is neither; what is no number stays none."""
    sizes = [0.0, 1e-30, 0.3, 3.0, 20.0, 80.0, 95.0, 1e4, 3e30]
    gates = torch.tensor([sign * size for size in sizes for sign in (1.0, -1.0)])
    width = len(gates)
    up, down = torch.cat([torch.diag(gates), torch.eye(width)]), torch.eye(width)
    first, second = [operator.prepare(matrix_of("fp32", one)) for one in (up, down)]
    x = torch.ones(1, width)
    got = operator.gated_experts([first], [second], x)[0]
    wanted = torch.nn.functional.silu(gates)
    assert torch.allclose(got[:-1], wanted[:-1], rtol=1e-6, atol=1e-30)
    assert abs(float(got[-1])) < 1e-6  # exp is cut at 87, and 3e30 is large
    for odd in (float("nan"), float("inf")):
        x[0, 5] = odd
        assert not operator.gated_experts([first], [second], x)[0].isfinite().all()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 15, 64, 600, 1100])
def test_attention_of_one_token(operator: Operator, groups: int, length: int) -> None:
    """One to seven queries a group, short caches and such as are summed in parts, against torch in fp64."""
    for each, width, values in ((1, 128, 128), (4, 64, 48), (7, 32, 40)):
        generator = torch.Generator().manual_seed(length)

        def random(
            heads: int, rows: int, columns: int, generator: torch.Generator = generator
        ) -> torch.Tensor:
            return torch.randn(1, heads, rows, columns, generator=generator).bfloat16()

        query = random(groups * each, 1, width)
        key, value = random(groups, length, width), random(groups, length, values)
        found = operator.attend(query, key, value, 0.2)
        assert found is not None and found.shape == (1, 1, groups * each, values)
        k, v = [one.double().repeat_interleave(each, 1) for one in (key, value)]
        wanted = (query.double() @ k.mT * 0.2).softmax(-1) @ v
        assert torch.allclose(found[0, 0].double(), wanted[0, :, 0], rtol=2**-7, atol=1e-3)
        for group in range(groups):  # a group is the same bits alone
            span = slice(group * each, (group + 1) * each)
            alone = operator.attend(
                query[:, span], key[:, group : group + 1], value[:, group : group + 1], 0.2
            )
            assert alone is not None and torch.equal(alone[0, 0], found[0, 0, span])


@pytest.mark.parametrize("kind", QUANTISED)
def test_activations_that_are_no_numbers(operator: Operator, kind: str) -> None:
    """Infinity and NaN come out as NaN, nothing as nothing; the other tokens do not notice."""
    one = matrix(kind, 64, 96)
    x = activations(1, 4, 96)
    x[0, 1, 40] = float("inf")
    x[0, 2, 3] = float("nan")
    x[0, 3] = 0.0
    got = operator.few_rows([operator.prepare(one)], x)[0]
    assert got[1:3].isnan().all()
    assert torch.equal(got[3], torch.zeros(64))
    alone = operator.few_rows([operator.prepare(one)], x[:, :1].contiguous())
    assert torch.equal(got[0], alone[0, 0])


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_largest_numbers_do_not_overflow(operator: Operator, kind: str) -> None:
    """Weights and activations at the ends of their ranges: sums of pairs stay inside 16 bits."""
    one = ends_of(kind, activations(64, 256) > 0)
    x = torch.ones(1, 2, 256)
    x[0, 1] = -1.0
    got = operator.few_rows([operator.prepare(one)], x)[0]
    assert torch.allclose(got.double(), product(one, x[0]), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combining(operator: Operator, dtype: torch.dtype) -> None:
    y = activations(4, 100)
    weights = [0.5, -0.25, 0.125, 1.0]
    expected = (y * torch.tensor(weights).unsqueeze(1)).sum(0, keepdim=True)
    got = operator.combine(y, weights, dtype)
    assert got.dtype == dtype
    assert torch.allclose(got.float(), expected, atol=1e-6 if dtype == torch.float32 else 0.02)


def test_bf16_in_and_out_is_rounded_as_torch_does(operator: Operator) -> None:
    one = operator.prepare(quantise(torch.eye(64), "plain"))
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    x[0, 0, :3] = torch.tensor([float("inf"), float("-inf"), 3.0e38]).bfloat16()
    x[0, 0, :2] = 0  # an identity adds 0 * inf
    assert torch.equal(operator.few_rows([one], x), x)
    wide = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(4))
    thirds = operator.prepare(quantise(torch.eye(64) / 3, "plain"))
    narrow = operator.few_rows([thirds], wide.bfloat16())
    exact = operator.few_rows([thirds], wide.bfloat16().float())
    assert torch.equal(narrow, exact.bfloat16())


class _Keys:
    """A layer's attention with past keys and values."""

    def __init__(self, operator: Operator, head: int, heads: int, groups: int, held: int) -> None:
        generator = torch.Generator().manual_seed(head + held)

        def narrow(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).bfloat16()

        self.operator, self.head, self.held = operator, head, held
        rows = (heads * head, groups * head, groups * head)
        self.linears = [
            operator.prepare(matrix("bf16", count, 64, seed)) for seed, count in enumerate(rows)
        ]
        self.linears.append(operator.prepare(matrix("bf16", 64, heads * head, 3)))
        self.x, self.angles = narrow(1, 64), narrow(2, 1, head)
        self.past = [narrow(1, groups, held + 1, head) * 3 for _ in range(2)]

    def attend(self, cached: native.Cached, window: int = 0) -> torch.Tensor:
        linears = [(one, None) for one in self.linears]
        table = native.AttentionTable(linears, [None, None], self.head, 0.2, window=window)
        positions = native.Positions(self.angles[:1], self.angles[1:])
        return self.operator.attention(table, self.x, positions, cached)

    def packed(self) -> tuple[list[torch.Tensor], native.Cached]:
        rows = [pack_rows(one) for one in self.past]
        return rows, native.Cached.of(rows[0], rows[1], self.held, (self.head, self.head))


@pytest.mark.parametrize(("heads", "groups", "held"), [(4, 4, 5), (8, 2, 1), (6, 1, 600)])
@pytest.mark.parametrize("head", [8, 64, 72, 80, 96, 128])
def test_keys_in_8_bits_give_the_bits_of_their_expansion(
    operator: Operator, head: int, heads: int, groups: int, held: int
) -> None:
    """Few and many tokens, grouped heads, a window."""
    one = _Keys(operator, head, heads, groups, held)
    for window in (0, 4):
        rows, cached = one.packed()
        found = one.attend(cached, window)
        wide = [unpack_rows(pack_rows(past), head, torch.bfloat16) for past in one.past]
        one.attend(native.Cached.of(wide[0], wide[1], held), window)
        for mine, other in zip(rows, wide, strict=True):
            assert torch.equal(mine[:, :, held], pack_rows(other[:, :, held])), "the token's row"
        first = 0 if window == 0 else max(0, held + 1 - window)
        keys, values = [
            unpack_rows(mine, head, torch.bfloat16)[:, :, first:].contiguous() for mine in rows
        ]
        mixed = operator.attend(
            _turned(operator, one.linears[0], one.x, one.angles, head), keys, values, 0.2
        )
        assert mixed is not None
        wanted = operator.few_rows([one.linears[3]], mixed.reshape(1, 1, -1))
        assert torch.equal(found.view(-1), wanted.view(-1))


def test_a_key_that_is_no_number_stays_none(operator: Operator) -> None:
    one = _Keys(operator, 80, 4, 2, 3)
    one.x[0, 0] = float("nan")
    rows, cached = one.packed()
    assert one.attend(cached).isnan().all()
    for row in rows:
        assert unpack_rows(row, 80, torch.bfloat16)[:, :, 3].isnan().all()
    one = _Keys(operator, 80, 4, 2, 3)
    one.past[0][0, 1, 1, 70] = float("inf")
    rows, cached = one.packed()  # the rows have to live as long as they are written to
    assert one.attend(cached).isnan().any() and len(rows) == 2


def _turned(
    operator: Operator, prepared: Any, x: torch.Tensor, angles: torch.Tensor, head: int
) -> torch.Tensor:
    """Queries [1, heads, 1, head] as transformers turns them."""
    rows = operator.few_rows([prepared], x.view(1, 1, -1)).view(-1, head)
    half = torch.cat([-rows[:, head // 2 :], rows[:, : head // 2]], -1)
    return (rows * angles[0] + half * angles[1]).view(1, -1, 1, head)


def test_rows_of_another_width_are_refused() -> None:
    rows = pack_rows(torch.randn(1, 2, 4, 64))
    with pytest.raises(ValueError, match="bytes"):
        native.Cached.of(rows, rows, 3, (63, 64))
    with pytest.raises(ValueError, match="int8"):
        native.Cached.of(rows, rows, 3)
