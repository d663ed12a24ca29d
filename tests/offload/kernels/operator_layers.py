"""A decoder layer of transformers as tables of the operator, for tests: which arguments each family needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.forms import Kind
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.offload.kernels.cpu.attention_tables import (
    AttentionTable,
    Cached,
    LatentTable,
    Positions,
)
from conmoe_edge.offload.kernels.cpu.bindings import Operator
from conmoe_edge.offload.kernels.cpu.decoder_tables import (
    BlockTable,
    RouterTable,
)
from conmoe_edge.offload.kernels.cpu.structs import (
    ExpertGate,
    Form,
    LayerTable,
    MlpTable,
    Prepared,
    PrototypeTable,
    RmsNorm,
)

ROOM = 64
LATE = ("GptOssRMSNorm", "FlexOlmoRMSNorm", "AfmoeRMSNorm")
PLUS_ONE = ("Qwen3NextRMSNorm", "Qwen3_5MoeRMSNorm")
EAGER = ("gpt_oss", "mimo_v2_flash")
DOUBLED = ("qwen3_next", "qwen3_5_moe_text")
TURNS = {
    **{"deepseek_v3": "split", "deepseek_v2": "pairs-wide", "ernie4_5_moe": "pairs-wide"},
    **{"flex_olmo": "halves-wide"},
}


def first(module: nn.Module, *names: str) -> Any:
    """The first of these attributes that there is."""
    return next(
        (getattr(module, one) for one in names if getattr(module, one, None) is not None), None
    )


@dataclass
class Tables:
    """A layer's tables, and room for its keys and values."""

    block: BlockTable
    router: RouterTable | None
    experts: LayerTable | None
    dense: MlpTable | None
    cache: tuple[Tensor, Tensor] | None


