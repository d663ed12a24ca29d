"""Whatever measures a package sees keys and values as its runtime keeps them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_tiny, save_tokenizer, tiny_config, tiny_model
from hand_packages import identity, write_package

import conmoe_edge
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, save_manifest
from conmoe_edge.compress.quality.continuation import continue_greedily
from conmoe_edge.compress.stream.calibration_text import TokenSet, evaluation_set, read_text
from conmoe_edge.compress.stream.layer_stream import sequence_logits
from conmoe_edge.compress.stream.streamed_model import open_subject
from conmoe_edge.compress.work.part_clock import Clock
from conmoe_edge.errors import UnsupportedModel, UsageError
from conmoe_edge.model.kv_rows import pack_rows, unpack_rows
from conmoe_edge.model.packed_layers import rounding_cache
from conmoe_edge.model.probe import probe
from conmoe_edge.plan.kv_precision import has_int8
from tests.compress.quality.test_evaluation import losses

CPU = torch.device("cpu")
WITHOUT = ("lfm2_moe", "minimax", "qwen3_5_moe_text", "qwen3_next")
SMALL: dict[str, Any] = {
    "tokens": 160,
    "sequence_length": 32,
    "continuations": 2,
    "prompt_tokens": 8,
    "continuation_tokens": 6,
    "device": "cpu",
    "offline": True,
}


def written(family: str, folder: Path) -> Path:
    """A package of a tiny model, with keys and values in 8 bits."""
    plain = tiny_model(family)
    write_package(plain, folder, identity(plain), prefill_chunk=16)
    save_manifest(folder, replace(load_manifest(folder), kv_precision="int8"))
    return folder


def streamed(folder: Path, tokens: TokenSet, kv_precision: str | None = None) -> torch.Tensor:
    """Logits [N, T, V] of whole sequences, layer by layer."""
    with torch.no_grad(), open_subject(folder, CPU, kv_precision) as subject:
        subject.model.load_outside()
        stream = subject.open_stream(tokens)
        for index in range(subject.layers):
            with subject.layer(index, Clock()):
                subject.advance(index, stream)
        rows = range(len(tokens.domains))
        return torch.stack(
            [sequence_logits(subject.model, tokens, stream.hidden, row) for row in rows]
        )


@pytest.mark.parametrize("family", [one.model_type for one in FAMILIES])
def test_layer_by_layer_is_what_the_loaded_package_computes(family: str, tmp_path: Path) -> None:
    """With windows, compressed keys, and a sequence with padding; where there is no such form, a refusal."""
    ids = torch.randint(5, 90, (3, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 17:] = False
    tokens = TokenSet(ids, mask, ("a", "a", "b"))
    folder = written(family, tmp_path)
    if family in WITHOUT:
        with pytest.raises(UnsupportedModel, match="8 bits"):
            streamed(folder, tokens)
        return
    found = streamed(folder, tokens)
    model: Any = conmoe_edge.load(folder, budget="2GiB", device="cpu", context=64)
    with torch.no_grad():
        wanted = torch.cat(
            [
                model(input_ids=row[None], attention_mask=held[None].long()).logits
                for row, held in zip(ids, mask, strict=True)
            ]
        )
    model.conmoe.close()
    off = (found - wanted)[mask].abs()
    plain = (streamed(folder, tokens, "source") - wanted)[mask].abs()
    # A number in the middle between two steps may be rounded to either where sums differ in the last bit.
    assert float(off.mean()) < 0.05 * float(plain.mean())
    assert float(off.median()) < 1e-6 * float(wanted.abs().max()) < 1e-2 * float(plain.median())


def test_the_families_that_have_no_such_form() -> None:
    assert {
        one.model_type for one in FAMILIES if not has_int8(probe(tiny_config(one.model_type)))
    } == set(WITHOUT)


def test_the_cache_of_a_stream_holds_nothing() -> None:
    for family in ("olmoe", "gpt_oss"):
        cache = rounding_cache(tiny_config(family))
        keys = torch.randn(2, 3, 12, 40, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
        for index in range(len(cache.layers)):
            for _ in range(3):
                found, _ = cache.update(keys, keys.bfloat16().float(), index)
                assert torch.equal(found, unpack_rows(pack_rows(keys), 40, torch.float32))
                assert cache.get_seq_length(index) == 0
                assert cache.layers[index].keys is None


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    one = "The lighthouse stood on a rock in the sea, and nobody knew who lit it. " * 12
    path.write_text(f"<|document domain=prose|>\n{one}\n")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("olmoe", tmp_path_factory.mktemp("models") / "tiny")
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("method", ["auto", "conmoe"])
def test_receipt_and_eval_are_of_the_package_as_it_runs(
    method: str, source: Path, text: Path, tmp_path: Path
) -> None:
    made = conmoe_edge.fit(
        str(source),
        tmp_path / "out",
        budget="2GiB",
        device="cpu",
        method=method,
        rate=0.5,
        precision="source",
        kv_precision="int8",
        calibration_tokens=1024,
        offline=True,
    )
    tokens = evaluation_set(read_text(text), _tokenizer(source), length=32, tokens=160)
    loaded = conmoe_edge.load(made.out, budget="2GiB", device="cpu")
    wanted = float(losses(loaded, tokens.ids, tokens.mask).detach().mean())
    report = conmoe_edge.evaluate(made.out, text=text, **SMALL)
    other = conmoe_edge.evaluate(made.out, text=text, kv_precision="source", **SMALL)
    assert report.quality.loss == pytest.approx(wanted, abs=1e-6)
    kl = [one.quality.kl for one in (report, other)]
    assert kl[0] is not None and kl[1] is not None
    assert abs(kl[0] - kl[1]) > 1e-3 * kl[0]
    assert other.quality.reference_loss == report.quality.reference_loss
    assert (report.model.kv_precision, other.model.kv_precision) == ("int8", "source")
    assert report.reference is not None and report.reference.kv_precision == "source"
    again = conmoe_edge.evaluate(
        made.out, tokens=256, sequence_length=128, continuations=0, device="cpu", offline=True
    )
    assert again.quality.loss == made.receipt["loss_consolidated"]
    assert again.quality.reference_loss == made.receipt["loss_original"]
    assert again.quality.kl == made.receipt["kl"]


def test_continuations_are_those_of_the_loaded_package(tmp_path: Path) -> None:
    folder = written("gpt_oss", tmp_path)
    prompts = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(2))
    model: Any = conmoe_edge.load(folder, budget="2GiB", device="cpu", context=64)
    for held in (True, False):
        with open_subject(folder, CPU) as subject:
            found = continue_greedily(subject, prompts, 12, held=held, clock=Clock())
        for row, prompt in enumerate(prompts):
            out = model.generate(
                prompt[None],
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
            )
            assert out[0, 12:].tolist() == found[row].tolist()
    model.conmoe.close()


def test_a_model_by_itself_can_be_measured_so(source: Path, text: Path) -> None:
    found = [
        conmoe_edge.evaluate(source, text=text, kv_precision=one, **SMALL).quality.loss
        for one in (None, "source", "int8")
    ]
    assert found[0] == found[1] != found[2]
    with pytest.raises(UsageError, match="int4"):
        conmoe_edge.evaluate(source, text=text, kv_precision="int4", **SMALL)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
