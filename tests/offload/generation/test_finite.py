"""A model that computes NaN or infinity says so, with layer and tensor, at every door."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tokenizer
from fuzz.package_mutations import agree, edit_values
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.checkpoint.package.record_headers import record_name
from conmoe_edge.compat import cache_argument, cache_of
from conmoe_edge.compress.quality.continuation import continue_greedily
from conmoe_edge.compress.quality.receipt import LossTracker
from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.compress.stream.layer_stream import open_stream, sequence_logits
from conmoe_edge.compress.stream.streamed_model import open_subject
from conmoe_edge.compress.work.part_clock import Clock
from conmoe_edge.errors import CheckpointError, NotFinite, PackageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.all_finite import all_finite
from conmoe_edge.model.checked_attention import checked_attention
from conmoe_edge.model.tokenizers import load_tokenizer
from conmoe_edge.offload.generation.benchmark import measure
from conmoe_edge.offload.generation.session import ChatSession
from conmoe_edge.serve.http_errors import as_api_error

WRITTEN = Path(__file__).parents[2] / "data" / "packages" / "0.1.0"
DENSE = "dense-00001-of-00001.safetensors"
IDS = torch.arange(5, 17)[None]
NAN, INFINITY, HUGE = b"\xc0\x7f", b"\x80\x7f", b"\x7f\x7f"
Edit = Callable[[Path, str, str, bytes], Path]


@pytest.fixture
def edited(tmp_path: Path) -> Edit:
    """A copy of a package with all numbers of a tensor replaced, or the first 4 KiB of them."""

    def made(folder: Path, file: str, name: str, value: bytes) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / "package"))
        edit_values(
            copy / file,
            name,
            lambda part: part.__setitem__(
                slice(0, 4096), value * (min(4096, len(part)) // len(value))
            ),
        )
        agree(copy)
        return copy

    return made


def failed(folder: Path) -> NotFinite:
    model = load_package(folder, device="cpu")
    with pytest.raises(NotFinite) as error, torch.no_grad():
        model(IDS, use_cache=False)
    assert f"inspect {folder} --verify" in error.value.fix
    return error.value


OLMOE, INT8 = WRITTEN / "olmoe-auto-bf16", WRITTEN / "mixtral-mone-int8-dense-int8"


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"],
)
def test_dense_weights_are_looked_at_when_they_are_read(
    edited: Edit, name: str, value: bytes
) -> None:
    with pytest.raises(PackageError) as error:
        load_package(edited(OLMOE, DENSE, name, value), device="cpu")
    assert error.value.why == f"{name} holds NaN or infinity"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.embed_tokens.weight", "what is before the layers: "),
        ("model.layers.1.self_attn.o_proj.weight", "decoder layer 1: "),
        ("model.layers.0.mlp.gate.weight", "decoder layer 0: "),
        ("lm_head.weight", "what is behind the layers: "),
    ],
)
def test_dense_weights_that_became_such_in_memory(name: str, where: str, value: float) -> None:
    model: Any = load_package(OLMOE, device="cpu")
    model.get_parameter(name).data[3:12, 3] = value
    with pytest.raises(NotFinite) as error, torch.no_grad():
        model(IDS, use_cache=False)
    assert error.value.why == f"{where}{name} holds NaN or infinity"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("part", ["q_norm", "k_norm", "v_proj"])
def test_queries_keys_and_values_of_prompts_and_of_single_tokens(
    part: str, dtype: torch.dtype
) -> None:
    """torch's fused attention gives zeros for a short row of NaN."""
    model: Any = load_package(OLMOE, device="cpu", dtype=dtype)
    name = f"model.layers.1.self_attn.{part}.weight"
    weight = model.get_parameter(name)
    with torch.no_grad():
        cache = cache_of(model(IDS, use_cache=True))
        weight.data[...] = float("nan")
        for count in (1, 2, 12, 15, 16, 40):
            ids = torch.arange(5, 5 + count)[None] % 90
            with pytest.raises(NotFinite) as error:
                model(ids, use_cache=False)
            assert error.value.why == f"decoder layer 1: {name} holds NaN or infinity", count
        for ids in (IDS[:, :1], IDS[:, :3]):
            with pytest.raises(NotFinite):
                model(ids, **cache_argument(model, cache))


