"""Records: alignment, zero padding, views without copies, pools."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.checkpoint.format.dtypes import CODES
from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.manifest import RecordLayout
from conmoe_edge.checkpoint.format.records import pack, view

Part = tuple[str, tuple[int, ...], str]

EXPERT: list[Part] = [
    ("gate_up_proj", (6, 5), "bfloat16"),
    ("down_proj", (5, 3), "bfloat16"),
    ("gate_up_proj_bias", (6,), "float32"),
    ("scale", (), "float32"),
]


def values(layout: RecordLayout, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        part.name: torch.randint(0, 2, part.shape, generator=generator).to(
            getattr(torch, part.dtype)
        )
        for part in layout.parts
    }


parts_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), max_size=3).map(tuple),
        st.sampled_from(sorted(set(CODES) - {"float8_e8m0fnu", "uint16", "uint32", "uint64"})),
    ),
    min_size=1,
    max_size=6,
)


@given(parts_strategy)
def test_layout_and_round_trip(shapes: list[tuple[tuple[int, ...], str]]) -> None:
    parts = [(f"p{number}", shape, dtype) for number, (shape, dtype) in enumerate(shapes)]
    layout = make_layout(parts)
    assert [(part.name, part.shape, part.dtype) for part in layout.parts] == parts
    assert layout.nbytes % 64 == 0 and layout.nbytes > 0
    end = 0
    for part in layout.parts:
        assert part.offset % 64 == 0 and part.offset - end in range(64)
        end = part.offset + part.nbytes
    assert 0 <= layout.nbytes - end <= 64

    tensors = values(layout)
    record = pack(layout, tensors, torch.full((layout.nbytes,), 255, dtype=torch.uint8))
    for name, got in view(layout, record).items():
        assert got.dtype == tensors[name].dtype and got.shape == tensors[name].shape
        assert torch.equal(got.to(torch.complex64), tensors[name].to(torch.complex64))
    used = torch.zeros(layout.nbytes, dtype=torch.bool)
    for part in layout.parts:
        used[part.offset : part.offset + part.nbytes] = True
    assert not record[~used].any()


def test_a_record_depends_on_its_tensors_alone() -> None:
    layout = make_layout(EXPERT)
    dirty = torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8)
    assert torch.equal(pack(layout, values(layout)), pack(layout, values(layout), dirty))


def test_pack_takes_any_strides() -> None:
    layout = make_layout([("w", (3, 5), "float32")])
    transposed = torch.arange(15, dtype=torch.float32).view(5, 3).t()
    assert torch.equal(view(layout, pack(layout, {"w": transposed}))["w"], transposed)


def test_views_share_memory_with_the_record() -> None:
    layout = make_layout(EXPERT)
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    view(layout, record)["scale"].fill_(1.5)
    assert view(layout, record)["scale"].item() == 1.5
    assert record.any()


def test_a_record_inside_a_pool_is_a_record() -> None:
    layout = make_layout(EXPERT)
    pool = torch.zeros(4, layout.nbytes, dtype=torch.uint8)
    for slot in range(4):
        pack(layout, values(layout, slot), pool[slot])
    for slot in range(4):
        for name, expected in values(layout, slot).items():
            part = view(layout, pool[slot])[name]
            assert torch.equal(part, expected) and part.is_contiguous()
    view(layout, pool[2])["down_proj"].zero_()
    assert not view(layout, pool[2])["down_proj"].any() and view(layout, pool[1])["down_proj"].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "extra": t["scale"]},
        lambda t: {name: x for name, x in t.items() if name != "scale"},
        lambda t: {**t, "down_proj": t["down_proj"].t()},
        lambda t: {**t, "down_proj": t["down_proj"].float()},
    ],
    ids=["extra", "missing", "shape", "dtype"],
)
def test_tensors_that_do_not_match(change: object) -> None:
    layout = make_layout(EXPERT)
    with pytest.raises(ValueError, match="record"):
        pack(layout, change(values(layout)))  # type: ignore[operator]


def test_records_of_another_size_or_type() -> None:
    layout = make_layout(EXPERT)
    with pytest.raises(ValueError, match="a record is uint8"):
        view(layout, torch.zeros(layout.nbytes + 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a record is uint8"):
        view(layout, torch.zeros(layout.nbytes, dtype=torch.int8))
