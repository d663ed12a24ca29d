"""The importance matrix is the mean square of what enters a matrix, column by column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import tiny_model
from hand_packages import identity, write_package

from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.export.llama.architectures import architecture_of
from conmoe_edge.export.llama.gguf_file import GgufTensors
from conmoe_edge.export.llama.importance import Importance, ImportancePass
from conmoe_edge.export.plain_tensors import open_plain


def measured(package: Path, tokens: TokenSet) -> Importance:
    with open_plain(open_package(package)) as plain:
        config = plain.decided.config
        tensors = GgufTensors(architecture_of(config), config, torch.float32)
        run = ImportancePass(plain, tokens, tensors.name_of)
        for layer, portion in plain.portions():
            run.take(layer, portion)
        return run.found


def by_hand(model: Any, ids: torch.Tensor, layer: int) -> dict[str, np.ndarray]:
    """The same of one layer of OLMoE, from the inputs of its modules."""
    seen: dict[str, torch.Tensor] = {}
    block = model.model.layers[layer]
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].detach().flatten(0, -2)})
        )
        for name, module in {
            "attn_q": block.self_attn.q_proj,
            "attn_output": block.self_attn.o_proj,
            "moe": block.mlp,
        }.items()
    ]
    with torch.no_grad():
        for row in ids:
            model(row[None])
            for name in ("attn_q", "attn_output", "moe"):
                seen[f"all_{name}"] = torch.cat(
                    [seen.get(f"all_{name}", seen[name][:0]), seen[name]]
                )
    for hook in hooks:
        hook.remove()
    found = {
        name: seen[f"all_{name}"].square().mean(0).numpy() for name in ("attn_q", "attn_output")
    }
    hidden, experts = seen["all_moe"], block.mlp.experts
    chosen = (hidden @ block.mlp.gate.weight.T).topk(model.config.num_experts_per_tok).indices
    gate_up, down = [], []
    for expert in range(model.config.num_experts):
        rows = hidden[(chosen == expert).any(-1)]
        gate, up = (rows @ experts.gate_up_proj[expert].T).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        few = not len(rows)
        gate_up.append(torch.ones(hidden.shape[1]) if few else rows.square().mean(0))
        down.append(torch.ones(inner.shape[1]) if few else inner.square().mean(0))
    return {
        **found,
        "ffn_gate_exps": torch.stack(gate_up).detach().numpy(),
        "ffn_up_exps": torch.stack(gate_up).detach().numpy(),
        "ffn_down_exps": torch.stack(down).detach().numpy(),
    }


def test_against_the_inputs_of_the_modules(tmp_path: Path) -> None:
    """Two short texts leave experts that no token chose."""
    model = tiny_model("olmoe", num_key_value_heads=4)
    package = write_package(model, tmp_path / "package", identity(model))
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 90, (2, 2), generator=generator)
    found = measured(package, TokenSet(ids, torch.ones_like(ids, dtype=torch.bool), ("a", "b")))
    alone = 0
    for layer in range(model.config.num_hidden_layers):
        for name, wanted in by_hand(model, ids, layer).items():
            values = found[f"blk.{layer}.{name}.weight"]
            np.testing.assert_allclose(values, wanted, rtol=2e-4, atol=1e-9, err_msg=name)
            alone += name == "ffn_down_exps" and sum(bool((row == 1).all()) for row in values)
    assert alone > 0


def test_padding_does_not_count(tmp_path: Path) -> None:
    model = tiny_model("olmoe", num_key_value_heads=4)
    package = write_package(model, tmp_path / "package", identity(model))
    ids = torch.tensor([[7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 0, 0]])
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = measured(package, TokenSet(ids, mask, ("a", "b")))
    whole = measured(package, TokenSet(ids[:1], mask[:1], ("a",)))
    short = measured(package, TokenSet(ids[1:, :4], mask[1:, :4], ("b",)))
    name = "blk.0.attn_q.weight"
    np.testing.assert_allclose(found[name], 0.6 * whole[name] + 0.4 * short[name], rtol=1e-4)
