"""The transformers classes that the operator computes in transformers' place.

``LISTED`` is the whole list. Each entry says what the class is, in the terms of the operator, and which source code was
looked at (``source_digest.py``; ``python -m tools.fastpath_digests`` prints those of the installed release). A class is
served by its exact name and its digest. A subclass, a class of another name and a class whose code has changed go
transformers' way. Each entry has a test that takes 64 tokens and more both ways
(``tests/offload/fastpath/test_supported.py``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import transformers
from torch import nn

from conmoe_edge.offload.fastpath.source_digest import source_digest


@dataclass(frozen=True, slots=True)
class Norm:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis.

    Attributes:
        epsilon: its attribute's name.
        early: x is rounded to its format before it meets the weight, not behind it.
        plus_one: the weight is one less than the factor.
    """

    epsilon: str = "variance_epsilon"
    early: bool = True
    plus_one: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """Projections (with or without bias), norms, rotary positions of halves, the cache, softmax, the output projection.

    Attributes:
        linears: names of the projections to queries, keys, values and of the output.
        norms: names of the norms of queries and keys before the positions, over all heads or over each as their widths
            say; empty for none.
        norms_if: the module's attribute that says whether it has the norms; empty where it always has.
        unset: settings of the configuration that must be ``None``.
    """

    linears: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    norms: tuple[str, ...] = ()
    norms_if: str = ""
    unset: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Router:
    """Logits in bf16, softmax over all of them in fp32, the greatest.

    Attributes:
        normed: whether gates are divided by their sum; a text names the module's attribute that says so.
        wide_gates: gates are fp32, else bf16.
    """

    normed: bool | str
    wide_gates: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """A router and routed experts, and nothing else. Names of its two parts."""

    router: str = "gate"
    experts: str = "experts"


@dataclass(frozen=True, slots=True)
class Layer:
    """x + attention(before(x)), then that plus mlp(after(that)). Names of the four parts."""

    before: str = "input_layernorm"
    attention: str = "self_attn"
    after: str = "post_attention_layernorm"
    mlp: str = "mlp"

    @property
    def parts(self) -> tuple[str, str, str, str]:
        return self.before, self.attention, self.after, self.mlp


Piece = Norm | Attention | Router | Block | Layer
_QK = ("q_norm", "k_norm")

