"""What a model is, in numbers: the dataclasses that the plan and the streaming read. No torch here.

``probe.py`` fills them from the meta model, that is, from ``config.json`` alone; no weight is read.
All byte counts are in the checkpoint's own dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from conmoe_edge.checkpoint.format.forms import DOWN, Grid
from conmoe_edge.checkpoint.format.layout import neurons
from conmoe_edge.checkpoint.format.manifest import USUAL_CHUNK


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """One fused parameter of an experts module, seen for a single expert.

    ``name`` is the attribute of the module (``gate_up_proj``, ``down_proj``, ``gate_up_proj_bias``, ...),
    ``shape`` the shape without the leading expert axis, ``dtype`` the checkpoint's (``bfloat16``, ``float32``, ...).
    ``form``: how the checkpoint stores these numbers (``plain``, ``mxfp4``, ...); ``dtype`` is what it expands to;
    ``nbytes`` is what they take in the checkpoint, scales included. ``grid``: where they lie, if they have 4 bits there
    that a record can hold as they are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    form: str = "plain"
    grid: Grid | None = None


@dataclass(frozen=True, slots=True)
class ExpertsAnatomy:
    """The routed experts of one decoder layer.

    ``module`` is the path of the module that holds the fused weights, ``parts`` are in record order; ``transposed``
    where its projections are [in, out] instead of [out, in].
    """

    module: str
    count: int
    top_k: int
    parts: tuple[ExpertPart, ...]
    transposed: bool = False

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the checkpoint, unpadded."""
        return sum(part.nbytes for part in self.parts)

    @property
    def width(self) -> int:
        """Neurons of one expert: the inputs of its down projection."""
        shape = next(part.shape for part in self.parts if part.name == DOWN)
        return neurons(shape, self.transposed)

    @property
    def outputs(self) -> int:
        """Numbers that an expert takes and gives for a token: the model's hidden size, or that of a latent space."""
        shape = next(part.shape for part in self.parts if part.name == DOWN)
        return shape[-1 if self.transposed else -2]

    def narrowed(self, width: int) -> ExpertsAnatomy:
        """The same experts with ``width`` neurons each."""
        return replace(self, parts=tuple(self._narrowed(part, width) for part in self.parts))

    def _narrowed(self, part: ExpertPart, width: int) -> ExpertPart:
        shape = narrowed_shape(part.name, part.shape, self.transposed, self.width, width)
        nbytes = part.nbytes * math.prod(shape) // math.prod(part.shape)
        return replace(part, shape=shape, nbytes=nbytes)

    @property
    def expert_numel(self) -> int:
        """Parameters of one expert."""
        total = 0
        for part in self.parts:
            numel = 1
            for size in part.shape:
                numel *= size
            total += numel
        return total


def narrowed_shape(
    name: str, shape: tuple[int, ...], transposed: bool, width: int, narrow: int
) -> tuple[int, ...]:
    """The shape of a part of an expert of ``width`` neurons, once it has ``narrow`` of them."""
    if name == "down_proj":
        axis = 0 if transposed else 1
    elif name == "down_proj_bias":
        return shape
    else:
        axis = len(shape) - 1 if transposed else 0
    sizes = list(shape)
    sizes[axis] = sizes[axis] // width * narrow
    return tuple(sizes)


