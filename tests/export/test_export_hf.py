"""Plain checkpoints: transformers loads them, and their logits are the package's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_tiny, save_tokenizer, tiny_model
from hand_packages import identity, materialise, slots_of, thirds, write_package
from plain_products import without_operator
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import conmoe_edge
from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.errors import OutputExists, UnsupportedModel
from conmoe_edge.export.hf import EXPORT_FILE, export_hf
from conmoe_edge.model.experts import find_experts

IDS = torch.tensor([[5, 9, 33, 12, 60, 61, 7, 8, 20]])


def logits_of(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS if ids is None else ids).logits


def plain(folder: Path) -> Any:
    """As anybody would load it; nothing of the checkpoint may be missing or left over."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def names_in(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def scaled_thirds(model: Any) -> Any:
    return slots_of(
        model,
        lambda layer, expert: SlotRecord(
            ExpertId(layer, expert - expert % 3), 1.0 if expert % 3 == 0 else 0.5 + expert / 8
        ),
    )


@pytest.mark.parametrize("family", [family.model_type for family in FAMILIES])
def test_logits_and_names_are_those_of_the_package_and_of_transformers(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    package = write_package(model, tmp_path / "package", scaled_thirds(model))
    done = export_hf(package, tmp_path / "plain")
    assert done.kind == "materialised" and "Saves no memory" in done.notes[0]
    loaded = plain(tmp_path / "plain")
    torch.testing.assert_close(
        logits_of(loaded), logits_of(conmoe_edge.load(package, device="cpu")), atol=2e-5, rtol=1e-4
    )
    model.save_pretrained(tmp_path / "saved")
    assert names_in(tmp_path / "plain") == names_in(tmp_path / "saved")


def test_without_scales_it_is_the_materialised_model_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_model("olmoe", dtype=torch.bfloat16)
    package = write_package(model, tmp_path / "package", thirds(model))
    export_hf(package, tmp_path / "plain")
    wanted = materialise(model, thirds(model)).state_dict()
    found = plain(tmp_path / "plain").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_a_dropped_slot_gives_nothing(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    slots = slots_of(
        model, lambda layer, e: SlotRecord(None if e in (2, 5) else ExpertId(layer, e))
    )
    package = write_package(model, tmp_path / "package", slots)
    export_hf(package, tmp_path / "plain")
    torch.testing.assert_close(
        logits_of(plain(tmp_path / "plain")),
        logits_of(conmoe_edge.load(package, device="cpu")),
        atol=2e-5,
        rtol=1e-4,
    )


def constant_package(family: str, folder: Path) -> Path:
    model = tiny_model(family)
    layers = list(find_experts(model))
    hidden = model.config.hidden_size
    generator = torch.Generator().manual_seed(3)
    constants = {layer: torch.randn(2, hidden, generator=generator) for layer in layers}

    def choose(layer: int, expert: int) -> SlotRecord:
        if expert == 3:
            return SlotRecord(None, 1.0, 0)
        if expert == 4:
            return SlotRecord(ExpertId(layer, 0), 0.5, 1)
        return SlotRecord(ExpertId(layer, expert))

    return write_package(model, folder, slots_of(model, choose), constants)


def test_constants_go_where_experts_have_a_bias(tmp_path: Path) -> None:
    package = constant_package("gpt_oss", tmp_path / "package")
    export_hf(package, tmp_path / "plain")
    torch.testing.assert_close(
        logits_of(plain(tmp_path / "plain")),
        logits_of(conmoe_edge.load(package, device="cpu")),
        atol=2e-5,
        rtol=1e-4,
    )


def test_constants_are_refused_where_experts_have_none(tmp_path: Path) -> None:
    package = constant_package("olmoe", tmp_path / "package")
    with pytest.raises(UnsupportedModel, match="add a constant"):
        export_hf(package, tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package"]


# -- pruned ------------------------------------------------------------------------------------------------------


def kept_in(model: Any, removed: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return {
        layer: tuple(slot for slot in range(8) if slot not in removed)
        for layer in find_experts(model)
    }


def pruned_package(model: Any, folder: Path, removed: tuple[int, ...]) -> Path:
    slots = slots_of(
        model,
        lambda layer, expert: SlotRecord(None if expert in removed else ExpertId(layer, expert)),
    )
    return write_package(model, folder, slots)


@pytest.mark.parametrize(
    ("family", "removed", "routers"),
    [
        ("olmoe", (1, 4, 7), {"gate.weight": 0}),
        ("qwen3_moe", (0, 2), {"gate.weight": 0}),
        ("mixtral", (3,), {"gate.weight": 0}),
        ("gpt_oss", (0, 6), {"router.weight": 0, "router.bias": 0}),
        ("minimax_m2", (5, 6), {"gate.weight": 0, "e_score_correction_bias": 0}),
        # Two groups of four: one slot of each goes.
        ("deepseek_v3", (1, 6), {"gate.weight": 0, "gate.e_score_correction_bias": 0}),
        ("ernie4_5_moe", (2, 3), {"gate.weight": 0, "gate.moe_statics.e_score_correction_bias": 1}),
        ("deepseek", (0, 1), {"gate.weight": 0}),
    ],
)
def test_pruned_is_a_smaller_checkpoint_with_sliced_routers(
    family: str, removed: tuple[int, ...], routers: dict[str, int], tmp_path: Path
) -> None:
    model = tiny_model(family)
    for name, tensor in model.state_dict().items():
        if "e_score_correction_bias" in name:
            tensor.copy_(torch.linspace(-1.0, 1.0, tensor.numel()).view_as(tensor))
    kept = kept_in(model, removed)
    package = pruned_package(model, tmp_path / "package", removed)
    done = export_hf(package, tmp_path / "plain", kept=kept)
    assert (done.kind, done.experts) == ("pruned", 8 - len(removed))
    shares_of_all = family in ("olmoe", "deepseek")  # a softmax, and nothing after it
    assert any("does not renormalise" in note for note in done.notes) == shares_of_all
    small = plain(tmp_path / "plain")
    # By hand: the same slices of the model, parameter by parameter.
    before, after = model.state_dict(), small.state_dict()
    assert before.keys() == after.keys()
    rows = torch.tensor(kept[next(iter(kept))])
    sliced = set()
    for name, tensor in before.items():
        ending = next((one for one in routers if name.endswith(f".{one}")), None)
        if ".experts." in name and ".shared_experts." not in name:
            tensor = tensor[rows]
        elif ending is not None and int(name.split(".")[2]) in kept:
            tensor = tensor.index_select(routers[ending], rows)
            sliced.add(ending)
        assert torch.equal(tensor, after[name]), name
    assert sliced == set(routers)


def test_pruned_logits_are_those_of_a_router_that_may_not_choose_the_others(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    removed = (1, 4, 7)
    package = pruned_package(model, tmp_path / "package", removed)
    export_hf(package, tmp_path / "plain", kept=kept_in(model, removed))
    found = logits_of(plain(tmp_path / "plain"))
    for layer in model.model.layers:
        gate = layer.mlp.gate

        def masked(hidden: torch.Tensor, gate: Any = gate) -> tuple[torch.Tensor, ...]:
            logits = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T
            logits[:, list(removed)] = -torch.inf
            weights, index = logits.softmax(-1).topk(3)
            return logits, weights, index

        gate.forward = masked
    torch.testing.assert_close(found, logits_of(model), atol=2e-5, rtol=1e-4)


def test_layers_with_different_numbers_are_refused(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    package = pruned_package(model, tmp_path / "package", (1,))
    kept = {**kept_in(model, (1,)), 2: (0, 2, 3, 4)}
    with pytest.raises(UnsupportedModel, match="different numbers of experts"):
        export_hf(package, tmp_path / "plain", kept=kept)


def test_groups_that_lost_different_numbers_are_refused(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    package = pruned_package(model, tmp_path / "package", (1, 2))
    with pytest.raises(UnsupportedModel, match="groups of the router"):
        export_hf(package, tmp_path / "plain", kept=kept_in(model, (1, 2)))


def test_fewer_experts_than_a_token_chooses_are_refused(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    removed = (0, 1, 2, 3, 4, 5)
    package = pruned_package(model, tmp_path / "package", removed)
    with pytest.raises(UnsupportedModel, match="fewer than the 3"):
        export_hf(package, tmp_path / "plain", kept=kept_in(model, removed))


# -- trimmed -----------------------------------------------------------------------------------------------------


def trimmed(model: Any, width: int) -> Any:
    """The model with the first ``width`` neurons of its experts, as a module of its own shapes."""
    for _, module in find_experts(model).values():
        full = module.down_proj.shape[2]
        gate, up = module.gate_up_proj.detach().split(full, 1)
        module.gate_up_proj = torch.nn.Parameter(torch.cat([gate[:, :width], up[:, :width]], 1))
        module.down_proj = torch.nn.Parameter(module.down_proj.detach()[:, :, :width].clone())
    return model


@pytest.mark.parametrize(
    ("family", "field"), [("olmoe", "intermediate_size"), ("qwen3_moe", "moe_intermediate_size")]
)
def test_trimmed_experts_change_the_field_of_their_width(
    family: str, field: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    package = write_package(trimmed(model, 8), tmp_path / "package", identity(model))
    done = export_hf(package, tmp_path / "plain")
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (done.width, written[field]) == (8, 8)
    before = json.loads((package / "config.json").read_text())
    assert {key for key in before if before[key] != written.get(key)} == {
        field,
        "quantization_config",
    }
    torch.testing.assert_close(
        logits_of(plain(tmp_path / "plain")),
        logits_of(conmoe_edge.load(package, device="cpu")),
        atol=2e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("widest", [12, 16])
def test_prototypes_of_different_widths_are_filled_up_to_the_widest(
    family: str, widest: int, tmp_path: Path
) -> None:
    model = tiny_model(family)
    slots = thirds(model)
    prototypes = sorted({slot.prototype for row in slots.values() for slot in row})
    widths = {one: (4, widest, 7)[number % 3] for number, one in enumerate(prototypes)}
    package = write_package(model, tmp_path / "package", slots, widths=widths)
    assert len(load_manifest(package).layouts) == 3
    done = export_hf(package, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    if family == "deepseek_v3":  # its shared experts are as wide as its routed ones
        assert done.width == config["moe_intermediate_size"] == 16
    else:
        assert done.width == widest
    exported = plain(tmp_path / "plain")
    for layer, (_, module) in find_experts(exported).items():
        down = module.down_proj if module.is_transposed else module.down_proj.transpose(1, 2)
        for slot, record in enumerate(slots[layer]):
            assert not bool(down[slot, widths[record.prototype] :].any())
    torch.testing.assert_close(
        logits_of(exported),
        logits_of(conmoe_edge.load(package, device="cpu")),
        atol=2e-5,
        rtol=1e-4,
    )


def test_a_fit_with_free_widths_and_constants_where_experts_have_a_bias(tmp_path: Path) -> None:
    """Nothing by hand: what ``auto`` writes of a model whose experts can hold constants."""
    source = save_tiny("gpt_oss", tmp_path / "source")
    save_tokenizer(source)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    conmoe_edge.fit(
        str(source),
        tmp_path / "package",
        budget="4GB",
        device="cpu",
        rate=0.5,
        calibration=tmp_path / "text.txt",
        calibration_tokens=512,
    )
    manifest = load_manifest(tmp_path / "package")
    assert len(manifest.layouts) > 1
    assert any(slot.constant is not None for row in manifest.slots.values() for slot in row)
    export_hf(tmp_path / "package", tmp_path / "plain")
    torch.testing.assert_close(
        logits_of(plain(tmp_path / "plain")),
        logits_of(conmoe_edge.load(tmp_path / "package", device="cpu")),
        atol=2e-5,
        rtol=1e-4,
    )


def test_trimmed_experts_are_filled_up_where_the_field_is_also_that_of_others(
    tmp_path: Path,
) -> None:
    model = tiny_model("deepseek_v3")  # its shared experts are as wide as its routed ones
    package = write_package(trimmed(model, 8), tmp_path / "package", identity(model))
    done = export_hf(package, tmp_path / "plain")
    assert done.width == 16 and any("8 of them zero" in note for note in done.notes)
    torch.testing.assert_close(
        logits_of(plain(tmp_path / "plain")),
        logits_of(conmoe_edge.load(package, device="cpu")),
        atol=2e-5,
        rtol=1e-4,
    )


# -- the folder --------------------------------------------------------------------------------------------------


def test_dense_int8_and_the_small_files(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    name = "model.layers.0.self_attn.q_proj.weight"
    package = write_package(model, tmp_path / "package", thirds(model), in_int8=[name])
    save_tokenizer(package)
    done = export_hf(package, tmp_path / "plain")
    assert any("8 bits and less" in note for note in done.notes)
    assert (tmp_path / "plain" / "tokenizer.json").is_file()
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    many = torch.arange(5, 25)[None]
    with without_operator():
        packed = logits_of(conmoe_edge.load(package, device="cpu"), many)
    torch.testing.assert_close(
        logits_of(plain(tmp_path / "plain"), many), packed, atol=2e-5, rtol=1e-4
    )


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    package = write_package(model, tmp_path / "package", thirds(model))
    plain_folder = tmp_path / "plain"
    export_hf(package, plain_folder)
    with pytest.raises(OutputExists, match="exists already"):
        export_hf(package, plain_folder)
    before = (plain_folder / EXPORT_FILE).read_bytes()
    export_hf(package, plain_folder, overwrite=True)
    assert (plain_folder / EXPORT_FILE).read_bytes() == before
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExists, match="not written by an export"):
        export_hf(package, theirs, overwrite=True)
    assert (theirs / "thesis.txt").read_text() == "years of work"


def test_the_same_package_gives_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    package = write_package(model, tmp_path / "package", thirds(model))
    for name in ("one", "two"):
        export_hf(package, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    package = write_package(model, tmp_path / "package", thirds(model))

    def stop(step: Any) -> None:
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_hf(package, tmp_path / "plain", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package"]


def test_one_layer_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """While a layer is reported, no other layer's weights are there."""
    model = tiny_model("olmoe")
    package = write_package(model, tmp_path / "package", thirds(model))
    manifest = load_manifest(package)
    import conmoe_edge.export.plain_tensors as plain_tensors

    loaded: list[int] = []

    class Watched(plain_tensors.StreamedModel):
        def layer(self, index: int, **options: Any) -> Any:
            loaded.append(
                sum(
                    any(not tensor.is_meta for tensor in layer.parameters())
                    for layer in self.layers
                )
            )
            return super().layer(index, **options)

    original, plain_tensors.StreamedModel = plain_tensors.StreamedModel, Watched
    try:
        export_hf(package, tmp_path / "plain")
    finally:
        plain_tensors.StreamedModel = original
    assert loaded == [0] * len(manifest.slots)


def test_what_it_says_of_a_manifest_with_masked_layers() -> None:
    """The field that pruning methods write: layers whose routers may only choose slots that give something."""
    from conmoe_edge.export.export_form import kept_slots

    row = (SlotRecord(ExpertId(0, 0)), SlotRecord(None), SlotRecord(None, 1.0, 0))

    class Masked:
        slots = {0: row, 1: row}  # noqa: RUF012
        rerouted = (0,)

    assert kept_slots(Masked()) == {0: (0, 2), 1: (0, 1, 2)}
