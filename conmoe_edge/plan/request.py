"""What is asked of a plan, as one object.

A ``PlanRequest`` is made from the flags of a command or the keywords of a call, decides the plan together with the
model and the machine, goes into the ``Job`` of a consolidation, and is part of what an unfinished run is recognised
by. No torch, no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict, get_args

from conmoe_edge.errors import UsageError
from conmoe_edge.memory.budget import DeviceWord
from conmoe_edge.plan.dense_precision import DENSE_PRECISIONS
from conmoe_edge.plan.gguf_types import FILE_TYPES
from conmoe_edge.plan.kv_precision import check_kv_precision
from conmoe_edge.plan.levers import FREE, PRECISIONS
from conmoe_edge.plan.plan import Preference

Device = DeviceWord
Widths = Literal["free", "equal"]
Rate = float | Literal["auto"]
Scope = int | Literal["auto"]

DEVICES: tuple[Device, ...] = get_args(Device)
PREFERENCES: tuple[Preference, ...] = get_args(Preference)
WIDTHS: tuple[Widths, ...] = get_args(Widths)

DEFAULT_CONTEXT = 4096
SEQUENCE_LENGTH = 512
"""Tokens of one calibration sequence."""
CALIBRATION_TOKENS = 64 * SEQUENCE_LENGTH
HELD_OUT_SHARE = 4
"""There is one held-out token for so many calibration tokens."""

_LEAST_RESIDENT: dict[Preference, float] = {"quality": 0.8, "speed": 1.0}
_MOST_BITS = 32
_AUTO_SCOPE = 1
"""What a plan counts with. A fit may measure that two layers do better (``scope_choice.py``)."""


class Levers(TypedDict, total=False):
    """The fields of ``PlanRequest`` as keywords of a call."""

    budget: str
    device: Device
    context: int | None
    rate: Rate
    scope: Scope
    precision: str
    bits: float | None
    dense_precision: str
    kv_precision: str
    prefer: Preference
    min_resident: float | None
    min_speed: float | None
    method: str | None
    widths: Widths
    calibration_tokens: int | None
    engine: str | None
    quantise: str | None


def check_alone(asked: str, others: Mapping[str, object], why: str, flag: str) -> None:
    """Refuse what does not go with ``asked``.

    Args:
        asked: a flag with its value.
        others: flag -> what was said of it, ``None`` for nothing.
        why: for the error.
        flag: of ``asked``, to leave out.

    Raises:
        UsageError: names the first of ``others`` that was said.
    """
    for other, value in others.items():
        if value is not None:
            raise UsageError(
                f"{asked} does not go with {other} {value}.",
                why,
                f"leave out {other}, or leave out {flag}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Everything that a user may say about a plan; each field has the flag of the same name (``budget``: ``--gpu``).

    Attributes:
        budget: a size (``24GB``, ``7.5GiB``), a profile (``rtx-4090``) or ``auto``, this machine.
        device: where the package will run; ``auto`` takes the GPU if this machine has one.
        context: tokens that the key-value cache must hold; by default 4096, or the model's longest.
        rate: share of the routed experts that is removed, from 0 and below 1.
        scope: neighbouring MoE layers that share prototypes; ``auto`` is measured where that can be compared
            (``scope_choice.py``), else one.
        precision: number format of the prototypes, one of ``levers.PRECISIONS``.
        bits: average bits a weight of the original's routed experts; each prototype gets the neurons and the bits that
            it is worth in these bytes (the precision ``free``).
        dense_precision: ``int8``, ``q6`` and ``q4`` store the matrices outside the routed experts, embeddings and head
            among them, in 8, 6 or 4 bits; norms and routers keep their numbers. ``auto`` is the plan's to choose
            (``plan/unasked_formats.py``).
        kv_precision: ``int8`` keeps keys and values in 8 bits, ``source`` in the model's own format; ``auto`` is the
            plan's to choose as well.
        prefer: ``speed`` wants every prototype resident, ``quality`` most of them.
        min_resident: the least share of prototypes that is resident, instead of what ``prefer`` says.
        min_speed: tokens a second that the target is expected to reach; the mildest setting that does is taken.
        method: consolidation method; by default ``auto``, or ``conmoe`` where ``scope`` is more than one layer.
            Its name is checked where the methods are (``compress/methods/resolve_method.py``).
        widths: ``equal`` gives every prototype of a method that trims (``auto``) the same number of neurons.
        calibration_tokens: tokens of text to calibrate on; by default 64 sequences of 512.
        engine: what runs the package or the plain checkpoint of it, one of ``serving.ENGINES`` (``--for``).
        quantise: with ``gguf``, the type that the file will have, one of ``gguf_types.FILE_TYPES``: the budget is the
            file's then, and experts are narrowed by whole blocks of the type.

    Raises:
        UsageError: a field has a value that makes no sense for any model.
    """

    budget: str = "auto"
    device: Device = "auto"
    context: int | None = None
    rate: Rate = "auto"
    scope: Scope = "auto"
    precision: str = "auto"
    bits: float | None = None
    dense_precision: str = "auto"
    kv_precision: str = "auto"
    prefer: Preference = "quality"
    min_resident: float | None = None
    min_speed: float | None = None
    method: str | None = None
    widths: Widths = "free"
    calibration_tokens: int | None = None
    engine: str | None = None
    quantise: str | None = None

    def __post_init__(self) -> None:
        if self.quantise is not None and self.engine != "gguf":
            raise UsageError(
                f"--quantise {self.quantise} is about a GGUF file.",
                "no other package is quantised by llama.cpp",
                f"--for gguf --quantise {self.quantise}, or --precision for packages that run here",
            )
        if self.quantise is not None and self.quantise not in FILE_TYPES:
            raise UsageError(
                f"llama.cpp has no type {self.quantise!r}.",
                f"there are {', '.join(FILE_TYPES)}",
                "--quantise Q4_K_M",
            )
        if self.device not in DEVICES:
            raise UsageError(
                f"--device {self.device} is not known.",
                f"there are {', '.join(DEVICES)}",
                "--device auto",
            )
        if self.context is not None and self.context < 1:
            raise UsageError(
                f"--context {self.context} is no length.", "", f"--context {DEFAULT_CONTEXT}"
            )
        if self.rate != "auto" and not 0.0 <= self.rate < 1.0:
            raise UsageError(
                f"--rate {self.rate:g} is not a reduction rate.",
                "it is the share of the routed experts that is removed: at least 0, less than 1",
                f"--rate {self.rate / 100:g}"
                if 1.0 < self.rate < 100.0
                else "--rate 0.25, or --rate auto",
            )
        if self.scope != "auto" and self.scope < 1:
            raise UsageError(
                f"--scope {self.scope} is not a scope.",
                "it is a number of layers, from 1",
                "--scope auto",
            )
        if self.precision not in ("auto", *PRECISIONS):
            raise UsageError(
                f"{self.precision!r} is not a precision.",
                f"there are auto, {', '.join(PRECISIONS)}",
                "--precision auto",
            )
        if self.free:
            self._check_free()
        if self.dense_precision not in ("auto", *DENSE_PRECISIONS):
            raise UsageError(
                f"{self.dense_precision!r} is not a precision for the dense part.",
                f"there are auto, {', '.join(DENSE_PRECISIONS)}",
                "--dense-precision int8",
            )
        check_kv_precision(None if self.kv_precision == "auto" else self.kv_precision)
        if self.prefer not in PREFERENCES:
            raise UsageError(
                f"--prefer {self.prefer} is not known.", "", "--prefer quality, or --prefer speed"
            )
        if self.min_resident is not None and not 0.0 <= self.min_resident <= 1.0:
            raise UsageError(
                f"--min-resident {self.min_resident:g} is not a share.",
                "it lies between 0 and 1",
                "--min-resident 0.8",
            )
        if self.min_speed is not None:
            self._check_speed(self.min_speed)
        if self.widths not in WIDTHS:
            raise UsageError(
                f"--widths {self.widths} is not known.",
                "prototypes have free or equal widths",
                "--widths free",
            )
        if self.calibration_tokens is not None and self.calibration_tokens < 1:
            raise UsageError(
                f"--calibration-tokens {self.calibration_tokens} leaves no text to calibrate on.",
                "",
                f"--calibration-tokens {CALIBRATION_TOKENS}",
            )

    def _check_free(self) -> None:
        """What does not go with prototypes that have the bits that they are worth."""
        if self.bits is not None and not 0.0 < self.bits <= _MOST_BITS:
            raise UsageError(
                f"--bits {self.bits:g} is no number of bits a weight.",
                f"it lies above 0 and is at most {_MOST_BITS}",
                "--bits 3",
            )
        own = f"--precision {FREE}" if self.bits is None else f"--bits {self.bits:g}"
        others = {
            "--rate": self.rate if self.rate != "auto" else None,
            "--precision": self.precision if self.precision not in ("auto", FREE) else None,
            "--widths": "equal" if self.equal else None,
            "--for": self.engine,
        }
        why = "each prototype gets the neurons and bits that it is worth, in bytes that all share"
        check_alone(own, others, why, own)

    def _check_speed(self, speed: float) -> None:
        """What does not go with ``min_speed``."""
        if not 0.0 < speed < math.inf:
            raise UsageError(
                f"--min-speed {speed:g} is no speed.", "it is tokens a second", "--min-speed 10"
            )
        fixed = {"--bits": self.bits, "--rate": self.forced_rate, "--for": self.engine}
        why = "it is the plan that looks for the setting that is fast enough"
        check_alone(f"--min-speed {speed:g}", fixed, why, "--min-speed")

    @property
    def chooses_bytes(self) -> bool:
        """Whether nothing was asked of bits, rate and widths, so that a method that trims may choose all of them."""
        asked = (self.precision, self.rate, self.scope_layers, self.equal, self.engine)
        return asked == ("auto", "auto", 1, False, None)

    @property
    def free(self) -> bool:
        """Whether each prototype shall have the bits that it is worth."""
        return self.precision == FREE or self.bits is not None

    @property
    def forced_rate(self) -> float | None:
        """The rate that was asked for; ``None`` where the plan chooses."""
        return None if self.rate == "auto" else self.rate

    @property
    def scope_layers(self) -> int:
        """Neighbouring MoE layers that share prototypes."""
        return _AUTO_SCOPE if self.scope == "auto" else self.scope

    @property
    def least_resident(self) -> float:
        """The share of the prototypes that should be resident."""
        return _LEAST_RESIDENT[self.prefer] if self.min_resident is None else self.min_resident

    @property
    def equal(self) -> bool:
        """Whether all prototypes of a method that trims get the same number of neurons."""
        return self.widths == "equal"

    @property
    def tokens(self) -> int:
        """Tokens of text to calibrate on."""
        return self.calibration_tokens or CALIBRATION_TOKENS

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, the same for requests that mean the same number of calibration tokens."""
        return {**asdict(self), "calibration_tokens": self.tokens}


def check_positions(context: int, longest: int, model: str) -> None:
    """Refuse a context that ``model`` (its name, for the message) has no positions for.

    Raises:
        UsageError: names the longest one.
    """
    if context > longest:
        raise UsageError(
            f"--context {context} is longer than {model} can read.",
            f"its longest context is {longest} tokens",
            f"--context {longest}",
        )
