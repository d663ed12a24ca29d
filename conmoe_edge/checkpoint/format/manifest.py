"""``conmoe.json``: what a package holds. Read from disk, so nothing in it is trusted.

A package folder holds (docs/architecture.md, "The package"):

- ``config.json``: the model's own config plus ``quantization_config = {"quant_method": "conmoe", "format_version": 1}``
- ``conmoe.json``: this manifest
- ``dense-*.safetensors`` + ``model.safetensors.index.json``: all tensors outside the routed experts, own names
- ``prototypes-*.safetensors``: one uint8 tensor per record (see ``records.py``)
- ``constants.safetensors``: only where slots have constants: tensor ``constants.<layer>`` [n, hidden] in fp32
- ``routing.safetensors``: the router's choices for some calibration sequences (see
  ``compress/stream/trace_recorder.py``)
- ``predictor.safetensors``: which prototypes the next layer will ask for (see ``compress/stream/predictor_fit.py``)
- tokenizer, generation config, chat template, licence
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

FORMAT_VERSION = 1
MANIFEST_NAME = "conmoe.json"
CONSTANTS_FILE = "constants.safetensors"
ROUTING_FILE = "routing.safetensors"
PREDICTOR_FILE = "predictor.safetensors"
MAX_CHUNK = 2048
"""The most tokens of a prompt that go through a model at a time (``Manifest.prefill_chunk``)."""
USUAL_CHUNK = 512
"""The most where every prototype is resident, so that a longer chunk saves no reading; and what a package has that does
not say how many.
"""
UNCHANGED = "unchanged"
"""``Manifest.method`` of a model that fits as it is: its own files, linked, and no prototypes."""


class ExpertId(NamedTuple):
    """A pretrained routed expert: decoder layer and index within it. Sorts by layer, then expert."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """What a router slot sends its tokens to: ``scale * prototype(x) + constant``, or nothing at all.

    ``prototype is None and constant is None`` means dropped. ``constant`` is the row of ``constants.<layer>``.
    """

    prototype: ExpertId | None
    scale: float = 1.0
    constant: int | None = None

    @property
    def dropped(self) -> bool:
        """Whether nothing is behind the slot."""
        return self.prototype is None and self.constant is None


@dataclass(frozen=True, slots=True)
class RecordPart:
    """A named run of bytes inside a record: ``shape`` and ``dtype`` (torch name) of the view, ``offset`` in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """How one expert lies in a record of ``nbytes`` bytes (``layout.py``). Parts start 64-aligned."""

    precision: str
    parts: tuple[RecordPart, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class PrototypeEntry:
    """Where one prototype's record lies: byte ``offset`` from the start of ``file``; ``weight`` = share of the
    calibration's routing weight that the prototype carries (sum of gates of all slots that point to it)."""

    id: ExpertId
    file: str
    offset: int
    layout: int
    weight: float


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Who stays in the cache slots of one record layout (``offload/simulate/policy_search.py`` chooses).

    Attributes:
        slots: the number of slots that this was chosen for.
        policy: ``lru``, ``layer-lru``, ``lfru`` or ``pins``.
        pin_share: largest share of the slots that pins may take; 0 without pins.
        quotas: slots of every group of layers that share prototypes, in the order of their first layers; empty
            where the policy has none.
        predicted_hit: share of the requests that found their prototype in the replay; ``None`` without a replay.
        candidates: the same for everything that was tried, by name.
    """

    slots: int
    policy: str
    pin_share: float = 0.0
    quotas: tuple[int, ...] = ()
    predicted_hit: float | None = None
    candidates: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PrefetchSettings:
    """Whether prototypes are read ahead, and what was seen of it (``offload/simulate/prefetch_search.py`` decides).

    Attributes:
        depth: most prototypes that are read ahead for a layer; 0 is off.
        window: how many of the likeliest prototypes are looked at for missing ones.
        resident_share: share of the prototypes that had a slot where this was decided.
        gain: share of the time of a token that ``depth`` saves by the model of the replay; of the best depth there
            is where it is off; ``None`` where no rates were known.
        recall: decoder layer -> share of the prototypes that tokens asked for that were among as many likeliest.
    """

    depth: int
    window: int
    resident_share: float
    gain: float | None
    recall: dict[int, float]


@dataclass(frozen=True, slots=True)
class LayerOverview:
    """What calibration saw of a layer's router slots, one number a slot. For readers: the runtime needs none of it.

    Attributes:
        weights: share of the routing weight of all layers that went to the slot, before anything was changed.
        tokens: calibration tokens that chose it.
        distances: weight distance between the slot's pretrained expert and that of its prototype, 0 where they are
            the same, at most 2 (``compress/solvers/weight_distance.py``); ``None`` where it has no prototype.
    """

    weights: tuple[float, ...]
    tokens: tuple[int, ...]
    distances: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class LayerOriginal:
    """What a routed expert of a layer was before anything was done to it. For readers: the runtime needs none of it.

    Attributes:
        neurons: of one expert.
        weights: of one expert, biases included.
        nbytes: of one expert in the checkpoint, scales included.
        worth: what was measured of the layer before its bytes were divided: the share of the residual stream behind
            it, squared, that changes where its experts alone are narrowed to the same bytes as everywhere; ``None``
            where that was not measured (``compress/phases/survey.py``).
    """

    neurons: int
    weights: int
    nbytes: int
    worth: float | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of ``conmoe.json``.

    Attributes:
        source: name, revision, fingerprint of the model that was consolidated.
        method, rate, scope, precision: the levers.
        dense_precision: how matrices outside the routed experts are stored: ``source``, ``int8``, ``q6`` or ``q4``.
        layouts: record layouts; ``PrototypeEntry.layout`` is an index into them.
        prototypes: sorted by ``id``; position = prototype number.
        slots: decoder layer -> one ``SlotRecord`` per router slot.
        rerouted: decoder layers whose router may only choose slots that have a prototype or a constant; ascending.
            Elsewhere a router chooses among all of its slots, and one with neither adds nothing.
        prefill_chunk: tokens of a prompt that go through the model at a time, from its first token on; part of what
            a package computes, as the portions decide the last bits of sums. ``None`` in packages from before the
            field was there: the plan's then (``integrations/memory_plan.py``).
        kv_precision: how a runtime keeps keys and values, ``source`` or ``int8``; part of what a package computes, as
            the chunk is.
        files: file name -> {"size": int, "sha256": str}.
        cache: one entry a layout for the planned slots; empty where every prototype is resident or nothing was tried.
        prefetch: ``None`` where there is no predictor.
        notes: sentences of the method for the reader, such as a fallback that was taken.
        overview: decoder layer -> what calibration saw of its router slots; empty where nothing was kept of it.
        originals: decoder layer -> what its experts were; empty in packages from before the field was there.
        plan, receipt: plain JSON for readers (see ``plan/`` and ``compress/quality/receipt.py``).
    """

    source: dict[str, Any]
    method: str
    rate: float
    scope: int
    precision: str
    layouts: tuple[RecordLayout, ...]
    prototypes: tuple[PrototypeEntry, ...]
    slots: dict[int, tuple[SlotRecord, ...]]
    files: dict[str, dict[str, Any]]
    plan: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)
    cache: tuple[CacheSettings, ...] = ()
    prefetch: PrefetchSettings | None = None
    notes: tuple[str, ...] = ()
    overview: dict[int, LayerOverview] = field(default_factory=dict)
    originals: dict[int, LayerOriginal] = field(default_factory=dict)
    dense_precision: str = "source"
    tool_version: str = ""
    format_version: int = FORMAT_VERSION
    rerouted: tuple[int, ...] = ()
    prefill_chunk: int | None = None
    kv_precision: str = "source"

    def open_slots(self, layer: int) -> list[bool]:
        """One flag a router slot of a layer: whether the router may choose it."""
        closes = layer in self.rerouted
        return [not closes or not slot.dropped for slot in self.slots[layer]]
