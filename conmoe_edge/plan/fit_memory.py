"""What a fit itself needs of this machine's RAM, as named terms that add up; arithmetic only.

The most of some moments: what is outside the layers is loaded, the text is embedded, a layer is loaded, text runs
through it, it is surveyed, it is decided, the package is measured. b = bytes of a number as it is computed here, H =
hidden size, V = vocabulary, E = experts of a layer, I = neurons of one, k = top-k, T = calibration tokens:

=====================  ============================================================================
in all of them         the process with torch
load, run, decide      a layer; the text's hidden states T·H·b, a quarter for the held-out ones,
                       and once more for the package's own stream, where the method aims or prototypes are rounded
outside                what is outside the layers, b a number, and one such table as the checkpoint has it
embed                  the same, and the hidden states
load                   one fused parameter of the layer twice more
run                    the stream and the layer's tokens, T·H·b each; a batch of activations
survey                 hidden states of 24 sequences at the most; the layer once more, as stand-ins; Gram matrices
                       E·I·I·4; and the work space of decide
decide                 the layer's tokens, T·H·b, slots and gates; of two experts at a time six Gram matrices of inputs,
                       H·H·4, and the prototype four times in fp32; and beside that
decide, ``auto``       activations of all routed tokens T·k·I·b, Gram matrices E·I·I·4, down projections E·H·I·4, what
                       is left of the target T·H·4, gate and up as they are rounded
decide, other methods  256 MiB of matrices that are rounded together
receipt                what is outside the layers, of the original as well where the package's is rounded; the held-out
                       hidden states of both; scores of a sequence, 2·512·V·b, and some of 64 positions
=====================  ============================================================================

Beside that, pieces that the heap keeps. All is counted as if no expert and no neuron went. Layers come and go, so
nothing grows with the depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from conmoe_edge.checkpoint.format.forms import LOW_BITS
from conmoe_edge.model.anatomy import ExpertsAnatomy, ModelAnatomy
from conmoe_edge.plan.levers import PRECISIONS
from conmoe_edge.plan.needs import PYTHON_BYTES
from conmoe_edge.plan.plan import Term
from conmoe_edge.plan.request import HELD_OUT_SHARE, SEQUENCE_LENGTH
from conmoe_edge.units import MIB

SLACK_BYTES, _IN_PIECES = 96 * MIB, 16
"""By which a process grows before its heap is trimmed (``memory/heap.py``); and the share of what comes and goes that
some layers leave in pieces, one in so many: 0.23 GiB of 4 in the third layer of OLMoE's shape.
"""
_HEAP = 128 * MIB
"""What the heap keeps in pieces where nothing is rounded."""
_AT_ONCE = 256 * MIB
_BATCH_VALUES, _MOST_TOKENS = 1 << 24, 1 << 14
AT_A_TIME = 2
"""Experts that are decided on at the same time (``compress/work/side_by_side.py``)."""
_POSITIONS = 6 * 64
"""What is compared at once (``compress/quality/receipt.py``), and how often that is there."""
_SURVEYED = 24
"""Sequences of the survey: six and three of the original, three of each changed model, and those that are running."""
_BYTES = {"float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class FitMemory:
    """The moment of a fit that takes the most RAM.

    Attributes:
        moment: ``outside``, ``embed``, ``load``, ``run``, ``survey``, ``decide`` or ``receipt``.
        terms: of that moment.
        moments: bytes of each.
    """

    moment: str
    terms: tuple[Term, ...]
    moments: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """All of it, the process included."""
        return sum(term.nbytes for term in self.terms)


def fit_memory(
    anatomy: ModelAnatomy,
    tokens: int,
    *,
    trims: bool,
    precision: str,
    dense: str,
    surveys: bool,
    wide: int,
    on_host: bool,
) -> FitMemory:
    """What consolidating a model takes.

    Args:
        anatomy: of the model.
        tokens: to calibrate on.
        trims: whether the method gives prototypes fewer neurons, and refits them.
        precision: of the prototypes.
        dense: precision of the rest; where that is none of the checkpoint's own, a receipt has two heads.
        surveys: whether it is measured first what each layer is worth.
        wide: bytes of a number as it is computed.
        on_host: whether layers run on the CPU; else their weights and batches are on the GPU.
    """
    kinds = {one for kind in PRECISIONS[precision].kinds for one in kind.split("-")}
    rounds = bool(kinds & {"int8", "int4", *LOW_BITS})  # with error feedback
    experts = max(anatomy.moe_experts, key=lambda one: one.count * one.expert_numel)
    text = tokens * anatomy.hidden_size * wide
    streams = (2 if trims or rounds else 1) * text + text // HELD_OUT_SHARE
    process = Term("Python and libraries", PYTHON_BYTES, "the process itself, with torch")
    hidden = Term("Hidden states", streams, f"of {tokens:,} calibration tokens, and those held out")
    outside = anatomy.outside_bytes * wide // _size(anatomy.dtype) if on_host else 0
    ends = Term("Outside of the layers", outside, "embeddings and head")
    table = anatomy.vocab_size * anatomy.hidden_size * _size(anatomy.dtype)
    layer = _layer_bytes(anatomy, experts, wide) if on_host else 0
    loaded = Term("One layer", layer, "its weights")
    held = (process, hidden, loaded)
    fused = max(math.prod(part.shape) * _size(part.dtype) for part in experts.parts)
    loading = 2 * experts.count * fused + _HEAP
    batch = 16 * min(_MOST_TOKENS, _BATCH_VALUES // anatomy.hidden_size) * anatomy.hidden_size
    few = _SURVEYED * SEQUENCE_LENGTH * anatomy.hidden_size * wide
    work = AT_A_TIME * (24 * anatomy.hidden_size**2 + 16 * experts.expert_numel) + SLACK_BYTES
    if trims:
        deciding = _refit_terms(anatomy, experts, tokens, wide)
    else:
        together = min(_AT_ONCE, 16 * experts.count * experts.expert_numel) if rounds else 0
        deciding = (Term("Rounding", together, "a few prototypes at a time"),)
    choices = 12 * tokens * experts.top_k + 8 * tokens * experts.count
    deciding = (
        Term("Tokens of the layer", text + choices, "with what the router chose"),
        *deciding,
    )
    pieces = sum(term.nbytes for term in (hidden, loaded, *deciding)) // _IN_PIECES
    scores = anatomy.vocab_size * (2 * SEQUENCE_LENGTH * wide + 4 * _POSITIONS) if on_host else 0
    surveyed = (
        process,
        replace(hidden, nbytes=few, note="of a few sequences"),
        loaded,
        Term("Stand-ins", layer, "at most; --passes 1 has none"),
        Term("Gram matrices", 4 * experts.count * experts.width**2, "of activations"),
        Term("Work space", work, "two prototypes being rounded"),
    )
    measured = replace(ends, nbytes=outside * (1 if dense == "source" else 2))
    moments = {
        "outside": (process, ends, Term("Loading", table + _HEAP, "the one that comes last")),
        "embed": (process, ends, hidden, Term("Work space", _HEAP, "what the heap keeps")),
        "load": (*held, Term("Loading", loading, "a parameter put together")),
        "run": (*held, Term("A batch", batch * wide + 2 * text, "activations, tokens")),
        "survey": surveyed if surveys else (),
        "decide": (
            *held,
            *deciding,
            Term("Work space", work + pieces, "two prototypes being rounded"),
        ),
        "receipt": (
            process,
            measured,
            Term("Hidden states", 2 * text // HELD_OUT_SHARE, "held out: original and package"),
            Term("Scores", scores, "of a sequence, of both"),
            Term("Work space", _HEAP, "what the heap keeps"),
        ),
    }
    sums = {name: sum(term.nbytes for term in terms) for name, terms in moments.items() if terms}
    most = max(sums, key=lambda name: sums[name])
    return FitMemory(most, moments[most], sums)


def _refit_terms(
    anatomy: ModelAnatomy, experts: ExpertsAnatomy, tokens: int, wide: int
) -> tuple[Term, ...]:
    """What ``auto`` holds of all prototypes of a layer at once."""
    neurons, outputs, count = experts.width, experts.outputs, experts.count
    return (
        Term("Target", 4 * tokens * anatomy.hidden_size, "what is left of it"),
        Term("Activations", tokens * experts.top_k * neurons * wide, "of all routed tokens"),
        Term("Gram matrices", 4 * count * neurons**2, "of activations"),
        Term("Down projections", 4 * count * outputs * neurons, "as they are solved"),
        Term("Rounded", count * experts.expert_numel // 2, "gate and up"),
    )


def _layer_bytes(anatomy: ModelAnatomy, experts: ExpertsAnatomy, wide: int) -> int:
    """A loaded layer: experts in the checkpoint's numbers, the rest in those of the computation."""
    held = sum(math.prod(part.shape) * _size(part.dtype) for part in experts.parts)
    dense = max(layer.dense_bytes for layer in anatomy.layers)
    return experts.count * held + dense * wide // _size(anatomy.dtype)


def _size(dtype: str) -> int:
    return _BYTES.get(dtype, 2)


def most_tokens(limit: int, tokens: int, need: Callable[[int], FitMemory]) -> int:
    """The most calibration tokens up to ``tokens``, in whole sequences, that need no more than ``limit`` bytes; 0 where
    not even one sequence does.
    """
    low, high = 0, tokens // SEQUENCE_LENGTH
    while low < high:
        middle = (low + high + 1) // 2
        if need(middle * SEQUENCE_LENGTH).nbytes <= limit:
            low = middle
        else:
            high = middle - 1
    return low * SEQUENCE_LENGTH
