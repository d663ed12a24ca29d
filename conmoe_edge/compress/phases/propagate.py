"""The stream of the package so far, beside that of the original.

Prototypes are rounded for the tokens of the package's stream (``enter``). Methods with ``Needs.target`` take each
layer's tokens from there and aim at the original's residual stream behind the layer (``aim``). Once the layer is
written, the package's stream goes through it (``propagate``).

Peak memory: the hidden states of the calibration set twice more, the layer's tokens, and three times those in fp32.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import torch

from conmoe_edge.checkpoint.package.record_headers import record_name
from conmoe_edge.checkpoint.package.slot_constants import read_rows
from conmoe_edge.checkpoint.tensors.tensor_index import index_files
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.compress.phases.decide import Entered, prototypes_file
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.stream.expert_hooks import (
    MappedTap,
    RoutedTap,
    SilentTap,
    attach,
    expert_sum,
)
from conmoe_edge.compress.stream.layer_stream import Stream, run_layer
from conmoe_edge.compress.stream.predictor_fit import held_sequences
from conmoe_edge.compress.stream.streamed_model import mapped_tap
from conmoe_edge.model.rerouting import rerouted
from conmoe_edge.model.router import logits_to
from conmoe_edge.model.streaming import StreamedModel

_ADDS = 0.3
"""Most that a layer's output may differ from the sum of its parts, of what its experts bring."""


def enter(
    run: Run,
    model: StreamedModel,
    index: int,
    streams: Mapping[str, Stream],
    is_open: Sequence[bool] | None = None,
) -> Entered:
    """Take the package's stream up to the experts of a layer; ``is_open`` as of ``Entering``."""
    module = model.experts[index][1]
    stream = streams["package"]
    with run.clock.part("attention"), ExitStack() as stack:
        if is_open is not None:
            stack.enter_context(rerouted(model.routers()[index], is_open))
        entered = stream.hidden.clone()
        own = RoutedTap()
        attach(module, own)
        one = streams["probe"]  # the first sequence alone
        one.hidden = entered[:1].clone()
        run_layer(model, index, one, own)
        silent = SilentTap()
        attach(module, silent)
        if run.needs.target and run.needs.logits:
            stack.enter_context(logits_to(model.routers()[index], silent.take_logits))
        run_layer(model, index, stream, silent)
        tokens = silent.tokens.result()
        plain = expert_sum(module, own, tokens.rows(torch.arange(one.tokens)), model.device)
        attach(module, own)  # the other one holds on to nothing, but computes nothing either
        if _adds_up(one, stream, plain):
            return Entered(replace(tokens, weights=_weights(streams["train"])), stream.hidden)
        stream.hidden = entered
        return Entered(tokens, None)


def aim(run: Run, model: StreamedModel, index: int, streams: Mapping[str, Stream]) -> Entered:
    """``enter``, with what the experts of each token should give.

    Where a layer adds its experts' output to what it gives without them, that is the way back to the original's
    stream. Elsewhere (a norm, or a way out of a latent space, comes after the experts) it is what the original experts
    give. The target is the streams themselves, where it can be: it holds until they go on.
    """
    found, stream = enter(run, model, index, streams), streams["package"]
    with run.clock.part("attention"):
        start = None
        if found.before is not None:
            target = stream.real_rows(streams["train"].hidden)
            start = stream.real_rows(found.before)
        else:
            target = expert_sum(model.experts[index][1], RoutedTap(), found.tokens, model.device)
    tokens = replace(found.tokens, target=target, start=start, **_marks(run, stream))
    return Entered(tokens, found.before)


def _adds_up(one: Stream, without: Stream, plain: torch.Tensor) -> bool:
    """Whether ``plain``, what the experts give, is what the layer adds to the stream: ``one`` has its first sequence
    with the experts, ``without`` all of them without.
    """
    given = (one.hidden.float() - without.hidden[:1].float()).double()
    if plain.shape[-1] != given.shape[-1]:
        return False
    off = given - one.padded(plain.float()).double()
    # Rounding of the sum to 16 bits is a few per cent of it; a norm in between changes all.
    return float(off.norm()) <= _ADDS * float(given.norm())


def _weights(stream: Stream) -> torch.Tensor:
    """fp32 [tokens], of mean square 1: what follows reads the stream through a norm, so an error
    counts by its share of the token's length there.
    """
    lengths = stream.real_rows(stream.hidden.float()).norm(dim=1)
    inverse = 1.0 / lengths.clamp(min=1e-6 * float(lengths.max()) + 1e-30)
    return inverse / inverse.square().mean().sqrt()


def _marks(run: Run, stream: Stream) -> dict[str, torch.Tensor]:
    """Of every token: whether its sequence is held out from fits, and the number of its domain."""
    train = run.job.train
    count, length = train.ids.shape
    names = sorted(set(train.domains))
    domain = torch.tensor([names.index(one) for one in train.domains])
    held = torch.tensor(held_sequences([length] * count))
    spread = domain.repeat_interleave(length)
    return {
        "held": stream.real_rows(held.view(count, length, 1)).squeeze(1),
        "domains": stream.real_rows(spread.view(count, length, 1)).squeeze(1),
    }


def propagate(
    run: Run,
    model: StreamedModel,
    index: int,
    stream: Stream,
    entered: Entered | None,
    left: torch.Tensor | None,
) -> None:
    """Take the package's stream through the layer as it was just written.

    ``entered`` is what ``enter`` or ``aim`` gave for this layer, ``left`` what ``decide`` gave.
    """
    start = time.perf_counter()
    before = None if entered is None else entered.before
    if entered is not None and before is not None and left is not None:
        tokens = entered.tokens
        assert tokens.weights is not None
        stream.hidden = before
        stream.add_rows(tokens.wanted().sub_(left / tokens.weights.unsqueeze(1)))
    elif index in model.experts:
        is_open, module = run.journal.open_slots(index), model.experts[index][1]
        with ShardReader(index_files(run.package, [prototypes_file(index)])) as reader:
            tap = _written_tap(run, index, reader, is_open)
            if entered is not None and before is not None:
                stream.hidden = before
                stream.add_rows(expert_sum(module, tap, entered.tokens, model.device))
            else:
                attach(module, tap)
                rerouting = nullcontext()
                if is_open is not None:
                    rerouting = rerouted(model.routers()[index], is_open)
                with rerouting:
                    run_layer(model, index, stream, tap)
                attach(module, RoutedTap())  # the tap holds on to the prototypes
    else:
        run_layer(model, index, stream, None)
    run.clock.add("experts", time.perf_counter() - start)


def _written_tap(
    run: Run, layer: int, reader: ShardReader, is_open: Sequence[bool] | None
) -> MappedTap:
    """The layer as it is in the package."""
    records = {
        number: (record_name(expert), run.sizes.layout(layer, record.kind, record.width))
        for number, (expert, record) in enumerate(run.journal.stored().items())
        if expert.layer == layer
    }
    constants = run.work.constants(layer)
    rows = read_rows(constants, layer) if constants.is_file() else None
    slot_map = run.journal.slot_maps([layer])[layer]
    return mapped_tap(slot_map, records, reader, rows, run.job.device, is_open)