class Builder:
    """Tables of the layers of a model."""

    def __init__(self, engine: Operator, name: str, model: Any, kind: Kind = "plain") -> None:
        self.engine, self.name, self.config, self.kind = engine, name, model.config, kind

    def prepare(self, weight: Tensor, kind: Kind | None = None) -> Prepared:
        found = self.engine.prepare(quantise(weight.detach().contiguous(), kind or self.kind))
        assert found is not None
        return found

    def linear(self, module: nn.Linear) -> tuple[Prepared, Tensor | None]:
        return self.prepare(module.weight), None if module.bias is None else module.bias.detach()

    def norm(self, module: Any) -> RmsNorm | None:
        if module is None:
            return None
        weight = module.weight.detach()
        epsilon = first(module, "variance_epsilon", "eps")
        if isinstance(module, nn.LayerNorm):
            return RmsNorm(weight, epsilon, False, False, module.bias.detach())
        plus_one, late = type(module).__name__ in PLUS_ONE, type(module).__name__ in LATE
        return RmsNorm(weight, epsilon, plus_one, not (plus_one or late))

    def layer(self, module: Any) -> Tables:
        attention = getattr(module, "self_attn", None)
        table = None if attention is None else self.attention(attention)
        before = self.norm(first(module, "input_layernorm", "operator_norm"))
        after = first(module, "ffn_norm", "pre_ff_layernorm", "pre_mlp_layernorm")
        behind = first(module, "post_attention_layernorm")
        attended = given = None
        if self.name in ("flex_olmo", "afmoe"):
            attended = self.norm(behind)
            given = self.norm(first(module, "post_feedforward_layernorm", "post_mlp_layernorm"))
        elif after is None:
            after = behind
        block = BlockTable(
            *(table, before, self.norm(after)),
            **{"attended": attended, "given": given},
            multiplier=getattr(module, "residual_multiplier", 1.0),
        )
        mlp = first(module, "mlp", "block_sparse_moe", "feed_forward")
        experts = getattr(mlp, "experts", None)
        shared = first(mlp, "shared_experts", "shared_expert", "shared_mlp") or first(
            module, "shared_mlp"
        )
        cache = None
        if table is not None:
            heads, width, values = table.cache
            cache = (
                torch.zeros(1, heads, ROOM, width).bfloat16(),
                torch.zeros(1, heads, ROOM, values).bfloat16(),
            )
        if experts is None:
            return Tables(block, None, None, self.dense(mlp), cache)
        dense = None
        if shared is not None:
            dense = self.dense(shared, first(mlp, "shared_expert_gate"))
        return Tables(block, self.router(mlp), self.experts(experts), dense, cache)

    def dense(self, module: Any, share: Any = None) -> MlpTable:
        if hasattr(module, "input_linear"):
            halves = module.input_linear.weight.chunk(2)
            gate, up = [(self.prepare(one), None) for one in halves]
            down = self.linear(module.output_linear)
        else:
            names = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
            gate, up, down = [self.linear(first(module, *one)) for one in names]
        return MlpTable(
            *(gate[0], up[0], down[0]),
            biases=(gate[1], up[1], down[1]),
            share=None if share is None else self.prepare(share.weight),
        )

    def attention(self, module: Any) -> AttentionTable | LatentTable:
        turn: Any = TURNS.get(self.name, "halves")
        if hasattr(module, "kv_a_proj_with_mqa"):
            compressed = module.q_lora_rank is not None
            return LatentTable(
                self.prepare((module.q_b_proj if compressed else module.q_proj).weight),
                self.linear(module.kv_a_proj_with_mqa),
                self.norm(module.kv_a_layernorm),  # type: ignore[arg-type]
                self.prepare(module.kv_b_proj.weight),
                self.linear(module.o_proj),
                **{"heads": module.num_heads, "turned": module.qk_rope_head_dim},
                **{"value_width": module.v_head_dim, "scaling": module.scaling, "turn": turn},
                compress_query=self.linear(module.q_a_proj) if compressed else None,
                query_norm=self.norm(module.q_a_layernorm) if compressed else None,
            )
        output = first(module, "o_proj", "out_proj")
        linears = [
            self.linear(one) for one in (module.q_proj, module.k_proj, module.v_proj, output)
        ]
        norms = [
            self.norm(first(module, *names))
            for names in (
                ("q_norm", "q_layernorm", "query_layernorm"),
                ("k_norm", "k_layernorm", "key_layernorm"),
            )
        ]
        if self.name == "glm4_moe" and not module.use_qk_norm:
            norms = [None, None]
        window = getattr(module, "sliding_window", None) or 0
        if self.name == "mixtral":  # its caches are sliding by the config alone
            window = self.config.sliding_window or 0
        slides = getattr(module, "is_sliding", getattr(module, "is_local_attention", True))
        if (self.name == "afmoe" and not slides) or (
            self.name == "exaone_moe" and module.sliding_window is not None and not slides
        ):
            turn, window = "not", 0
        width = module.head_dim
        gate = getattr(module, "gate_proj", None)
        sinks = getattr(module, "sinks", None)
        return AttentionTable(
            *(linears, norms, width, float(module.scaling)),
            **{"turn": turn, "late": self.name == "hunyuan_v1_moe"},
            value_width=linears[2][0].form.rows // (linears[1][0].form.rows // width),
            value_scale=float(getattr(module, "v_scale", None) or 1.0),
            window=int(window),
            doubled=self.name in DOUBLED,
            gate=None if gate is None else self.prepare(gate.weight),
            eager=self.name in EAGER,
            sinks=None if sinks is None else sinks.detach(),
        )

    def router(self, block: Any) -> RouterTable:
        gate = first(block, "gate", "router")
        inner = first(gate, "wg", "gate") or gate
        matrix = self.prepare(inner.weight, "plain")
        bias = getattr(inner, "bias", None)
        correction = None
        for owner in (gate, block, getattr(gate, "moe_statics", None)):
            found = (
                None if owner is None else first(owner, "e_score_correction_bias", "expert_bias")
            )
            correction = found if found is not None else correction
        if correction is not None:
            correction = correction.detach().float().flatten().contiguous()
        chosen = 2 if self.name == "phimoe" else int(first(gate, "top_k") or first(block, "top_k"))
        arguments: dict[str, Any] = ROUTERS.get(self.name, {"narrow": True, "normed": None})
        arguments = dict(arguments)
        normed = arguments.pop("normed")
        if normed is None:
            normed = bool(first(gate, "norm_topk_prob") or False)
        if arguments.pop("scaled", False):
            arguments["scaling"] = float(first(gate, "routed_scaling_factor", "route_scale"))
        if arguments.pop("grouped", False) and gate.num_group > 1:
            arguments |= {"groups": gate.num_group, "kept": gate.topk_group}
            arguments["pairs"] = self.name != "deepseek_v2"
        if self.name == "phimoe":
            arguments["jitter"] = float(gate.router_jitter_noise)
        return RouterTable(
            *(matrix, chosen, normed),
            bias=None if bias is None else bias.detach(),
            correction=correction,
            **arguments,
        )

    def experts(self, module: Any) -> LayerTable:
        ups, downs = module.gate_up_proj, module.down_proj
        odd = self.name == "gpt_oss"
        count = len(ups)
        prototypes = PrototypeTable(count)
        forms: tuple[Form, Form] | None = None
        for number in range(count):
            up, down = [self.prepare(one[number].T if odd else one[number]) for one in (ups, downs)]
            biases = None
            if odd:
                biases = (
                    module.gate_up_proj_bias[number].detach(),
                    module.down_proj_bias[number].detach(),
                )
            prototypes.put(number, up, down, biases)
            forms = (up.form, down.form)
        assert forms is not None
        table = layer_table(prototypes, forms, count)
        if odd:
            table.with_gate(ExpertGate(float(module.alpha), float(module.limit), True))
        return table


