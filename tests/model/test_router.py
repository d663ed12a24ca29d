"""The router of every family is found, and gives the logits behind its choice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCAB, save_tiny, tiny_config

from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.compress.stats.layer_tokens import LayerTokens, TokenRecorder
from conmoe_edge.compress.stream.expert_hooks import IMPLEMENTATION, RoutedTap, attach, register
from conmoe_edge.model import bridge
from conmoe_edge.model.router import Selection, find_routers, logits_to
from conmoe_edge.model.streaming import Batch, StreamedModel

NAMES = [family.model_type for family in FAMILIES]
IN_GROUPS = ("deepseek_v3", "exaone_moe", "glm4_moe", "solar_open")
ON_LOGITS = ("gpt_oss", "granitemoe", "granitemoeshared", "phimoe")


@pytest.mark.parametrize("name", NAMES)
def test_found_with_its_way_of_choosing(name: str) -> None:
    model = bridge.build_meta(tiny_config(name), torch.float32)
    routers = find_routers(model)
    assert sorted(routers) == sorted(bridge_layers(model))
    for router in routers.values():
        assert router.slots == 8 and "experts" not in router.path
        found = router.selection
        assert found.chosen == (2 if name == "phimoe" else 3) and found.calls > 0
        assert (found.groups, found.open_groups, found.per_group) == (
            (2, 1, 2) if name in IN_GROUPS else (1, 1, 1)
        )
        assert found.on_logits == (name in ON_LOGITS)


def bridge_layers(model) -> list[int]:
    from conmoe_edge.model.experts import find_experts

    return list(find_experts(model))


def test_groups_ranked_by_their_best_slot() -> None:
    config = tiny_config("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2)
    router = find_routers(bridge.build_meta(config, torch.float32))[1]
    assert router.selection == Selection(
        chosen=3, groups=4, open_groups=2, per_group=1, on_logits=False, calls=1
    )


def tokens_of(folder: Path) -> dict[int, LayerTokens]:
    """What a recorder keeps of each layer: two batches of one sequence, the second with padding."""
    register()
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, :3] = 0
    found = {}
    with ShardReader(CheckpointIndex.open(folder)) as reader:
        model = StreamedModel(
            bridge.read_config(str(folder)),
            list(reader),
            lambda keys: {key: reader[key] for key in keys},
            dtype=torch.float32,
            experts_dtype=torch.float32,
            device=torch.device("cpu"),
            experts_implementation=IMPLEMENTATION,
        )
        routers = model.routers()
        model.load_outside()
        batches = [Batch(ids[:1], None), Batch(ids[1:], mask)]
        hidden = [model.prologue(batch) for batch in batches]
        for layer in range(len(model.layers)):
            tap = RoutedTap()
            with model.layer(layer):
                if layer in model.experts:
                    tap.tokens = TokenRecorder()
                    attach(model.experts[layer][1], tap)
                for number, batch in enumerate(batches):
                    tap.keep = None if number == 0 else mask.reshape(-1).bool()
                    if layer in routers:
                        with logits_to(routers[layer], tap.take_logits):
                            hidden[number] = model.run_layer(layer, hidden[number], batch)
                    else:
                        hidden[number] = model.run_layer(layer, hidden[number], batch)
            if tap.tokens is not None:
                found[layer] = tap.tokens.result()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_tokens(name: str, tmp_path: Path) -> None:
    """One row a real token; the chosen slots are the ones with the greatest logits (biases are zero here)."""
    save_tiny(name, tmp_path)
    for seen in tokens_of(tmp_path).values():
        assert seen.logits is not None and seen.logits.shape == (21, 8)
        if name in IN_GROUPS or name in ("afmoe", "minimax_m2", "ernie4_5_moe", "lfm2_moe"):
            chosen = seen.logits.gather(1, seen.slots)  # groups and random biases have a say
            assert bool(chosen.isfinite().all())
            continue
        best = seen.logits.topk(seen.slots.shape[1], dim=-1).indices
        assert torch.equal(best.sort(-1).values, seen.slots.sort(-1).values)