# "family.Class" stands for transformers.models.<family>.modeling_<family>.Class.
LISTED: dict[str, tuple[Piece, tuple[str, ...]]] = {
    "afmoe.AfmoeRMSNorm": (Norm(early=False), ("ccdf1e4e4b8bece9",)),
    "deepseek_v2.DeepseekV2RMSNorm": (Norm(), ("02438ce32beaaea3",)),
    "deepseek_v3.DeepseekV3RMSNorm": (Norm(), ("03a8711697c6a533",)),
    "dots1.Dots1Attention": (Attention(norms=_QK), ("ad16c0608739a425", "6fa75d568fc5b250")),
    "dots1.Dots1DecoderLayer": (Layer(), ("f060dcccbe4bc289", "0e687a3da197db56")),
    "dots1.Dots1RMSNorm": (Norm(), ("183b06fdca411fd8",)),
    "ernie4_5_moe.Ernie4_5_MoeRMSNorm": (Norm(), ("ddeb6bcaae0fe412",)),
    "exaone_moe.ExaoneMoeRMSNorm": (Norm(), ("6fab087b98a7bf01",)),
    "flex_olmo.FlexOlmoRMSNorm": (Norm(early=False), ("824cc1b50e747d44",)),
    "flex_olmo.FlexOlmoTopKRouter": (Router("norm_topk_prob"), ("b39cd44a885d2d33",)),
    "gemma.GemmaRMSNorm": (Norm("eps", early=False, plus_one=True), ("191a055b68ca1402",)),
    "glm4_moe.Glm4MoeAttention": (
        Attention(norms=_QK, norms_if="use_qk_norm"),
        ("bfc6eedbcb82d8cc", "347385a68fc1278b"),
    ),
    "glm4_moe.Glm4MoeDecoderLayer": (Layer(), ("cce9b077c283e996", "d8c5f88b84b4f6c0")),
    "glm4_moe.Glm4MoeRMSNorm": (Norm(), ("634ca8bf3c298a6b",)),
    "gpt_oss.GptOssRMSNorm": (Norm(early=False), ("d7de8eb603b8281b",)),
    "granitemoe.GraniteMoeAttention": (Attention(), ("4acdd97189cb544e", "bd2bc97ea9c7b64b")),
    "granitemoe.GraniteMoeRMSNorm": (Norm(), ("47fdc26d93300786",)),
    "granitemoeshared.GraniteMoeSharedAttention": (
        Attention(),
        ("9be9413ce92e11f7", "cd0f6bee0d588617"),
    ),
    "granitemoeshared.GraniteMoeSharedRMSNorm": (Norm(), ("3e25bb9bd72de273",)),
    "hunyuan_v1_moe.HunYuanMoEV1RMSNorm": (Norm(), ("85d6f281bbb6f978",)),
    "lfm2_moe.Lfm2MoeRMSNorm": (Norm(), ("c1fac20b159d4959",)),
    "llama.LlamaAttention": (Attention(), ("81b2ee8143c4cc21", "e9d1061d0ec11a4e")),
    "llama.LlamaDecoderLayer": (Layer(), ("e4907650e1d9a7b2", "b283fb402a8b5bed")),
    "llama.LlamaRMSNorm": (Norm(), ("60518c76050cf6f5",)),
    "mimo_v2_flash.MiMoV2FlashRMSNorm": (Norm(), ("202582669a1b6749",)),
    "minimax.MiniMaxRMSNorm": (Norm(), ("6fb619f66c888aa7",)),
    "minimax.MiniMaxTopKRouter": (Router(normed=True, wide_gates=True), ("8820a2dfa903f7a6",)),
    "minimax_m2.MiniMaxM2Attention": (
        Attention(norms=_QK),
        ("b27d41b223737489", "51ede599b0b156e8"),
    ),
    "minimax_m2.MiniMaxM2DecoderLayer": (Layer(), ("a4df7431c41dbbb0", "f7662c15c4c492e9")),
    "minimax_m2.MiniMaxM2RMSNorm": (Norm(), ("8000ce1d89153af6",)),
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
    "qwen2_moe.Qwen2MoeAttention": (Attention(), ("6adf35f9c902fec0", "270bff5d9182d3fa")),
    "qwen2_moe.Qwen2MoeDecoderLayer": (Layer(), ("f273709c18d77f29", "4f75d8b604d2f8b7")),
    "qwen2_moe.Qwen2MoeRMSNorm": (Norm(), ("0201607acbcbca21",)),
    "qwen2_moe.Qwen2MoeTopKRouter": (Router("norm_topk_prob"), ("86b21540a731f9fe",)),
    "qwen3_5_moe.Qwen3_5MoeRMSNorm": (
        Norm("eps", early=False, plus_one=True),
        ("288649b0210de8f4",),
    ),
    "qwen3_5_moe.Qwen3_5MoeTopKRouter": (Router(normed=True), ("a3b5f6623d632c5d",)),
    "qwen3_moe.Qwen3MoeAttention": (Attention(norms=_QK), ("c3d65ecac7000e3c", "d803a606d0c4da7c")),
    "qwen3_moe.Qwen3MoeDecoderLayer": (Layer(), ("a96bdba6af43bc8c", "9c8053426e091fa9")),
    "qwen3_moe.Qwen3MoeRMSNorm": (Norm(), ("4079d8727481a808",)),
    "qwen3_moe.Qwen3MoeSparseMoeBlock": (Block(), ("2d4fbccc22e19cea",)),
    "qwen3_moe.Qwen3MoeTopKRouter": (Router("norm_topk_prob"), ("006127af5859846e",)),
    "qwen3_next.Qwen3NextRMSNorm": (Norm("eps", early=False, plus_one=True), ("bb97cdc1833f2535",)),
    "qwen3_next.Qwen3NextTopKRouter": (Router("norm_topk_prob"), ("5a990692cc433082",)),
    "solar_open.SolarOpenAttention": (Attention(), ("b81f9467514d3787", "dc4547a55018c3a3")),
    "solar_open.SolarOpenDecoderLayer": (Layer(), ("8f9f7ce21bda641c", "6ec6e7799501dd4e")),
    "solar_open.SolarOpenRMSNorm": (Norm(), ("d5453653d7d53c0e",)),
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a module is left to transformers; no reason where it is another piece than the one asked for.

    ``changed``: its class is on the list, with other source code.
    """

    reason: str
    changed: bool = False


P = TypeVar("P", Norm, Attention, Router, Block, Layer)
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
    found = _NAME.match(kind.__module__)
    return f"{found[1]}.{kind.__qualname__}" if found else None


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
        same = source_digest(kind) in digests
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
