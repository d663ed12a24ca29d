"""What stands around a layer's attention and its experts as the operator is told it: norms, multiplier and router."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from conmoe_edge.offload.kernels.cpu.attention_tables import (
    AttentionTable,
    LatentTable,
    _Attention,
    _Latent,
)
from conmoe_edge.offload.kernels.cpu.structs import (
    _NO_NORM,
    Prepared,
    RmsNorm,
    Scores,
    _Gate,
    _Layer,
    _Linear,
    _linear,
    _Mlp,
    _Norm,
    _Prototypes,
    _row,
)
from conmoe_edge.offload.kernels.cpu.together_tables import _Place


class _Block(ctypes.Structure):
    _fields_: ClassVar = [
        *[("attention", _Attention), ("latent", ctypes.c_void_p)],
        *[(name, _Norm) for name in ("before", "attended", "after", "given")],
        *[("columns", ctypes.c_int64), ("multiplier", ctypes.c_float)],
    ]


class BlockTable:
    """What stands around a layer's attention and its experts, for ``block``, ``feed_forward`` and ``decoder``.

    With every step rounded to bf16 and norms that are ``None`` left out::

        s = x + attended(attention(before(x))) * multiplier
        y = s + given(experts(after(s))) * multiplier

    Attributes:
        hidden: width of the activations.
        attention: as given; ``None`` where the table is for ``feed_forward`` alone.
        between: for layers without router, as ``RouterTable.between``.
    """

    def __init__(
        self,
        attention: AttentionTable | LatentTable | None,
        before: RmsNorm | None,
        after: RmsNorm | None,
        *,
        attended: RmsNorm | None = None,
        given: RmsNorm | None = None,
        multiplier: float = 1.0,
        hidden: int | None = None,
    ) -> None:
        """Every argument is kept alive; ``hidden`` is needed where there are neither attention nor norms.

        Raises:
            ValueError: a norm of another width, or no width at all.
        """
        norms = (before, attended, after, given)
        widths = {one.columns for one in norms if one is not None}
        if attention is not None:
            widths.add(attention.hidden)
        if hidden is not None:
            widths.add(hidden)
        if len(widths) != 1:
            raise ValueError("a norm has another width than the layer")
        (self.hidden,) = widths
        self.attention = attention
        self._kept = norms
        latent = isinstance(attention, LatentTable)
        self._struct = _Block(
            *(attention.struct if isinstance(attention, AttentionTable) else _Attention(),),
            attention.address if latent else None,
            *[_NO_NORM if one is None else one.struct for one in norms],
            *(self.hidden, multiplier),
        )
        self.address = ctypes.addressof(self._struct)
        self.between, self.between_address, self._room = _between(self.hidden)


class _Router(ctypes.Structure):
    _fields_: ClassVar = [
        *[("linear", _Linear), ("correction", ctypes.c_void_p)],
        *[(name, ctypes.c_int64) for name in ("chosen", "groups", "kept")],
        *[(name, ctypes.c_float) for name in ("scaling", "epsilon", "least", "threshold")],
        *[(name, ctypes.c_int32) for name in ("scores", "pairs", "normed")],
        *[(name, ctypes.c_int32) for name in ("narrow", "exact", "stepwise")],
    ]


class _Between(ctypes.Structure):
    _fields_: ClassVar = [
        (name, ctypes.c_void_p) for name in ("sum", "normed", "logits", "gates", "slots")
    ]


_SCORES: tuple[Scores, ...] = ("softmax", "sigmoid", "top-softmax", "sparsemixer")  # as in router.h


class RouterTable:
    """A router for ``Operator.route``.

    In this order: logits W x + b; scores; ``correction`` is added, for the choice alone; of ``groups`` of neighbouring
    slots the ``kept`` best are left; the ``chosen`` greatest. Their scores are the gates, with ``normed`` divided by
    max(sum + ``epsilon``, ``least``); times ``scaling``.

    ===================================================  ==============================================================
    olmoe, qwen2_moe, qwen3_moe, qwen3_next, flex_olmo   ``normed`` as configured, ``narrow``
    mixtral, minimax                                     ``normed``
    granitemoe, gpt_oss (with ``bias``)                  ``scores="top-softmax"``, ``narrow``
    hunyuan_v1_moe                                       ``normed``, ``exact``
    ernie4_5_moe                                         ``normed``, ``narrow``, ``exact``, ``correction``, ``least``
    deepseek_v2                                          ``exact``, ``scaling``; "group_limited_greedy": groups
    deepseek_v3, glm4_moe, dots1, solar_open, exaone     ``scores="sigmoid"``, ``exact``, ``correction``, groups with
                                                         ``pairs``, ``normed``, ``epsilon=1e-20``, ``scaling``
    minimax_m2                                           ``scores="sigmoid"``, ``correction``, ``normed``
    afmoe                                                the same, ``epsilon=1e-20``, ``scaling``
    lfm2_moe                                             ``scores="sigmoid"``, ``correction``, ``stepwise``, ``narrow``,
                                                         ``normed``, ``epsilon=1e-6``, ``scaling``
    phimoe                                               ``scores="sparsemixer"``, ``jitter``, ``narrow``
    ===================================================  ==============================================================

    granitemoe gives its logits in fp32, of the same values.

    Attributes:
        slots, chosen, hidden: how many there are, how many a token gets, the width of its activations.
        gates, logits: their formats.
        between: what ``Operator.decoder`` found on the way to the experts, overwritten by the next call: the sum behind
            the attention, its norm (bf16 [1, H]), the slots (int64 [1, K]) and their gates.
    """

    def __init__(
        self,
        matrix: Prepared,
        chosen: int,
        normed: bool,
        narrow: bool,
        *,
        scores: Scores = "softmax",
        bias: Tensor | None = None,
        correction: Tensor | None = None,
        groups: int = 1,
        kept: int = 1,
        pairs: bool = False,
        scaling: float = 1.0,
        epsilon: float = 0.0,
        least: float = 0.0,
        jitter: float = 0.0,
        exact: bool = False,
        stepwise: bool = False,
    ) -> None:
        """``matrix``, ``bias`` and ``correction`` are kept alive.

        Args:
            matrix: [E, H].
            chosen: slots of a token, at most E.
            normed: whether gates are divided by their sum.
            narrow: whether they are bf16, else fp32.
            scores: "softmax" and "sigmoid" of the logits, all of them; "top-softmax" chooses by the logits, and gates
                are the softmax of those chosen; "sparsemixer" chooses two as Phi-3.5-MoE does (arXiv:2404.14219).
            bias: bf16 [E], of the logits.
            correction: fp32 [E].
            groups, kept: of slots; one group is none.
            pairs: a group is as good as the sum of its two greatest, else as its greatest.
            scaling, epsilon, least: as above.
            jitter: of "sparsemixer": logits within twice that are near.
            exact: logits are fp32; else they are rounded to bf16.
            stepwise: scores and each later step are rounded to bf16.

        Raises:
            ValueError: sizes or formats that do not go together.
        """
        form = matrix.form
        self.slots, self.chosen, self.hidden = form.rows, chosen, form.columns
        self.gates = torch.bfloat16 if narrow else torch.float32
        self.logits = torch.float32 if exact else torch.bfloat16
        if groups < 1 or not 1 <= kept <= groups or self.slots % groups:
            raise ValueError(f"{kept} of {groups} groups of {self.slots} slots")
        if not 1 <= chosen <= self.slots // groups * kept:
            raise ValueError(f"{chosen} of {self.slots} slots in {kept} of {groups} groups")
        if scores == "sparsemixer" and (chosen != 2 or exact or normed or groups > 1):
            raise ValueError("sparsemixer chooses two slots by logits in bf16, and nothing else")
        at_correction = _row(correction, self.slots, torch.float32)
        threshold = float(torch.tensor(2 * jitter, device="cpu").to(torch.bfloat16))
        self._struct = _Router(
            *(_linear(matrix, bias), at_correction, chosen, groups, kept),
            *(scaling, epsilon, least, threshold),
            *(_SCORES.index(scores), pairs, normed, narrow, exact, stepwise),
        )
        self.address = ctypes.addressof(self._struct)
        logits = torch.zeros(1, self.slots, dtype=self.logits, device="cpu")
        slots = torch.zeros(1, chosen, dtype=torch.int64, device="cpu")
        gates = torch.zeros(1, chosen, dtype=self.gates, device="cpu")
        self.between, self.between_address, room = _between(self.hidden, logits, slots, gates)
        self._kept = (matrix, bias, correction, room)


def between_room(
    hidden: int, tokens: int, router: RouterTable | None
) -> tuple[Between, ctypes.Structure, Tensor | None]:
    """Room for what stands between attention and experts of so many tokens, and what is to be kept alive for it; it has
    the room's addresses.
    """
    summed, normed = [
        torch.empty(tokens, hidden, dtype=torch.bfloat16, device="cpu") for _ in range(2)
    ]
    logits, gates, slots = None, summed[:0], summed[:0]
    if router is not None:
        logits = torch.empty(tokens, router.slots, dtype=router.logits, device="cpu")
        gates = torch.empty(tokens, router.chosen, dtype=router.gates, device="cpu")
        slots = torch.empty(tokens, router.chosen, dtype=torch.int64, device="cpu")
    places = (summed, normed, logits, gates, slots)
    struct = _Between(*[None if one is None else one.data_ptr() for one in places])
    return Between(summed, normed, slots, gates), struct, logits


def _between(
    hidden: int,
    logits: Tensor | None = None,
    slots: Tensor | None = None,
    gates: Tensor | None = None,
) -> tuple[Between, int, object]:
    """Room for what stands between attention and experts, its address, and what has to be kept alive for it."""
    summed, normed = [torch.zeros(1, hidden, dtype=torch.bfloat16, device="cpu") for _ in range(2)]
    empty = torch.zeros(1, 0, device="cpu")
    found = Between(
        summed, normed, empty if slots is None else slots, empty if gates is None else gates
    )
    places = (summed, normed, logits, gates, slots)
    struct = _Between(*[None if one is None else one.data_ptr() for one in places])
    return found, ctypes.addressof(struct), (struct, logits)


@dataclass(frozen=True, slots=True)
class Between:
    """See ``RouterTable.between``."""

    summed: Tensor
    normed: Tensor
    slots: Tensor
    gates: Tensor


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    *(_Prototypes, _Gate, _Layer, _Norm, _Linear, _Attention, _Latent, _Block, _Mlp),
    *(_Router, _Between, _Place),
)
"""All that C++ has as well; ``build.py`` makes the compiler compare them."""
