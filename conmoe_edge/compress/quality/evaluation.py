"""Quality of a model or package beside another one, on text, both streamed layer by layer.

The reference goes through all of its layers, then the model; then both sets of hidden states go
through norm and head. With the bundled text and no seed the figures are those of the receipt that
``fit`` writes: the same sequences, the same code.

Peak memory: hidden states of the text twice on the host; one decoder layer and one batch of
activations; then what is outside the layers of both models and the logits of one sequence twice.
Raises ``CalibrationError`` for the text, ``UsageError`` for models that cannot be compared, and the
errors of opening a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import UNCHANGED, Manifest
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.compress.quality.continuation import (
    common_start,
    continue_greedily,
    cut,
    prompts_of,
    repetition,
)
from conmoe_edge.compress.quality.exact_match import MatchTracker
from conmoe_edge.compress.quality.metrics import (
    Continuations,
    Cost,
    Evaluated,
    EvaluationReport,
    Quality,
)
from conmoe_edge.compress.quality.receipt import LossTracker, compare_heads
from conmoe_edge.compress.run.job import OnProgress, Progress
from conmoe_edge.compress.stats.match_counts import ExactMatch, matches_in
from conmoe_edge.compress.stream.calibration_text import CalibrationText, TokenSet, evaluation_set
from conmoe_edge.compress.stream.layer_stream import sequence_logits
from conmoe_edge.compress.stream.match_places import MatchPlaces
from conmoe_edge.compress.stream.streamed_model import (
    Subject,
    is_package,
    open_subject,
    prototype_bytes,
)
from conmoe_edge.compress.work.part_clock import Clock
from conmoe_edge.errors import UsageError
from conmoe_edge.model.opened import OpenedModel

_HOLD_SHARE = 0.5
"""Of the free memory that a model may take to be held for its continuations."""


_TOLD_EVERY = 16
"""Steps of a continuation by a model in memory between two reports of progress."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure. ``continuations`` prompts of ``prompt_tokens`` are continued by ``steps`` tokens. Keys and values
    of the model, not of the reference, are in ``kv_precision`` where it is given.
    """

    tokens: int
    sequence_length: int
    seed: int
    continuations: int
    prompt_tokens: int
    steps: int
    device: torch.device
    free_memory: int
    kv_precision: str | None = None


@dataclass(frozen=True, slots=True)
class Folder:
    """A model to measure: its name for people, its folder, its tokenizer; ``model`` where it is open already."""

    name: str
    path: Path
    tokenizer: Any
    model: OpenedModel | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """Over the whole text, by domain, and exact matches by kind."""

    quality: Quality
    per_domain: dict[str, Quality]
    exact_match: dict[str, ExactMatch]


def evaluate(
    model: Folder,
    reference: Folder | None,
    text: CalibrationText,
    settings: Settings,
    *,
    on_cost: Callable[[Cost], None] | None = None,
    progress: OnProgress = lambda step: None,
) -> tuple[Figures, Continuations | None, Cost, dict[str, float]]:
    """All figures: of the text, of the continuations; what it took, and seconds by part."""
    tokens = _tokens(model, reference, text, settings)
    clock = Clock()
    with torch.no_grad(), ExitStack() as stack:
        opened = [
            stack.enter_context(open_subject(folder.model or folder.path, settings.device, kv))
            for folder, kv in ((model, settings.kv_precision), (reference, None))
            if folder is not None
        ]
        prompts = None
        if settings.continuations:
            prompts = prompts_of(tokens, settings.continuations, settings.prompt_tokens)
        cost = _cost(opened, tokens, prompts, settings)
        if on_cost is not None:
            on_cost(cost)
        names = ("model", "reference")
        hidden = [
            _through(subject, tokens, clock, progress, name)
            for subject, name in zip(opened, names, strict=False)
        ]
        progress(Progress("compare", 0, 1, "logits"))
        with clock.part("compare"):
            figures = _figures(opened, hidden, tokens, MatchPlaces(tokens, model.tokenizer))
        found = None
        if prompts is not None:
            rows = [
                _continued(subject, prompts, settings, held, clock, progress, name)
                for subject, held, name in zip(opened, cost.held, names, strict=False)
            ]
            found = _continuations(prompts, rows, _ends(model.tokenizer), settings.steps)
    return figures, found, cost, clock.seconds


def _tokens(
    model: Folder, reference: Folder | None, text: CalibrationText, settings: Settings
) -> TokenSet:
    def of(tokenizer: Any) -> TokenSet:
        return evaluation_set(
            text,
            tokenizer,
            length=settings.sequence_length,
            tokens=settings.tokens,
            seed=settings.seed,
        )

    tokens = of(model.tokenizer)
    if reference is not None:
        other = of(reference.tokenizer)
        same = tokens.ids.shape == other.ids.shape and bool(
            (tokens.ids == other.ids)[tokens.mask].all()
        )
        if not same:
            raise UsageError(
                f"{model.name} and {reference.name} cannot be compared.",
                "their tokenizers cut the text differently, so that a loss a token means another thing",
                "--against a model with the same tokenizer, or --against none",
            )
    return tokens


def _through(
    subject: Subject, tokens: TokenSet, clock: Clock, progress: OnProgress, stage: str
) -> Tensor:
    """[N, T, H]: the hidden states behind the last layer."""
    with clock.part("read"):
        subject.model.load_outside()
    with clock.part(stage):
        stream = subject.open_stream(tokens)
    subject.model.drop_outside()
    for index in range(subject.layers):
        progress(Progress(stage, index, subject.layers, f"layer {index + 1}"))
        with subject.layer(index, clock), clock.part(stage):
            subject.advance(index, stream)
    return stream.hidden


def _figures(
    subjects: list[Subject], hidden: list[Tensor], tokens: TokenSet, places: MatchPlaces
) -> Figures:
    with _outside(subjects):
        if len(subjects) == 1:
            tracker, matches = LossTracker(tokens), MatchTracker(places)
            for row in range(len(tokens.domains)):
                logits = sequence_logits(subjects[0].model, tokens, hidden[0], row)
                tracker.add(row, logits)
                matches.add(row, logits)
            total, domains = tracker.result()
            return Figures(
                Quality.of_loss(*total),
                {name: Quality.of_loss(*row) for name, row in domains.items()},
                matches.result(alone=True),
            )
        receipt = compare_heads(
            subjects[1].model, hidden[1], subjects[0].model, hidden[0], tokens, places
        )
    return Figures(
        Quality.of_receipt(receipt),
        {name: Quality.of_receipt(row) for name, row in receipt["per_domain"].items()},
        matches_in(receipt),
    )


@contextmanager
def _outside(subjects: list[Subject]) -> Iterator[None]:
    for subject in subjects:
        subject.model.load_outside()
    yield
    for subject in subjects:
        subject.model.drop_outside()


def _cost(
    subjects: list[Subject], tokens: TokenSet, prompts: Tensor | None, settings: Settings
) -> Cost:
    sizes = tuple(subject.memory_bytes for subject in subjects)
    most = _HOLD_SHARE * settings.free_memory
    return Cost(
        tokens=tokens.tokens,
        models=len(subjects),
        prompts=0 if prompts is None else prompts.shape[0],
        steps=0 if prompts is None else settings.steps,
        held=tuple(size <= most for size in sizes),
        memory_bytes=sizes,
    )


def _continued(
    subject: Subject,
    prompts: Tensor,
    settings: Settings,
    held: bool,
    clock: Clock,
    progress: OnProgress,
    name: str,
) -> list[list[int]]:
    def tell(step: int) -> None:
        if held and step % _TOLD_EVERY:
            return
        progress(
            Progress("continue", step, settings.steps, f"{name}, token {step + 1}/{settings.steps}")
        )

    found = continue_greedily(subject, prompts, settings.steps, held=held, clock=clock, tell=tell)
    return found.tolist()


def _continuations(
    prompts: Tensor, rows: list[list[list[int]]], ends: Collection[int], steps: int
) -> Continuations:
    shares = [repetition(cut(one, ends)) for one in rows]
    both = len(rows) == 2
    return Continuations(
        prompts=prompts.shape[0],
        prompt_tokens=prompts.shape[1],
        tokens=steps,
        repetition=shares[0],
        reference_repetition=shares[1] if both else None,
        common_tokens=common_start(rows[0], rows[1]) if both else None,
    )


def _ends(tokenizer: Any) -> frozenset[int]:
    end = tokenizer.eos_token_id
    return frozenset() if end is None else frozenset([end])


def described(
    folder: Folder,
    experts_bytes: int,
    origin: bool | None = None,
    kv_precision: str | None = None,
) -> Evaluated:
    """What a folder holds. ``experts_bytes`` counts for a model; a package has its own count, and keys and values of
    its own where no ``kv_precision`` is asked for.
    """
    manifest = manifest_of(folder.path)
    kv = kv_precision or ("source" if manifest is None else manifest.kv_precision)
    if manifest is None or manifest.method == UNCHANGED:
        kind = "model" if manifest is None else "package"
        return Evaluated(folder.name, kind, experts_bytes, origin=origin, kv_precision=kv)
    return Evaluated(
        name=folder.name,
        kind="package",
        experts_bytes=prototype_bytes(manifest),
        method=manifest.method,
        rate=manifest.rate,
        scope=manifest.scope,
        precision=manifest.precision,
        dense_precision=manifest.dense_precision,
        origin=origin,
        kv_precision=kv,
    )


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest of a package, ``None`` for a plain model."""
    return load_manifest(folder) if is_package(folder) else None


__all__ = ["EvaluationReport", "Folder", "Settings", "described", "evaluate", "manifest_of"]
