"""One token each of several answers through a model, in steps that they share.

Alone a token's time is the reading of weights. Here the tokens of several answers go through each layer together: what
two of them ask for is read once. Attention is over each answer's own cache, and every sum runs in the order that it has
alone (``csrc/decoder.h``), so that no bit of an answer depends on its company.

Whatever stands around a model's layers is the model's own code. ``Together.scores`` calls the model for each answer,
and its layers only note what they are called with; then they compute for all, and the head too. Then the model is
called once more, and its layers hand out what they have, so that it makes its scores of it, whatever it does to it.
Once it has been seen that it does nothing to what its head gives, that call is left out.

A token goes ``Apart``, which is the way that it goes alone, where a layer is not one call of the operator; before the
layers have computed a token beside transformers; and with hooks on a layer.

Memory: the activations of a token for each answer, and its scores.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conmoe_edge.model.all_finite import all_finite
from conmoe_edge.offload.compute.fused_linear import FusedLinear
from conmoe_edge.offload.fastpath.decoder_layer import Apart, Entry, FusedLayer, Gathered, Meeting
from conmoe_edge.offload.fastpath.report import Served
from conmoe_edge.offload.fastpath.rms_norm import FusedNorm
from conmoe_edge.offload.kernels.cpu.bindings import Operator

_LAST_NORMS = ("norm", "final_layernorm", "embedding_norm")
"""What the norm behind the last layer is called."""


class FusedHead:
    """Stands in front of the ``forward`` of a model's head, for inference only: it hands out the scores of a row that
    were computed with those of others.
    """

    def __init__(self, module: FusedLinear, norm: FusedNorm) -> None:
        """The head, and the norm whose output it is probably called with."""
        self._own = weakref.WeakMethod(module.forward)
        self._module, self._norm = weakref.ref(module), weakref.ref(norm)
        self._known: tuple[Tensor, Tensor] | None = None

    def compute(self, engine: Operator, x: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """For what comes out of the last layer, bf16 [T, H]: what the head will be called with, and what it gives then.
        ``None`` where that is not known.
        """
        module, norm = self._module(), self._norm()
        if module is None or norm is None or norm._forward_hooks or module.bias is not None:
            return None
        now, prepared = norm.current(), module.prepared_for(torch.bfloat16)
        if now is None or prepared is None:
            return None
        rows = engine.rms_norm(now, x)
        scores = engine.few_rows([prepared], rows.unsqueeze(0))[0]
        return list(zip(rows.split(1), scores.split(1), strict=True))

    def know(self, known: tuple[Tensor, Tensor] | None) -> None:
        """A row that it may be called with next, and what it gives then."""
        self._known = known

    def __call__(self, input: Tensor) -> Tensor:
        """As of the head."""
        if self._known is not None and input.numel() == self._known[0].numel():
            row, scores = self._known
            if input.dtype == row.dtype and torch.equal(input.view(1, -1), row):
                return scores.view(*input.shape[:-1], -1)
        own = self._own()
        assert own is not None, "the module is being called, so it is there"
        return own(input)


class Together:
    """Steps of several answers through one loaded model. Not for several threads at once."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[FusedLayer],
        meeting: Meeting,
        served: Served,
        engine: Operator,
    ) -> None:
        """``layers`` are all that the model has, in their order, and share the ``meeting``."""
        self._model = weakref.ref(model)
        self._layers, self._meeting, self._served = layers, meeting, served
        self._engine, self._head = engine, _fused_head(model)
        self._bare: list[int] | None = (
            None  # the model's hooks when its scores were those of its head
        )
        meeting.last = len(layers)

    def scores(self, calls: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """What the model gives as scores for each of ``calls``, which are the arguments of forwards with one token,
        each with a cache of its own: [1, V], the same bits as one by one. Where it raises, no cache has grown.

        Raises:
            Apart: one of them has to go by itself.
            Exception: what a forward raises.
        """
        model = self._model()
        assert model is not None, "its owner asks"
        try:
            entries = [self._gather(model, call) for call in calls]
            x = torch.cat([one[0].x.view(1, -1) for one in entries])
            for layer, some in zip(self._layers, zip(*entries, strict=True), strict=True):
                if any(one.layer is not layer for one in some):
                    raise Apart
                x = layer.together(some, x)
            found = self._leave(model, calls, x)
        finally:
            self._meeting.end()
        for mine in entries:
            for one in mine:
                one.ready.place.has_one_more()
        self._served.tokens += len(calls)
        self._served.together += len(calls) * len(self._layers)
        return found

    def _gather(self, model: nn.Module, call: Mapping[str, Any]) -> list[Entry]:
        """What the layers are called with."""
        entries: list[Entry] = []
        self._meeting.entries = entries
        try:
            model(**call)
        except Gathered:
            return entries
        finally:
            self._meeting.entries = None
        raise Apart  # not all layers were called

    def _leave(
        self, model: nn.Module, calls: Sequence[Mapping[str, Any]], x: Tensor
    ) -> list[Tensor]:
        """The scores of ``x`` [T, H], which comes out of the last layer."""
        head = self._head
        known = None if head is None else head.compute(self._engine, x)
        hooks = list(model._forward_hooks)
        if known is not None and self._bare == hooks:
            rows = [scores for _, scores in known]
            if not all(all_finite(row) for row in rows):
                raise Apart  # by itself a forward says what is damaged
            return rows
        self._meeting.over = True
        outputs, bare = [], known is not None
        try:
            for number, call in enumerate(calls):
                self._meeting.result = x[number].view(1, 1, -1)
                row = None if known is None else known[number]
                before = None if row is None else row[1].clone()
                if head is not None:
                    head.know(row)
                out = model(**call).logits[:, -1]
                outputs.append(out)
                if row is not None and before is not None:
                    same = out.data_ptr() == row[1].data_ptr() and torch.equal(out, before)
                    bare = bare and same
        finally:
            if head is not None:
                head.know(None)
        self._bare = hooks if bare else None
        return outputs


def _fused_head(model: Any) -> FusedHead | None:
    """The head of ``model`` for rows of several answers; ``None`` where each is computed by itself."""
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    norms = [getattr(decoder, name, None) for name in _LAST_NORMS]
    norm = next((one for one in norms if isinstance(one, FusedNorm)), None)
    if not isinstance(head, FusedLinear) or norm is None or "forward" in vars(head):
        return None
    made = FusedHead(head, norm)
    head.forward = made
    return made
