"""The transformers classes that the operator computes in transformers' place.

``LISTED`` is the whole list. Each entry says what the class is, in the terms of the operator, and which source code was
looked at (``source_digest.py``; ``python -m tools.fastpath_digests`` prints those of the installed release). A class is
served by its exact name and its digest. A subclass, a class of another name and a class whose code has changed go
transformers' way. Each entry has a test that takes 64 tokens and more both ways
(``tests/offload/fastpath/test_supported.py``).
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TypeVar

import transformers
from torch import nn

from conmoe_edge.model.source_digest import source_digest
from conmoe_edge.offload.kernels.cpu.structs import Scores, Turn


@dataclass(frozen=True, slots=True)
class Norm:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis; with ``shift`` of x less its mean, plus a bias.

    Attributes:
        epsilon: its attribute's name.
        early: x is rounded to its format before it meets the weight, not behind it.
        plus_one: the weight is one less than the factor.
    """

    epsilon: str = "variance_epsilon"
    early: bool = True
    plus_one: bool = False
    shift: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """Projections (with or without bias), norms, rotary positions, the cache, softmax, the output projection.

    Attributes:
        linears: names of the projections to queries, keys, values and of the output.
        norms: names of the norms of queries and keys, over all heads or over each as their widths say; empty for none.
        norms_if: the module's attribute that says whether it has the norms; empty where it always has.
        late: the norms come behind the positions.
        turn: how positions turn a head (``AttentionTable``).
        half_angles: cosines and sines are given for one half of a head.
        doubled: the projection to queries gives a gate as well.
        gate: name of a projection that gives such a gate; empty for none.
        turn_if: the module's attribute that says whether positions turn a head at all; empty where they do.
        turn_unless: or the attribute that says so by being ``None``.
        eager: scores and probabilities are rounded as ``eager_attention_forward`` does, the only way of the class.
        windows: cache layers may have a window, and tokens a mask that hides nothing.
        sinks: name of the logits without values, which may be ``None``; empty for none.
        value_width, value_scale: attributes with the width of a value and what values are times; empty for those of
            keys, and for 1.
        unset: settings of the configuration that must be ``None``.
    """

    linears: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    norms: tuple[str, ...] = ()
    norms_if: str = ""
    late: bool = False
    turn: Turn = "halves"
    half_angles: bool = False
    doubled: bool = False
    gate: str = ""
    turn_if: str = ""
    turn_unless: str = ""
    eager: bool = False
    windows: bool = False
    sinks: str = ""
    value_width: str = ""
    value_scale: str = ""
    unset: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the operator gives the same bits as transformers' steps with native products and norms, always. Else
        a sum in fp32 or an exponential may be rounded to the other side.
        """
        return self.turn == "halves" and not (
            self.doubled or self.gate or self.eager or self.windows
        )


@dataclass(frozen=True, slots=True)
class Latent:
    """Attention over compressed keys and values (DeepSeek-V2, arXiv:2405.04434), close to transformers' numbers.

    Attributes:
        turn: how positions turn the turning part of a head (``LatentTable``).
        turn_if: the setting of the configuration that must hold for that; empty for none.
    """

    turn: Turn
    turn_if: str = ""
    exact = False


@dataclass(frozen=True, slots=True)
class Router:
    """A router as ``RouterTable`` describes it.

    Attributes that are texts name attributes of the module, empty for none.

    Attributes:
        normed: whether gates are divided by their sum; a text names the attribute that says so.
        wide_gates: gates are fp32, else bf16.
        wide_logits: logits are given out in fp32, of the values in bf16.
        linear: the module inside that has the weight.
        wide_weight: only with a weight in fp32.
        chosen: how many slots a token gets, whatever the configuration says; 0 for as many as that says.
        groups: slots are chosen by groups; ``groups_if``: where an attribute has that value, and refused with any but
            "greedy" elsewhere.
    """

    normed: bool | str
    wide_gates: bool = False
    wide_logits: bool = False
    linear: str = ""
    wide_weight: bool = False
    chosen: int = 0
    scores: Scores = "softmax"
    exact: bool = False
    stepwise: bool = False
    correction: str = ""
    groups: bool = False
    groups_if: tuple[str, str] | None = None
    pairs: bool = False
    scaling: str = ""
    epsilon: float = 0.0
    least: str = ""
    jitter: str = ""


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(silu(gate(x)) * up(x)). Names of the parts.

    ``up`` is empty where ``gate`` has the rows of both, its own first. ``act``: the activation; empty where silu
    stands in the code.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    act: str = "act_fn"

    @property
    def linears(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(one for one in (self.gate, self.up, self.down) if one)


@dataclass(frozen=True, slots=True)
class Block:
    """A router and routed experts, perhaps with a shared expert. Names of the parts, empty for none.

    Attributes:
        shared: an ``Mlp`` that every token passes; a block may be without.
        share: the projection whose sigmoid its output is times.
        correction: the block's buffer that the router is called with.
        first: the block gives a tuple, the first of which counts.
        whole: the router takes [1, 1, H], not [1, H].
    """

    router: str = "gate"
    experts: str = "experts"
    shared: str = ""
    share: str = ""
    correction: str = ""
    first: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    """x + attention(before(x)), then that plus mlp(after(that)). Names of the parts, empty for none.

    Attributes:
        shared: an ``Mlp`` beside the mlp, whose outputs are added; a layer may be without.
        multiplier: the attribute that both summands are times.
        attended, given: norms behind the attention and the mlp.
    """

    before: str = "input_layernorm"
    attention: str = "self_attn"
    after: str = "post_attention_layernorm"
    mlp: str = "mlp"
    shared: str = ""
    multiplier: str = ""
    attended: str = ""
    given: str = ""

    @property
    def norms(self) -> tuple[str, ...]:
        """Those that there are."""
        names = (self.before, self.attended, self.after, self.given)
        return tuple(one for one in names if one)


@dataclass(frozen=True, slots=True)
class Part:
    """What belongs to a router that has it inside, and says nothing more."""


Piece = Norm | Attention | Latent | Router | Part | Mlp | Block | Layer
_QK = ("q_norm", "k_norm")
_GROUPED = Router(
    "norm_topk_prob",
    wide_gates=True,
    scores="sigmoid",
    exact=True,
    correction="e_score_correction_bias",
    groups=True,
    pairs=True,
    scaling="routed_scaling_factor",
    epsilon=1e-20,
)

# "family.Class" stands for transformers.models.<family>.modeling_<family>.Class; deepseek's are this package's own.
LISTED: dict[str, tuple[Piece, tuple[str, ...]]] = {
    "torch.LayerNorm": (Norm("eps", early=False, shift=True), ()),
    "afmoe.AfmoeAttention": (
        Attention(norms=_QK, turn_if="is_local_attention", gate="gate_proj", windows=True),
        ("312bd80b338ab738", "33f618ecc87deea6"),
    ),
    "afmoe.AfmoeDecoderLayer": (
        Layer(
            "input_layernorm",
            "self_attn",
            "pre_mlp_layernorm",
            attended="post_attention_layernorm",
            given="post_mlp_layernorm",
        ),
        ("94a159cc3899bc73", "f2f9c085e466711e", "83fb06b2b4e54e3b"),
    ),
    "afmoe.AfmoeMLP": (Mlp(), ("d2204b2781199cc7",)),
    "afmoe.AfmoeRMSNorm": (Norm(early=False), ("ccdf1e4e4b8bece9",)),
    "afmoe.AfmoeSparseMoeBlock": (
        Block(router="router", shared="shared_experts", correction="expert_bias", whole=True),
        ("d6203a483f9510d0", "94c2f0d3fa376372"),
    ),
    "afmoe.AfmoeTokenChoiceRouter": (
        Router(
            normed=True,
            wide_gates=True,
            wide_logits=True,
            linear="gate",
            scores="sigmoid",
            scaling="route_scale",
            epsilon=1e-20,
        ),
        ("62ec039c032d4898",),
    ),
    "deepseek.DeepseekMoe": (Block(shared="shared_experts"), ("05b52dd8846a63f6",)),
    "deepseek_v2.DeepseekV2Attention": (
        Latent("pairs-wide"),
        ("68093c2ede6b85c9", "5e137f7b35099eb1"),
    ),
    "deepseek_v2.DeepseekV2DecoderLayer": (Layer(), ("991f035b581977ec", "61a156f8dbd0dbcb")),
    "deepseek_v2.DeepseekV2MLP": (Mlp(), ("374fc81467663ff9",)),
    "deepseek_v2.DeepseekV2Moe": (Block(shared="shared_experts"), ("e612f4994289b1f9",)),
    "deepseek_v2.DeepseekV2RMSNorm": (Norm(), ("02438ce32beaaea3",)),
    "deepseek_v2.DeepseekV2TopkRouter": (
        Router(
            False,
            wide_gates=True,
            exact=True,
            groups_if=("topk_method", "group_limited_greedy"),
            scaling="routed_scaling_factor",
        ),
        ("2cc265cfa0fb29fa", "7a958a959d39ebd9"),
    ),
    "deepseek_v3.DeepseekV3Attention": (
        Latent("split", turn_if="rope_interleave"),
        ("0ed26beda18fd95a", "bbab336a2bf40955"),
    ),
    "deepseek_v3.DeepseekV3DecoderLayer": (Layer(), ("a7ff35cebc82c3ed", "62b4aa10c288badc")),
    "deepseek_v3.DeepseekV3MLP": (Mlp(), ("422cee737494c7ec",)),
    "deepseek_v3.DeepseekV3MoE": (Block(shared="shared_experts"), ("2aef712fb8742ddc",)),
    "deepseek_v3.DeepseekV3RMSNorm": (Norm(), ("03a8711697c6a533",)),
    "deepseek_v3.DeepseekV3TopkRouter": (_GROUPED, ("0c744c7f4448d291", "30ce8c3a5d596c32")),
    "dots1.Dots1Attention": (Attention(norms=_QK), ("ad16c0608739a425", "6fa75d568fc5b250")),
    "dots1.Dots1DecoderLayer": (Layer(), ("f060dcccbe4bc289", "0e687a3da197db56")),
    "dots1.Dots1MLP": (Mlp(), ("ff563f6769a602a5",)),
    "dots1.Dots1MoE": (Block(shared="shared_experts"), ("1c79a45ddec41c46",)),
    "dots1.Dots1RMSNorm": (Norm(), ("183b06fdca411fd8",)),
    "dots1.Dots1TopkRouter": (_GROUPED, ("c90d188c56dd854e", "04555b23ced671a0")),
    "ernie4_5_moe.Ernie4_5_MoeAttention": (
        Attention(turn="pairs-wide"),
        ("8491e3e83e4dc482", "bb0c911c26f0feb9"),
    ),
    "ernie4_5_moe.Ernie4_5_MoeDecoderLayer": (Layer(), ("57ce06ac3cc248a3", "26cf8e0d57cb65ba")),
    "ernie4_5_moe.Ernie4_5_MoeMLP": (Mlp(), ("cc5cc71bc8a19391",)),
    "ernie4_5_moe.Ernie4_5_MoeRMSNorm": (Norm(), ("ddeb6bcaae0fe412",)),
    "ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock": (
        Block(shared="shared_experts"),
        ("1029cdbf76a60cf7",),
    ),
    "ernie4_5_moe.Ernie4_5_MoeStatics": (Part(), ("379ae33a1c433df8",)),
    "ernie4_5_moe.Ernie4_5_MoeTopKRouter": (
        Router(
            normed=True,
            exact=True,
            correction="moe_statics.e_score_correction_bias",
            least="norm_min",
        ),
        ("d0fcaa59ff59ff79",),
    ),
    "exaone_moe.ExaoneMoeAttention": (
        Attention(norms=_QK, turn_if="is_sliding", turn_unless="sliding_window", windows=True),
        ("06d48c7bd339a0b1", "5239f379baa72d0e"),
    ),
    "exaone_moe.ExaoneMoeDecoderLayer": (Layer(), ("d98c4f536bdea495", "d06de07b98d33928")),
    "exaone_moe.ExaoneMoeMLP": (Mlp(), ("a6c7a7b989473983",)),
    "exaone_moe.ExaoneMoeRMSNorm": (Norm(), ("6fab087b98a7bf01",)),
    "exaone_moe.ExaoneMoeSparseMoEBlock": (Block(shared="shared_experts"), ("6e4e80b2520a5501",)),
    "exaone_moe.ExaoneMoeTopkRouter": (_GROUPED, ("a1e44b3395bd6b6c", "d69126eddc676c87")),
    "flex_olmo.FlexOlmoAttention": (
        Attention(norms=_QK, turn="halves-wide"),
        ("ead6d627d3803e72", "80adc83fab3970de"),
    ),
    "flex_olmo.FlexOlmoDecoderLayer": (
        Layer(
            before="",
            attended="post_attention_layernorm",
            after="",
            given="post_feedforward_layernorm",
        ),
        ("c72a761792cefabf", "adb2563a4d165199", "c7ca8a7ee83631f0"),
    ),
    "flex_olmo.FlexOlmoRMSNorm": (Norm(early=False), ("824cc1b50e747d44",)),
    "flex_olmo.FlexOlmoSparseMoeBlock": (Block(), ("f95a749d14582a9a",)),
    "flex_olmo.FlexOlmoTopKRouter": (Router("norm_topk_prob"), ("b39cd44a885d2d33",)),
    "gemma.GemmaRMSNorm": (Norm("eps", early=False, plus_one=True), ("191a055b68ca1402",)),
    "glm4_moe.Glm4MoeAttention": (
        Attention(norms=_QK, norms_if="use_qk_norm"),
        ("bfc6eedbcb82d8cc", "347385a68fc1278b"),
    ),
    "glm4_moe.Glm4MoeDecoderLayer": (Layer(), ("cce9b077c283e996", "d8c5f88b84b4f6c0")),
    "glm4_moe.Glm4MoeMLP": (Mlp(), ("d429733d4509b5ba",)),
    "glm4_moe.Glm4MoeMoE": (Block(shared="shared_experts"), ("f9109d39095d9b26",)),
    "glm4_moe.Glm4MoeRMSNorm": (Norm(), ("634ca8bf3c298a6b",)),
    "glm4_moe.Glm4MoeTopkRouter": (_GROUPED, ("04d085717f40b7f8", "3ad91e9dc272bf16")),
    "gpt_oss.GptOssAttention": (
        Attention(half_angles=True, eager=True, windows=True, sinks="sinks"),
        ("4609bc8e1ba0be94", "277d7b86e4f015d7"),
    ),
    "gpt_oss.GptOssDecoderLayer": (Layer(), ("f8df24a6e27bdf79", "983c10e1a48429b5")),
    "gpt_oss.GptOssMLP": (Block(router="router", first=True), ("80370ec897a2c28d",)),
    "gpt_oss.GptOssRMSNorm": (Norm(early=False), ("d7de8eb603b8281b",)),
    "gpt_oss.GptOssTopKRouter": (Router(normed=False, scores="top-softmax"), ("b143878cc67754c4",)),
    "granitemoe.GraniteMoeAttention": (Attention(), ("4acdd97189cb544e", "bd2bc97ea9c7b64b")),
    "granitemoe.GraniteMoeDecoderLayer": (
        Layer(mlp="block_sparse_moe", multiplier="residual_multiplier"),
        ("01e5f449abfa0cc1", "c47df3af6010b86e"),
    ),
    "granitemoe.GraniteMoeMoE": (Block(router="router"), ("43bf330c4b72f5ba",)),
    "granitemoe.GraniteMoeRMSNorm": (Norm(), ("47fdc26d93300786",)),
    "granitemoe.GraniteMoeTopKRouter": (
        Router(normed=False, scores="top-softmax", wide_logits=True),
        ("bb60d1ab8def3b4f",),
    ),
    "granitemoeshared.GraniteMoeSharedAttention": (
        Attention(),
        ("9be9413ce92e11f7", "cd0f6bee0d588617"),
    ),
    "granitemoeshared.GraniteMoeSharedDecoderLayer": (
        Layer(mlp="block_sparse_moe", shared="shared_mlp", multiplier="residual_multiplier"),
        ("c9d06f92652b7ad0", "ff242a86e8ac59bb", "12ede24a6204b24c"),
    ),
    "granitemoeshared.GraniteMoeSharedMLP": (
        Mlp("input_linear", "", "output_linear", act="activation"),
        ("8baa49625538756b",),
    ),
    "granitemoeshared.GraniteMoeSharedMoE": (Block(router="router"), ("6bc292e3800914f9",)),
    "granitemoeshared.GraniteMoeSharedRMSNorm": (Norm(), ("3e25bb9bd72de273",)),
    "granitemoeshared.GraniteMoeSharedTopKRouter": (
        Router(normed=False, scores="top-softmax", wide_logits=True),
        ("c324dd7a13e55572",),
    ),
    "hunyuan_v1_moe.HunYuanMoEV1Attention": (
        Attention(norms=("query_layernorm", "key_layernorm"), late=True),
        ("e520e2fe7f3e4a57", "5bf932bc0f3bc3f4"),
    ),
    "hunyuan_v1_moe.HunYuanMoEV1DecoderLayer": (Layer(), ("3962a15a496b3f32", "170886f09d8361b3")),
    "hunyuan_v1_moe.HunYuanMoEV1Gate": (
        Router(normed=True, wide_gates=True, exact=True, linear="wg", wide_weight=True),
        ("0c798b32b597c19a",),
    ),
    "hunyuan_v1_moe.HunYuanMoEV1MLP": (Mlp(), ("47e0d4e0479775ba",)),
    "hunyuan_v1_moe.HunYuanMoEV1Moe": (Block(shared="shared_mlp"), ("ec3a18f2391c27e3",)),
    "hunyuan_v1_moe.HunYuanMoEV1RMSNorm": (Norm(), ("85d6f281bbb6f978",)),
    "lfm2_moe.Lfm2MoeAttention": (
        Attention(("q_proj", "k_proj", "v_proj", "out_proj"), ("q_layernorm", "k_layernorm")),
        ("dd6b58132b0bc82a", "6ee2205a0f070241"),
    ),
    "lfm2_moe.Lfm2MoeDecoderLayer": (
        Layer("operator_norm", "self_attn", "ffn_norm", "feed_forward"),
        ("a917fd6c3ee32d27", "ad275517d0e4703d", "b3b087e3188a89bc", "832627aecf479e9b"),
    ),
    "lfm2_moe.Lfm2MoeMLP": (Mlp("w1", "w3", "w2", act=""), ("b0a7336126f08b29",)),
    "lfm2_moe.Lfm2MoeRMSNorm": (Norm(), ("c1fac20b159d4959",)),
    "lfm2_moe.Lfm2MoeSparseMoeBlock": (Block(correction="expert_bias"), ("982a4095ac5d7724",)),
    "lfm2_moe.Lfm2MoeTopKRouter": (
        Router(
            "norm_topk_prob",
            scores="sigmoid",
            stepwise=True,
            scaling="routed_scaling_factor",
            epsilon=1e-6,
        ),
        ("175e405551853219",),
    ),
    "llama.LlamaAttention": (Attention(), ("81b2ee8143c4cc21", "e9d1061d0ec11a4e")),
    "llama.LlamaDecoderLayer": (Layer(), ("e4907650e1d9a7b2", "b283fb402a8b5bed")),
    "llama.LlamaMLP": (Mlp(), ("a0cd7b26869c694f",)),
    "llama.LlamaRMSNorm": (Norm(), ("60518c76050cf6f5",)),
    "mimo_v2_flash.MiMoV2FlashAttention": (
        Attention(
            eager=True, windows=True, sinks="sinks", value_width="v_head_dim", value_scale="v_scale"
        ),
        ("15153c71423dbc52", "b3ac937ce5056f54"),
    ),
    "mimo_v2_flash.MiMoV2FlashDecoderLayer": (Layer(), ("41021e71a2f1847a", "f4e3b2f8fae52418")),
    "mimo_v2_flash.MiMoV2FlashMLP": (Mlp(), ("15f5ce95343099cc",)),
    "mimo_v2_flash.MiMoV2FlashMoE": (Block(), ("e9ffc8d6fee5dd56",)),
    "mimo_v2_flash.MiMoV2FlashRMSNorm": (Norm(), ("202582669a1b6749",)),
    "mimo_v2_flash.MiMoV2FlashTopkRouter": (_GROUPED, ("360080e020c4e67d", "90ed6b3cf180e613")),
    "minimax.MiniMaxRMSNorm": (Norm(), ("6fb619f66c888aa7",)),
    "minimax.MiniMaxTopKRouter": (Router(normed=True, wide_gates=True), ("8820a2dfa903f7a6",)),
    "minimax_m2.MiniMaxM2Attention": (
        Attention(norms=_QK),
        ("b27d41b223737489", "51ede599b0b156e8"),
    ),
    "minimax_m2.MiniMaxM2DecoderLayer": (Layer(), ("a4df7431c41dbbb0", "f7662c15c4c492e9")),
    "minimax_m2.MiniMaxM2RMSNorm": (Norm(), ("8000ce1d89153af6",)),
    "minimax_m2.MiniMaxM2SparseMoeBlock": (
        Block(correction="e_score_correction_bias"),
        ("5d505263a24f55c9",),
    ),
    "minimax_m2.MiniMaxM2TopKRouter": (
        Router(normed=True, wide_gates=True, scores="sigmoid"),
        ("feae8ffcdff34886",),
    ),
    "mixtral.MixtralAttention": (Attention(), ("aef13aad15790b35", "5d7d49829cec1794")),
    "mixtral.MixtralDecoderLayer": (Layer(), ("5fad1664bceb3031", "1f3d1d007c7fc1a4")),
    "mixtral.MixtralRMSNorm": (Norm(), ("2186821d0c630579",)),
    "mixtral.MixtralSparseMoeBlock": (Block(), ("1757a09704de5c6c",)),
    "mixtral.MixtralTopKRouter": (Router(normed=True, wide_gates=True), ("b9e36eaa58198a18",)),
    "olmoe.OlmoeAttention": (
        Attention(norms=_QK, unset=("clip_qkv",)),
        ("84a10a2d14bc35ec", "57fb39806085c6c7"),
    ),
    "olmoe.OlmoeDecoderLayer": (Layer(), ("23731c8bacbf1644", "2f7f1ece7e2f2c2a")),
    "olmoe.OlmoeRMSNorm": (Norm(), ("e54ef16f35aa60ef",)),
    "olmoe.OlmoeSparseMoeBlock": (Block(), ("999a587be719916f",)),
    "olmoe.OlmoeTopKRouter": (Router("norm_topk_prob"), ("06e9fa13525dc2e8",)),
    "phimoe.PhimoeAttention": (Attention(), ("b5de3aea02e2e122", "011fec7333bde501")),
    "phimoe.PhimoeDecoderLayer": (Layer(), ("32f2900502be6061", "0f06ef10094806fa")),
    "phimoe.PhimoeSparseMoeBlock": (Block(router="router"), ("fb400ee88fb92908",)),
    "phimoe.PhimoeTopKRouter": (
        Router(normed=False, scores="sparsemixer", chosen=2, jitter="router_jitter_noise"),
        ("f4222227aba1c26b",),
    ),
    "qwen2_moe.Qwen2MoeAttention": (Attention(), ("6adf35f9c902fec0", "270bff5d9182d3fa")),
    "qwen2_moe.Qwen2MoeDecoderLayer": (Layer(), ("f273709c18d77f29", "4f75d8b604d2f8b7")),
    "qwen2_moe.Qwen2MoeMLP": (Mlp(), ("8a9ad2471cfb830c",)),
    "qwen2_moe.Qwen2MoeRMSNorm": (Norm(), ("0201607acbcbca21",)),
    "qwen2_moe.Qwen2MoeSparseMoeBlock": (
        Block(shared="shared_expert", share="shared_expert_gate"),
        ("29a6657646dd9d61",),
    ),
    "qwen2_moe.Qwen2MoeTopKRouter": (Router("norm_topk_prob"), ("86b21540a731f9fe",)),
    "qwen3_5_moe.Qwen3_5MoeAttention": (
        Attention(norms=_QK, doubled=True),
        ("aed691c4a65d1130", "0e8937ae3f8cf2d8"),
    ),
    "qwen3_5_moe.Qwen3_5MoeDecoderLayer": (
        Layer(),
        ("2f08f9adea73a754", "17337203822d3e6d", "af3916101175d3f3"),
    ),
    "qwen3_5_moe.Qwen3_5MoeMLP": (Mlp(), ("e242e03eaf88d037",)),
    "qwen3_5_moe.Qwen3_5MoeRMSNorm": (
        Norm("eps", early=False, plus_one=True),
        ("288649b0210de8f4",),
    ),
    "qwen3_5_moe.Qwen3_5MoeSparseMoeBlock": (
        Block(shared="shared_expert", share="shared_expert_gate"),
        ("4e2295c2cecb6dbd",),
    ),
    "qwen3_5_moe.Qwen3_5MoeTopKRouter": (Router(normed=True), ("a3b5f6623d632c5d",)),
    "qwen3_moe.Qwen3MoeAttention": (Attention(norms=_QK), ("c3d65ecac7000e3c", "d803a606d0c4da7c")),
    "qwen3_moe.Qwen3MoeDecoderLayer": (Layer(), ("a96bdba6af43bc8c", "9c8053426e091fa9")),
    "qwen3_moe.Qwen3MoeMLP": (Mlp(), ("ea6b489d360653ad",)),
    "qwen3_moe.Qwen3MoeRMSNorm": (Norm(), ("4079d8727481a808",)),
    "qwen3_moe.Qwen3MoeSparseMoeBlock": (Block(), ("2d4fbccc22e19cea",)),
    "qwen3_moe.Qwen3MoeTopKRouter": (Router("norm_topk_prob"), ("006127af5859846e",)),
    "qwen3_next.Qwen3NextAttention": (
        Attention(norms=_QK, doubled=True),
        ("bbbaca005c994963", "8f6d5d5c5685ea5d"),
    ),
    "qwen3_next.Qwen3NextDecoderLayer": (
        Layer(),
        ("149bbdef980bf264", "11d1bf58a60e23c5", "bf54b1118e747f64"),
    ),
    "qwen3_next.Qwen3NextMLP": (Mlp(), ("fa44d3b46152ed5e",)),
    "qwen3_next.Qwen3NextRMSNorm": (Norm("eps", early=False, plus_one=True), ("bb97cdc1833f2535",)),
    "qwen3_next.Qwen3NextSparseMoeBlock": (
        Block(shared="shared_expert", share="shared_expert_gate"),
        ("407777fbae6c5e13",),
    ),
    "qwen3_next.Qwen3NextTopKRouter": (Router("norm_topk_prob"), ("5a990692cc433082",)),
    "solar_open.SolarOpenAttention": (Attention(), ("b81f9467514d3787", "dc4547a55018c3a3")),
    "solar_open.SolarOpenDecoderLayer": (Layer(), ("8f9f7ce21bda641c", "6ec6e7799501dd4e")),
    "solar_open.SolarOpenMLP": (Mlp(), ("a239aa3fb43c021d",)),
    "solar_open.SolarOpenMoE": (Block(shared="shared_experts"), ("5dff8097dfcae882",)),
    "solar_open.SolarOpenRMSNorm": (Norm(), ("d5453653d7d53c0e",)),
    "solar_open.SolarOpenTopkRouter": (_GROUPED, ("34773f92b352279e", "d015af3c18324ac5")),
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a module is left to transformers; no reason where it is another piece than the one asked for.

    ``changed``: its class is on the list, with other source code.
    """

    reason: str
    changed: bool = False