@dataclass(frozen=True, slots=True)
class LayerAnatomy:
    """One decoder layer: its index, the bytes outside the routed experts, the experts if it is a MoE layer."""

    index: int
    dense_bytes: int
    experts: ExpertsAnatomy | None


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A matrix outside the routed experts that may be stored in fewer bits.

    ``layer`` is its decoder layer, ``None`` outside of them; ``rows`` are outputs; ``nbytes`` as the checkpoint has it;
    the others as in ``model/linears.py``.
    """

    layer: int | None
    rows: int
    columns: int
    nbytes: int
    in_rows: bool = False
    looked_up: bool = False
    at_an_end: bool = False


WINDOW_AHEAD = USUAL_CHUNK
"""Tokens that a layer with a window may hold beside the window: a prompt's last chunk until the next token comes, then
room for the tokens that follow (``offload/fastpath/window_cache.py``). What a longer chunk has beyond them is counted
with its other workspace (``plan/needs.py``).
"""


@dataclass(frozen=True, slots=True)
class KVLayer:
    """Cache of one decoder layer for one sequence.

    Attributes:
        per_token: bytes of a token in the model's own format; 0 in a linear-attention layer.
        constant: bytes whatever the number of tokens.
        window: ``None`` for full attention.
        packed: bytes of a token in 8 bits (``model/kv_rows.py``); ``None`` where the layer has no such form.
        in_int8: whether it is kept in those (``plan/kv_precision.py`` makes the anatomy).
    """

    per_token: int
    constant: int = 0
    window: int | None = None
    packed: int | None = None
    in_int8: bool = False

    def held(self, tokens: int) -> int:
        """Tokens that it has memory for at ``tokens`` tokens of context."""
        return tokens if self.window is None else min(tokens, self.window + WINDOW_AHEAD)

    @property
    def each(self) -> int:
        """Bytes of a token as it is kept."""
        return self.packed if self.in_int8 and self.packed is not None else self.per_token

    def nbytes(self, tokens: int) -> int:
        """Bytes at ``tokens`` tokens of context."""
        return self.constant + self.each * self.held(tokens)

    def expanded(self, tokens: int) -> int:
        """Bytes of all that in the model's own format, as attention of many tokens is given it."""
        return self.constant + self.per_token * self.held(tokens)


@dataclass(frozen=True, slots=True)
class ModelAnatomy:
    """The whole model.

    Attributes:
        model_type: transformers' ``model_type``.
        architecture: class name of the causal LM.
        dtype: the checkpoint's main dtype.
        hidden_size, vocab_size: as in the config.
        max_context: longest context that the config allows, in tokens.
        layers: every decoder layer in order, dense ones included.
        outside_bytes: embeddings, final norm, head and whatever else is not in a decoder layer.
        kv: cache layers, one a decoder layer, from transformers' own cache classes.
        dense_matrices: what ``--dense-precision`` may store in fewer bits; part of the dense bytes.
        dense_precision: how they are stored (``plan/dense_precision.py`` makes the anatomy for another one than
        ``source``).
        score_heads: heads whose scores are held, where transformers has no fused attention for the class; else 0.
        score_rows: of how many tokens of a forward, at once; 0 for all of them.
    """

    model_type: str
    architecture: str
    dtype: str
    hidden_size: int
    vocab_size: int
    max_context: int
    layers: tuple[LayerAnatomy, ...]
    outside_bytes: int
    kv: tuple[KVLayer, ...]
    dense_matrices: tuple[DenseMatrix, ...] = ()
    dense_precision: str = "source"
    source_form: str = "plain"
    kv_precision: str = "source"
    score_heads: int = 0
    score_rows: int = 0

    @property
    def moe_layers(self) -> tuple[LayerAnatomy, ...]:
        """The layers that have routed experts."""
        return tuple(layer for layer in self.layers if layer.experts is not None)

    @property
    def moe_experts(self) -> tuple[ExpertsAnatomy, ...]:
        """The routed experts of each of ``moe_layers``."""
        return tuple(layer.experts for layer in self.layers if layer.experts is not None)

    @property
    def dense_bytes(self) -> int:
        """Everything that is not a routed expert."""
        return self.outside_bytes + sum(layer.dense_bytes for layer in self.layers)

    @property
    def expert_count(self) -> int:
        """Routed experts of the whole model."""
        return sum(layer.experts.count for layer in self.layers if layer.experts)

    @property
    def experts_bytes(self) -> int:
        """Bytes of all routed experts in the checkpoint, unpadded."""
        return sum(
            layer.experts.count * layer.experts.expert_bytes
            for layer in self.layers
            if layer.experts
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole checkpoint, with what is not a routed expert as a package stores it."""
        return self.dense_bytes + self.experts_bytes

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the cache at ``tokens`` tokens, one sequence."""
        return sum(layer.nbytes(tokens) for layer in self.kv)