def layer_table(prototypes: PrototypeTable, forms: tuple[Form, Form], count: int) -> LayerTable:
    """A layer whose slots are its prototypes, one each."""
    slots = SlotMap(0, tuple(range(count)), (1.0,) * count, (-1,) * count)
    return LayerTable(prototypes, [forms], slots, None)


def positions_of(name: str, given: Any) -> Positions | None:
    """What the operator is told of the position that transformers gives a layer."""
    if given is None:
        return None
    if isinstance(given, Tensor):
        return Positions.of_complex(given[0])
    cos, sin = given
    if name == "gpt_oss":
        return Positions.of_half(cos, sin)
    return Positions(cos, sin)


def cached(tables: Tables, held: int) -> Cached:
    assert tables.cache is not None
    return Cached.of(*tables.cache, held)


_SIGMOID = {"scores": "sigmoid", "narrow": False, "epsilon": 1e-20, "normed": None, "scaled": True}
_DEEPSEEK = {**_SIGMOID, "exact": True, "grouped": True}
_OF_CHOSEN = {"scores": "top-softmax", "narrow": True, "normed": False}
ROUTERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("deepseek_v3", "glm4_moe", "dots1", "solar_open", "exaone_moe", "mimo_v2_flash"), _DEEPSEEK
    ),
    "deepseek_v2": {
        **{"narrow": False, "normed": False, "exact": True, "scaled": True, "grouped": True},
    },
    "mixtral": {"narrow": False, "normed": True},
    **dict.fromkeys(("granitemoe", "granitemoeshared", "gpt_oss"), _OF_CHOSEN),
    "hunyuan_v1_moe": {"narrow": False, "normed": True, "exact": True},
    "ernie4_5_moe": {"narrow": True, "normed": True, "exact": True, "least": 1e-12},
    "minimax_m2": {"scores": "sigmoid", "narrow": False, "normed": True},
    "afmoe": {**_SIGMOID, "normed": True},
    "lfm2_moe": {
        **{"scores": "sigmoid", "narrow": True, "normed": None, "scaled": True},
        **{"epsilon": 1e-6, "stepwise": True},
    },
    "phimoe": {"scores": "sparsemixer", "narrow": True, "normed": False},
    "qwen3_5_moe_text": {"narrow": True, "normed": True},
}