P = TypeVar("P", Norm, Attention, Latent, Router, Part, Mlp, Block, Layer)
OWN = "conmoe_edge.model.deepseek_modeling"
_NAME = re.compile(r"transformers\.models\.(\w+)\.modeling_\1$")


def look_up(module: nn.Module, kind: type[P]) -> P | Refusal:
    """What ``module`` is as a ``kind`` of piece; a refusal where its class is not listed as one, has changed, or where
    the instance has a ``forward`` of its own.
    """
    piece = _listed(type(module))
    if isinstance(piece, Refusal):
        return piece
    if not isinstance(piece, kind):
        return Refusal("")
    if "forward" in vars(module):
        return Refusal(f"the forward of {type(module).__name__} was replaced")
    return piece


def listed_name(kind: type) -> str | None:
    """ "family.Class" of a class of transformers, listed or not; ``None`` for any other class."""
    if kind is nn.LayerNorm:
        return "torch.LayerNorm"
    if kind.__module__ == OWN:
        return f"deepseek.{kind.__qualname__}"
    found = _NAME.match(kind.__module__)
    return f"{found[1]}.{kind.__qualname__}" if found else None


def module_of(family: str) -> ModuleType:
    """The module with the classes of a family, as the names of the list have it.

    Raises:
        ImportError: the installed transformers has none.
    """
    place = OWN if family == "deepseek" else f"transformers.models.{family}.modeling_{family}"
    return importlib.import_module(place)


