"""Token sets through a streamed model, layer by layer, in batches of a fixed number of tokens.

The hidden states of all sequences wait on the host between layers; one batch at a time is on the device. The size of a
batch follows from the model alone, not from the memory there is, so that results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conmoe_edge.compat import cache_of, native_bf16
from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.compress.stream.expert_hooks import Tap
from conmoe_edge.errors import CheckpointError, UnsupportedModel
from conmoe_edge.model.all_finite import all_finite
from conmoe_edge.model.packed_layers import rounding_cache
from conmoe_edge.model.streaming import Batch, StreamedModel

_BATCH_VALUES = 1 << 24
_MOST_TOKENS = 1 << 14
_AGAIN = "download the model again; if it is the same afterwards, the model itself is broken"


def compute_dtype(device: torch.device, source: torch.dtype) -> torch.dtype:
    """The dtype of the activations while streaming.

    On a CPU without bf16 units, bf16 matrix products run at a quarter of the fp32 rate, so fp32 is
    used there (each expert is converted when its turn comes). A GPU uses the checkpoint's dtype.
    """
    if device.type != "cpu" or source == torch.float32:
        return source
    if source == torch.bfloat16 and native_bf16():
        return source
    return torch.float32


@dataclass(slots=True)
class Stream:
    """A token set in batches and its hidden states [N, T, H] on the host."""

    batches: list[Batch]
    keep: list[Tensor | None]
    hidden: Tensor

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self._real().sum())

    def real_rows(self, values: Tensor) -> Tensor:
        """[N, T, H] -> [real tokens, H], in the order in which the experts see them; no copy where all are real."""
        flat = values.reshape(-1, values.shape[-1])
        return flat if self._whole else flat[self._real()]

    def padded(self, rows: Tensor) -> Tensor:
        """The way back: [real tokens, H] -> [N, T, H], zeros at padding; no copy where there is none."""
        if self._whole:
            return rows.view(self.hidden.shape)
        whole = torch.zeros(self.hidden.shape, dtype=rows.dtype)
        whole.view(-1, rows.shape[-1])[self._real()] = rows
        return whole

    def add_rows(self, rows: Tensor) -> None:
        """hidden += [real tokens, H]."""
        self.hidden += self.padded(rows).to(self.hidden.dtype)

    @property
    def _whole(self) -> bool:
        """Whether there is no padding."""
        return all(keep is None for keep in self.keep)

    def _real(self) -> Tensor:
        """[N * T] bool."""
        length = self.hidden.shape[1]
        marks = [
            torch.ones((stop - start) * length, dtype=torch.bool) if keep is None else keep.cpu()
            for keep, (start, stop) in zip(self.keep, self.spans(), strict=True)
        ]
        return torch.cat(marks)

    def spans(self) -> list[tuple[int, int]]:
        """Rows of ``hidden`` that each batch covers."""
        spans = []
        start = 0
        for batch in self.batches:
            spans.append((start, start + batch.input_ids.shape[0]))
            start = spans[-1][1]
        return spans


def _rows(model: StreamedModel, length: int) -> int:
    """Sequences of a batch."""
    size = model.model.config.get_text_config().hidden_size
    return max(1, min(_MOST_TOKENS, _BATCH_VALUES // size) // length)


def open_stream(
    model: StreamedModel,
    tokens: TokenSet,
    hidden: Tensor | None = None,
    kv_precision: str = "source",
) -> Stream:
    """Embed a token set (or take the ``hidden`` states of an earlier run) and prepare every layer's arguments.

    With a ``kv_precision`` of ``int8`` every layer's attention sees the keys and values that a cache in 8 bits holds,
    as it does in a package that is run so; the model must have that form (``plan/kv_precision.py``).

    Raises:
        UnsupportedModel: the model does not hand its layers the cache that it is given.
    """
    count, length = tokens.ids.shape
    cache = rounding_cache(model.model.config) if kv_precision == "int8" else None
    size, rows = model.model.config.get_text_config().hidden_size, _rows(model, length)
    store = torch.empty(count, length, size, dtype=model.dtype) if hidden is None else hidden
    batches: list[Batch] = []
    keep: list[Tensor | None] = []
    for start in range(0, count, rows):
        ids = tokens.ids[start : start + rows]
        mask = tokens.mask[start : start + rows]
        whole = bool(mask.all())
        batch = Batch(ids, None if whole else mask.long(), cache=cache)
        first = model.prologue(batch)
        if cache is not None:
            require_cache(model, batch)
        if hidden is None:
            store[start : start + rows] = first.to(store.dtype).cpu()
        batches.append(batch)
        keep.append(None if whole else mask.reshape(-1).to(model.device))
    return Stream(batches, keep, store)


def require_cache(model: StreamedModel, batch: Batch) -> None:
    """Refuse a model that does not hand each of its layers the cache that it was given.

    Raises:
        UnsupportedModel: names the layer.
    """
    for index, (_, kwargs) in enumerate(batch.calls):
        if cache_of(kwargs) is not batch.cache:
            raise UnsupportedModel(
                f"{type(model.model).__name__} cannot be measured with keys and values in 8 bits.",
                f"decoder layer {index} is not handed the key-value cache that the model is given",
                "--kv-precision source",
            )


def run_layer(
    model: StreamedModel, index: int, stream: Stream, tap: Tap | None, name: str = ""
) -> None:
    """Take the stream through one loaded layer, in place.

    Raises:
        CheckpointError: the layer gives NaN or infinity, so some weight of it is broken.
    """
    for batch, keep, (start, stop) in zip(stream.batches, stream.keep, stream.spans(), strict=True):
        if tap is not None:
            tap.keep = keep
        out = model.run_layer(index, stream.hidden[start:stop].to(model.device), batch)
        stream.hidden[start:stop] = out.to(stream.hidden.dtype).cpu()
    if not all_finite(stream.hidden):
        if model.dtype == torch.float16:
            raise CheckpointError(
                f"Decoder layer {index}{f' of {name}' if name else ''} gives NaN or infinity in float16.",
                "a weight of the model is broken, or its numbers leave the range of float16, which ends at 65504",
                f"--device cpu, which computes in float32; if it is the same there, {_AGAIN}",
            )
        raise CheckpointError(
            f"Decoder layer {index}{f' of {name}' if name else ''} gives NaN or infinity.",
            "a weight of the model is broken, or its numbers leave the range of their type",
            _AGAIN,
        )


class Beside:
    """Streams of one token set in models that differ, through layers that they have in common: as many of them at once
    as a batch takes, because an expert is converted and read once for all tokens of a batch.
    """

    def __init__(self, model: StreamedModel, tokens: TokenSet, most: int) -> None:
        """For up to ``most`` streams at a time; what is outside the decoder layers must be loaded."""
        self._model, self._count = model, len(tokens.ids)
        together = max(1, min(most, _rows(model, tokens.ids.shape[1]) // self._count))
        nothing = torch.empty(0)
        self._streams = [
            open_stream(model, tokens.repeated(times), nothing) for times in range(1, together + 1)
        ]

    def run_layer(self, index: int, hidden: Sequence[Tensor], tap: Tap | None) -> None:
        """Every one of ``hidden`` [N, T, H] through a loaded layer, in place; raises as ``run_layer``."""
        together = len(self._streams)
        for start in range(0, len(hidden), together):
            some = hidden[start : start + together]
            stream = self._streams[len(some) - 1]
            stream.hidden = torch.cat(list(some))
            run_layer(self._model, index, stream, tap)
            for one, out in zip(some, stream.hidden.split(self._count), strict=True):
                one.copy_(out)
            stream.hidden = torch.empty(0)


def sequence_logits(model: StreamedModel, tokens: TokenSet, hidden: Tensor, row: int) -> Tensor:
    """[T, V] of one sequence; hidden: [N, T, H] of the whole set behind the last layer.

    Raises:
        CheckpointError: as ``require_numbers``.
    """
    mask = None if bool(tokens.mask[row].all()) else tokens.mask[row : row + 1].long()
    batch = Batch(tokens.ids[row : row + 1], mask)
    logits = model.epilogue(batch, hidden[row : row + 1].to(model.device))[0]
    require_numbers(logits)
    return logits


def require_numbers(logits: Tensor) -> None:
    """Refuse logits that are none: every figure that is computed from them would be NaN.

    Raises:
        CheckpointError: there is NaN or infinity among them.
    """
    if not all_finite(logits):
        raise CheckpointError(
            "The output layer gives NaN or infinity.",
            "all decoder layers before it gave numbers",
            _AGAIN,
        )
