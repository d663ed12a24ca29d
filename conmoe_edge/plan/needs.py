"""What the device tier must hold besides the prototypes, as named terms that add up.

Each formula is bytes for one sequence; b = bytes of the computing dtype (4 for float32, else 2),
H = hidden size, I = expert width, k = top-k, T = tokens of one forward (the prefill chunk),
N = tokens of context, V = vocabulary, E = experts of a layer.

========================  ========================================================================
Python and libraries      a constant on ``cpu``, where the process shares the RAM with the model
CUDA context, allocator   a constant on ``cuda``
Dense weights             everything outside the routed experts, as it is stored
Slot constants            of all router slots, where they are planned
KV cache                  ``ModelAnatomy.kv_bytes(N)``
Workspace                 hidden states, attention projections   10·T·H·b
                          routed rows through the experts        T·k·(2I + I + H)·b
                          router probabilities                   3·T·E·4
                          attention that is not fused            3·heads·T·N·b, of 64 tokens
                                                                 where it goes by blocks
                          windows, of more than 512 tokens       (T - 512)·bytes of a token
                          growing one layer's cache copies it,
                       or expands it from 8 bits              its bytes at N, in b
                          grouped-query heads are repeated       4·N·H·b, if cached narrower
                          attention mask                         4·T·N
                          logits of the last position            V·(4 + b)
                          one expert in float32 (``cpu`` only)   4·(parameters of an expert)
                          rows of a dense matrix in float32      8 MiB, unless they are stored so
Transfer buffers          two records: one arrives while the other is used
========================  ========================================================================

The float32 expert is there because CPUs without native bfloat16 arithmetic multiply a whole chunk
several times faster after widening the weights. The repeated heads count where a layer caches less
than 2·H·b a token; they bound ``heads * head_dim`` by 2·H, as wide as known models have it.
Where transformers has no fused attention for a class, scores, scores beside its sinks and their softmax
are there at once. A layer with a window holds all tokens of a chunk until the next one comes; 512 of
them are counted with the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conmoe_edge.checkpoint.format.manifest import MAX_CHUNK, USUAL_CHUNK
from conmoe_edge.memory.budget import DeviceKind
from conmoe_edge.model.anatomy import WINDOW_AHEAD, ExpertsAnatomy, KVLayer, ModelAnatomy
from conmoe_edge.plan.plan import Term
from conmoe_edge.units import MIB

# Resident set of Python with torch and transformers after a small forward and a GEMM: 403 MiB
# (torch 2.13, Linux, two threads); the rest is for the tokenizer, the command line and what malloc
# keeps.
PYTHON_BYTES = 512 * MIB
# CUDA context, cuBLAS and lazily loaded kernels take 300 to 600 MB; 0.45 GiB is the middle.
CUDA_BYTES = 461 * MIB
PROCESS_TERMS = ("Python and libraries", "CUDA context and allocator")
"""Names of what a process takes on ``cpu`` and on ``cuda`` whatever the model is."""
TRANSFER_RECORDS = 2

DENSE_BLOCK_BYTES = 8 * MIB
"""Of a dense matrix, what is converted at a time for a product of many rows."""

MIN_CHUNK = 32


@dataclass(frozen=True, slots=True)
class Needs:
    """What one conversation of a model needs on a device, in numbers; the model itself is not looked at again.

    Attributes:
        context: tokens of the conversation.
        moe_layers: layers with routed experts.
        runtime, dense, constants, cache: the terms that are the same for all records and chunks.
        chunk_bytes: workspace of one token of a chunk.
        base_bytes: workspace beside that.
        windows: of each layer with a window, and of the largest copy of one, the window and the bytes of a token.
    """

    context: int
    moe_layers: int
    runtime: Term
    dense: Term
    cache: Term
    chunk_bytes: int
    base_bytes: int
    constants: tuple[Term, ...] = ()
    windows: tuple[tuple[int, int], ...] = ()

    def workspace(self, chunk: int) -> int:
        """The most that one forward of ``chunk`` tokens holds at once beyond weights and cache: the table above."""
        return chunk * self.chunk_bytes + self.base_bytes + self._beyond_windows(chunk)

    def _beyond_windows(self, chunk: int) -> int:
        """What layers with a window hold of a chunk that is longer than their term of the cache counts."""

        def held(window: int, tokens: int) -> int:
            return min(self.context, window + max(tokens, WINDOW_AHEAD))

        return sum(each * (held(one, chunk) - held(one, 0)) for one, each in self.windows)

    @property
    def smallest(self) -> int:
        """Workspace of the smallest chunk."""
        return self.workspace(min(MIN_CHUNK, self.context))

    @property
    def largest(self) -> int:
        """Workspace of the largest chunk where every prototype is resident."""
        return self.workspace(min(USUAL_CHUNK, self.context))

    @property
    def longest(self) -> int:
        """Workspace of the largest chunk where some are not."""
        return self.workspace(min(MAX_CHUNK, self.context))

    def largest_chunk(self, workspace: int, most: int = USUAL_CHUNK) -> int:
        """The most tokens, up to ``most`` in steps of the smallest chunk, whose workspace is inside ``workspace``
        bytes.
        """
        for chunk in range(most, 0, -MIN_CHUNK):
            if chunk <= self.context and self.workspace(chunk) <= workspace:
                return chunk
        return min(MIN_CHUNK, self.context)

    def fixed(self, record_bytes: int) -> int:
        """Bytes of all terms but the workspace."""
        terms = (self.runtime, self.dense, *self.constants, self.cache, _transfer(record_bytes))
        return sum(term.nbytes for term in terms)

    def terms(self, record_bytes: int, workspace: int, chunk: int) -> tuple[Term, ...]:
        """All terms in the order in which they are shown; ``workspace`` bytes are set aside for chunks of ``chunk``."""
        work = Term("Workspace", workspace, f"{chunk} tokens at a time")
        held = (self.runtime, self.dense, *self.constants, self.cache)
        return (*held, work, _transfer(record_bytes))


def needs_of(
    anatomy: ModelAnatomy, device: DeviceKind, context: int, *, constants: int = 0
) -> Needs:
    """The needs of a model for a conversation of ``context`` tokens; ``constants``: bytes of those of router slots."""
    if device == "cpu":
        runtime = Term(PROCESS_TERMS[0], PYTHON_BYTES, "the process itself, with torch")
    else:
        runtime = Term(PROCESS_TERMS[1], CUDA_BYTES, "driver, cuBLAS, kernels")
    size = 4 if anatomy.dtype in ("float32", "float64") else 2
    hidden = anatomy.hidden_size
    experts = [layer.experts for layer in anatomy.moe_layers if layer.experts is not None]
    routed = max(one.top_k * (_inner_widths(one, hidden) + hidden) for one in experts)
    router = max(one.count for one in experts) * 3 * 4
    scores = 3 * anatomy.score_heads * context * size
    base = (
        anatomy.score_rows * scores
        + _attention_bytes(anatomy, context, size)
        + anatomy.vocab_size * (4 + size)
    )
    if device == "cpu":
        base += 4 * max(one.expert_numel for one in experts)
    if size == 2 or anatomy.dense_precision != "source":
        base += DENSE_BLOCK_BYTES
    return Needs(
        context=context,
        moe_layers=len(experts),
        runtime=runtime,
        dense=Term("Dense weights", anatomy.dense_bytes, _dense_note(anatomy)),
        cache=Term(
            f"KV cache ({context:,} tokens)", anatomy.kv_bytes(context), _cache_note(anatomy)
        ),
        chunk_bytes=10 * hidden * size
        + routed * size
        + router
        + 4 * context
        + (0 if anatomy.score_rows else scores),
        base_bytes=base,
        constants=(Term("Slot constants", constants, "what slots add"),) if constants else (),
        windows=_windows(anatomy, size),
    )


def _transfer(record_bytes: int) -> Term:
    note = f"{TRANSFER_RECORDS} records on their way"
    return Term("Transfer buffers", TRANSFER_RECORDS * record_bytes, note)


def _dense_note(anatomy: ModelAnatomy) -> str:
    note = "everything outside the routed experts"
    if anatomy.dense_precision == "source":
        return note
    return f"{note}, matrices in {anatomy.dense_precision}"


def _cache_note(anatomy: ModelAnatomy) -> str:
    note = "one conversation"
    return note if anatomy.kv_precision == "source" else f"{note}, in 8 bits"


def _attention_bytes(anatomy: ModelAnatomy, context: int, size: int) -> int:
    """The largest copy that one layer makes of its keys and values."""
    return max(
        (
            layer.expanded(context) + layer.held(context) * _repeated(anatomy, layer, size)
            for layer in anatomy.kv
            if layer.per_token
        ),
        default=0,
    )


def _repeated(anatomy: ModelAnatomy, layer: KVLayer, size: int) -> int:
    """Bytes of a cached token whose heads are repeated."""
    wide = anatomy.hidden_size * size
    return 4 * wide if layer.per_token < 2 * wide else 0


def _windows(anatomy: ModelAnatomy, size: int) -> tuple[tuple[int, int], ...]:
    """See ``Needs.windows``."""
    found, copies = [], []
    for layer in anatomy.kv:
        if layer.window is not None and layer.per_token:
            found.append((layer.window, layer.each))
            copies.append((layer.window, layer.per_token + _repeated(anatomy, layer, size)))
    return (*found, *sorted(copies)[-1:])


def _inner_widths(experts: ExpertsAnatomy, hidden: int) -> int:
    """Widths of an expert's inner activations for one token: 2I of gate and up, I of their
    product.
    """
    widths = 0
    for part in experts.parts:
        if len(part.shape) == 2:
            first, second = part.shape
            widths += first if second == hidden else second if first == hidden else max(part.shape)
    return widths or math.isqrt(experts.expert_numel)