def test_streamed_layers_with_such_keys() -> None:
    """As ``eval`` and the receipt see them, on texts that are as short."""
    ids = IDS[:, :12]
    tokens = TokenSet(ids, torch.ones_like(ids, dtype=torch.bool), ("text",))
    with open_subject(OLMOE, torch.device("cpu")) as subject, torch.no_grad():
        subject.model.load_outside()
        stream = open_stream(subject.model, tokens)
        with subject.layer(0, Clock()) as layer:
            layer.get_parameter("self_attn.k_norm.weight")[...] = float("nan")
            with pytest.raises(CheckpointError, match=r"Decoder layer 0 of .* gives NaN"):
                subject.advance(0, stream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_of_one_sequence_that_is_broken_leaves_the_others_alone(
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    for count in (1, 12, 33):
        given = [torch.randn(3, 2, count, 8, generator=generator).to(dtype) for _ in range(3)]
        wanted, _ = checked_attention(module, *given, None)
        assert torch.equal(wanted, sdpa_attention_forward(module, *given, None)[0])
        for which in range(3):
            broken = [one.clone() for one in given]
            broken[which][1, 1, :] = float("nan")
            found, _ = checked_attention(module, *broken, None)
            assert bool(found[1].isnan().any()) and torch.equal(found[::2], wanted[::2])


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_records(edited: Edit, value: bytes) -> None:
    manifest = load_manifest(OLMOE)
    used = max(
        (one for one in manifest.prototypes if one.id.layer == 1), key=lambda one: one.weight
    )
    folder = edited(OLMOE, used.file, record_name(used.id), value)
    why = failed(folder).why
    assert why.startswith("decoder layer 1: ") and "NaN or infinity" in why
    assert f"in the record of prototype {list(used.id)}" in why


def test_scales_are_refused_when_the_record_is_read(edited: Edit) -> None:
    manifest = load_manifest(INT8)
    entry = manifest.prototypes[0]
    scale = next(p for p in manifest.layouts[entry.layout].parts if p.name == "down_proj.scale")
    copy = edited(INT8, entry.file, record_name(entry.id), b"\0")
    edit_values(
        copy / entry.file,
        record_name(entry.id),
        lambda part: part.__setitem__(slice(scale.offset, scale.offset + 2), NAN),
    )
    agree(copy)
    with pytest.raises(PackageError, match="cannot be read") as error:
        load_package(copy, device="cpu")
    assert "down_proj.scale holds NaN" in error.value.why and str([*entry.id]) in error.value.why


def test_numbers_that_overflow_name_the_greatest(edited: Edit) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    why = failed(edited(OLMOE, DENSE, name, HUGE)).why
    assert "decoder layer 0: all weights are numbers" in why and name in why


@pytest.fixture
def broken(edited: Edit) -> Path:
    """With a prototype of NaN that tokens come to."""
    entry = load_manifest(OLMOE).prototypes[0]
    folder = edited(OLMOE, entry.file, record_name(entry.id), NAN)
    manifest = json.loads((folder / "conmoe.json").read_text())
    manifest["remap"]["0"] = [list(entry.id)] * len(manifest["remap"]["0"])
    (folder / "conmoe.json").write_text(json.dumps(manifest))
    save_tokenizer(folder)
    return folder


def test_chat(broken: Path) -> None:
    session = ChatSession(load_package(broken, device="cpu"), load_tokenizer(broken))
    session.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    for _ in range(2):
        with pytest.raises(NotFinite, match="NaN"):
            list(session.reply([{"role": "user", "content": "abc"}]))
    assert session.last is not None and session.last.tokens == 0


def test_bench(broken: Path) -> None:
    session = ChatSession(load_package(broken, device="cpu"), load_tokenizer(broken))
    with pytest.raises(NotFinite, match="NaN"):
        measure(session, [[5, 6, 7]], 3)


def test_generate(broken: Path) -> None:
    model = load_package(broken, device="cpu")
    with pytest.raises(NotFinite, match="NaN"):
        model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_a_client_of_the_server_is_told_that_it_is_the_model(
    broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    error = as_api_error(failed(broken))
    assert error.status == 500 and error.body["error"]["code"] == "model_damaged"
    assert error.body["error"]["type"] == "server_error" and str(broken) not in error.message
    assert "decoder layer 0: gate_up_proj" in caplog.text  # the log says more


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.gate.weight"])
def test_eval(edited: Edit, name: str) -> None:
    """A loss of NaN is no figure."""
    folder = edited(OLMOE, DENSE, name, NAN)
    tokens = TokenSet(IDS, torch.ones_like(IDS, dtype=torch.bool), ("text",))
    with (
        open_subject(folder, torch.device("cpu")) as subject,
        pytest.raises(CheckpointError) as error,
    ):
        subject.model.load_outside()
        stream = open_stream(subject.model, tokens)
        for index in range(subject.layers):
            with subject.layer(index, Clock()):
                subject.advance(index, stream)
        LossTracker(tokens).add(0, sequence_logits(subject.model, tokens, stream.hidden, 0))
    assert name in error.value.what and "NaN" in error.value.what


def test_logits_that_are_none_are_no_figure() -> None:
    tokens = TokenSet(IDS, torch.ones_like(IDS, dtype=torch.bool), ("text",))
    with open_subject(OLMOE, torch.device("cpu")) as subject:
        subject.model.load_outside()
        hidden = torch.full((1, IDS.shape[1], 64), 1.0, dtype=subject.model.dtype)
        assert bool(sequence_logits(subject.model, tokens, hidden, 0).isfinite().all())
        hidden[0, 3, 5] = float("inf")
        with pytest.raises(CheckpointError, match="output layer gives NaN"):
            sequence_logits(subject.model, tokens, hidden, 0)


def test_continuations_of_nothing(edited: Edit) -> None:
    folder = edited(OLMOE, DENSE, "lm_head.weight", NAN)
    with (
        open_subject(folder, torch.device("cpu")) as subject,
        pytest.raises(CheckpointError, match=r"lm_head\.weight holds NaN"),
    ):
        continue_greedily(subject, IDS[:, :4], 2, held=True, clock=Clock())


@pytest.mark.parametrize("package", sorted(one.name for one in WRITTEN.iterdir() if one.is_dir()))
def test_sound_packages_say_what_they_said(package: str) -> None:
    model = load_package(WRITTEN / package, device="cpu")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0  # padding on the left, as in a batch of prompts
    with torch.no_grad():
        out = model(IDS.repeat(2, 1), attention_mask=mask, use_cache=False)
    assert bool(out.logits[:, -1].isfinite().all())


def test_large_numbers_are_numbers() -> None:
    assert all_finite(torch.full((1, 1000), 3e38))
    assert all_finite(torch.full((2, 4), -65504.0, dtype=torch.float16))
    for value in (float("nan"), float("inf"), float("-inf")):
        one = torch.zeros(1, 7)
        one[0, 3] = value
        assert not all_finite(one)
    assert not all_finite(torch.tensor([float("inf"), float("-inf")]))


def test_nothing_is_left_on_the_model_after_a_failure(broken: Path) -> None:
    model: Any = load_package(broken, device="cpu")
    before = [len(layer._forward_hooks) for layer in model.model.layers]
    for _ in range(2):
        with pytest.raises(NotFinite, match="decoder layer 0"), torch.no_grad():
            model(IDS[:, :1], use_cache=False)
    assert [len(layer._forward_hooks) for layer in model.model.layers] == before
    assert not model.model.layers[0]._forward_pre_hooks
