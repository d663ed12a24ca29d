"""Calibration text: documents, windows, domains, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conmoe_edge.compress.stream.calibration_text import (
    CalibrationText,
    Document,
    TokenSet,
    bundled_text,
    read_text,
    token_sets,
)
from conmoe_edge.errors import CalibrationError


class Letters:
    """A tokenizer of bytes."""

    eos_token_id = 1
    pad_token_id = 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [2 + byte for byte in text.encode()]}


def test_bundled_text_has_six_domains_each_way() -> None:
    text = bundled_text()
    domains = {"books", "code", "french", "german", "math", "wiki"}
    assert {document.domain for document in text.train} == domains
    assert text.held_out is not None and {document.domain for document in text.held_out} == domains
    assert sum(len(document.text.encode()) for document in text.train) <= 400_000


def test_bundled_held_out_shares_no_document_with_the_calibration_text() -> None:
    text = bundled_text()
    assert text.held_out is not None
    assert not {document.text for document in text.train} & {
        document.text for document in text.held_out
    }


def test_domains_are_taken_in_turn_and_spread() -> None:
    documents = tuple(Document(name, name * 300) for name in ("aaaa", "bbbb", "cccc"))
    train, held = token_sets(
        CalibrationText(documents, documents, "x"),
        Letters(),
        length=16,
        tokens=16 * 7,
        held_out_tokens=16 * 3,
    )
    assert train.ids.shape == (7, 16) and not train.padded
    assert sorted(train.domains) == ["aaaa"] * 3 + ["bbbb"] * 2 + ["cccc"] * 2
    assert sorted(held.domains) == ["aaaa", "bbbb", "cccc"]


def test_own_text_is_split_and_short_text_is_padded() -> None:
    train, held = token_sets(
        CalibrationText((Document("text", "x" * 400),), None, "x"),
        Letters(),
        length=32,
        tokens=10**6,
        held_out_tokens=64,
    )
    assert len(train.domains) == 10 and len(held.domains) == 2
    short, _ = token_sets(
        CalibrationText((Document("text", "x" * 90),), None, "x"),
        Letters(),
        length=512,
        tokens=512,
        held_out_tokens=512,
    )
    assert short.tokens == 91 and short.padded and short.ids.shape == (1, 512)


def test_marks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("<|document domain=code|>\nx = 1\n\n<|document|>\nhello\n", encoding="utf-8")
    assert read_text(path).train == (Document("code", "x = 1"), Document("text", "hello"))


def test_the_mark_of_an_editor_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("<|document domain=code|>\nx = 1\n", encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert read_text(path).train == (Document("code", "x = 1"),)
    path.write_text("hello\n", encoding="utf-8-sig")
    assert read_text(path).train == (Document("text", "hello\n"),)


def test_text_in_utf_16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("hello", encoding="utf-16")
    with pytest.raises(CalibrationError, match="like UTF-16") as error:
        read_text(path)
    assert "save it as UTF-8" in error.value.fix


@pytest.mark.parametrize("content", [b"", b"  \n", b"\xff\xfe\x00bad"])
def test_unreadable_text_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as error:
        read_text(path)
    assert str(path) in error.value.what and error.value.fix


def test_missing_and_too_short(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError):
        read_text(tmp_path / "none.txt")
    with pytest.raises(CalibrationError, match="tokens"):
        token_sets(
            CalibrationText((Document("text", "short"),), None, "x"),
            Letters(),
            length=16,
            tokens=64,
            held_out_tokens=16,
        )


def _numbered(windows: int) -> CalibrationText:
    """Every window of eight bytes says which one it is."""
    made = {
        name: "".join(f"{name}{number:06d}" for number in range(windows)) for name in ("aa", "bb")
    }
    documents = tuple(Document(name, body) for name, body in made.items())
    return CalibrationText(documents, None, "x")


def test_seeds_draw_other_windows_and_leave_the_held_out_text() -> None:
    def sets(seed: int):
        return token_sets(
            _numbered(200), Letters(), length=8, tokens=160, held_out_tokens=80, seed=seed
        )

    evenly, held = sets(0)
    drawn, same = sets(1)
    assert not torch.equal(evenly.ids, drawn.ids)
    assert evenly.domains == drawn.domains and evenly.ids.shape == drawn.ids.shape
    assert torch.equal(held.ids, same.ids)
    assert torch.equal(drawn.ids, sets(1)[0].ids)
    assert not torch.equal(drawn.ids, sets(2)[0].ids)
    rows = {tuple(row) for row in drawn.ids.tolist()}
    assert len(rows) == 20  # drawn without putting back
    assert not rows & {tuple(row) for row in held.ids.tolist()}


def test_seed_zero_spreads_evenly() -> None:
    train, _ = token_sets(_numbered(200), Letters(), length=8, tokens=32, held_out_tokens=8, seed=0)
    # Of 160 windows that are not held out the first and the middle one of each domain.
    assert [bytes(b - 2 for b in row).decode() for row in train.ids.tolist()] == [
        "aa000000",
        "aa000100",
        "bb000000",
        "bb000100",
    ]


def test_a_text_that_is_used_up_is_the_same_for_every_seed() -> None:
    def ids(seed: int) -> torch.Tensor:
        return token_sets(
            _numbered(20), Letters(), length=8, tokens=10**6, held_out_tokens=8, seed=seed
        )[0].ids

    assert torch.equal(ids(0), ids(3))


def test_other_sequences_are_others_where_there_are_enough() -> None:
    names = tuple(str(n) for n in range(16))
    whole = TokenSet(torch.arange(16).unsqueeze(1), torch.ones(16, 1, dtype=torch.bool), names)
    first, second = whole.some(4), whole.some(4, after=1)
    assert first.domains == ("0", "4", "8", "12") and second.domains == ("1", "5", "9", "13")
    assert len(whole.some(2).some(4, after=1).domains) == 2


def test_a_byte_order_mark_does_not_hide_the_first_mark(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf<|document domain=code|>\nx = 1\n")
    (only,) = read_text(path).train
    assert (only.domain, only.text) == ("code", "x = 1")
    path.write_text("hello", encoding="utf-16")
    with pytest.raises(CalibrationError) as caught:
        read_text(path)
    assert "UTF-16" in caught.value.why