def installed_digests() -> dict[str, tuple[str | None, bool]]:
    """Class on the list -> its digest in the installed transformers, ``None`` where that has no such class, and whether
    the list has it. Imports every family.
    """
    found: dict[str, tuple[str | None, bool]] = {}
    for name, (_, known) in sorted(LISTED.items()):
        family, _, kind = name.partition(".")
        if family == "torch":
            continue
        try:
            digest = source_digest(getattr(module_of(family), kind))
        except (ImportError, AttributeError, OSError):
            found[name] = (None, False)
        else:
            found[name] = (digest, digest in known)
    return found


def forget_digests() -> None:
    """Look at the source again: a class may have been changed since the last model was loaded."""
    _listed.cache_clear()


@cache
def _listed(kind: type) -> Piece | Refusal:
    name = listed_name(kind)
    if name is None or name not in LISTED:
        return _unlisted(kind)
    piece, digests = LISTED[name]
    try:
        same = kind is nn.LayerNorm or source_digest(kind) in digests
    except OSError as error:
        return Refusal(f"the source of {kind.__name__} cannot be read: {error}", changed=True)
    if same:
        return piece
    version = transformers.__version__
    return Refusal(
        f"{kind.__name__} of transformers {version} is not the code that was checked", changed=True
    )


def _unlisted(kind: type) -> Refusal:
    return Refusal(f"{kind.__name__} is not on the list")
