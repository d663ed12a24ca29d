"""What an evaluation found, as values. Losses in nats a token; sizes in bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from conmoe_edge.compress.stats.match_counts import ExactMatch


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A model that was measured. The levers only for a package; ``kind`` is ``model`` or ``package``.

    ``experts_bytes``: of all routed experts, or of all prototypes. ``kv_precision``: how keys and values
    were kept while it was measured. ``origin``: whether it is the model
    that the other one, a package, was made from; ``None`` where that is not known.
    """

    name: str
    kind: str
    experts_bytes: int
    method: str | None = None
    rate: float | None = None
    scope: int | None = None
    precision: str | None = None
    dense_precision: str | None = None
    origin: bool | None = None
    kv_precision: str = "source"


@dataclass(frozen=True, slots=True)
class Quality:
    """Figures over some tokens. What compares is ``None`` where there was nothing to compare with.

    Attributes:
        tokens: predicted.
        loss: mean negative log-likelihood.
        perplexity: exp(loss).
        reference_loss, reference_perplexity: the same of the reference.
        perplexity_ratio: perplexity / reference_perplexity.
        kl: mean of KL(reference || model).
        top1_agreement: share of the positions where both find the same token most likely.
        overlap: mean of the sum over the vocabulary of min(p, q).
    """

    tokens: int
    loss: float
    perplexity: float
    reference_loss: float | None = None
    reference_perplexity: float | None = None
    perplexity_ratio: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    overlap: float | None = None

    @classmethod
    def of_receipt(cls, row: Mapping[str, Any]) -> Quality:
        """From a row of a receipt (``receipt.py``)."""
        before, after = row["loss_original"], row["loss_consolidated"]
        return cls(
            tokens=row["tokens"],
            loss=after,
            perplexity=perplexity(after),
            reference_loss=before,
            reference_perplexity=perplexity(before),
            perplexity_ratio=row["perplexity_ratio"],
            kl=row["kl"],
            top1_agreement=row["top1_agreement"],
            overlap=row["overlap"],
        )

    @classmethod
    def of_loss(cls, tokens: int, loss: float) -> Quality:
        """Of a model alone."""
        return cls(tokens, loss, perplexity(loss))


@dataclass(frozen=True, slots=True)
class Continuations:
    """Greedy continuations of prompts from the text.

    Attributes:
        prompts, prompt_tokens, tokens: how many, how long, and how long the continuations at most.
        repetition: seq-rep-4 (``continuation.py``); ``None`` where all ended within three tokens.
        reference_repetition: of the reference.
        common_tokens: mean number of tokens before model and reference part.
    """

    prompts: int
    prompt_tokens: int
    tokens: int
    repetition: float | None
    reference_repetition: float | None = None
    common_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What an evaluation will take, told before it begins.

    Attributes:
        tokens: of text that go through every model.
        models: how many models that are.
        prompts, steps: of the continuations; each step needs every layer.
        held: for every model whether its layers stay in memory for the continuations.
        memory_bytes: for every model what they take, held.
    """

    tokens: int
    models: int
    prompts: int
    steps: int
    held: tuple[bool, ...]
    memory_bytes: tuple[int, ...]

    @property
    def repeated_bytes(self) -> int:
        """Bytes that are loaded again and again for continuations of models that do not fit in memory."""
        sizes = zip(self.held, self.memory_bytes, strict=True)
        return self.steps * sum(size for held, size in sizes if not held)


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """A model, what it was compared with, and the figures; ``exact_match`` by kind (``match_counts.py``).

    ``alone``: why there is no reference, where there is none. ``settings``: text, its SHA-256, tokens,
    sequence length, seed, device and dtype, which together make the figures reproducible.
    """

    model: Evaluated
    reference: Evaluated | None
    quality: Quality
    per_domain: dict[str, Quality]
    exact_match: dict[str, ExactMatch]
    continuations: Continuations | None
    settings: dict[str, Any]
    alone: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def perplexity(loss: float) -> float:
    """exp, short of infinity."""
    return math.exp(min(50.0, loss))
