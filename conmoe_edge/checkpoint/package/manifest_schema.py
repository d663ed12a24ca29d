"""The shape of ``conmoe.json``, field by field: types, ranges, and what one record layout must
satisfy in itself.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from conmoe_edge.checkpoint.format.dtypes import CODES, itemsize
from conmoe_edge.checkpoint.format.layout import PART_ALIGNMENT, record_alignment
from conmoe_edge.checkpoint.format.manifest import FORMAT_VERSION, MAX_CHUNK
from conmoe_edge.checkpoint.fs.contained import is_plain_name


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("must be the plain name of a file in the package")
    return name


def _aligned(alignment: int) -> AfterValidator:
    def check(value: int) -> int:
        if value % alignment:
            raise ValueError(f"must be a multiple of {alignment}")
        return value

    return AfterValidator(check)


Count = Annotated[int, Field(ge=0, le=1 << 53)]
Layer = Annotated[int, Field(ge=0, lt=1 << 16)]
Id = tuple[Layer, Layer]
Name = Annotated[str, Field(min_length=1, max_length=200)]
FileName = Annotated[str, AfterValidator(_plain)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
_LARGEST = float.fromhex("0x1.fffffep+127")
Scale = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]
"""A factor of a gate, which every backend holds in fp32."""
Json = dict[str, JsonValue]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PartJson(_Strict):
    """``RecordPart``."""

    name: Name
    shape: Annotated[list[Count], Field(max_length=8)]
    dtype: str
    offset: Annotated[Count, _aligned(PART_ALIGNMENT)]
    nbytes: Count

    @model_validator(mode="after")
    def _size(self) -> PartJson:
        if self.dtype not in CODES:
            raise ValueError(f"{self.dtype} is no number format that a record may hold")
        if self.nbytes != math.prod(self.shape) * itemsize(self.dtype):
            raise ValueError("the size of the part is not that of its shape")
        return self


class LayoutJson(_Strict):
    """``RecordLayout``."""

    precision: Name
    parts: Annotated[list[PartJson], Field(min_length=1, max_length=64)]
    nbytes: Annotated[Count, Field(gt=0)]

    @model_validator(mode="after")
    def _parts(self) -> LayoutJson:
        end = 0
        for part in sorted(self.parts, key=lambda part: (part.offset, part.nbytes)):
            if part.offset < end:
                raise ValueError("two parts of a record overlap")
            end = part.offset + part.nbytes
        if end > self.nbytes:
            raise ValueError("a part lies outside its record")
        if self.nbytes % record_alignment(self.nbytes):
            raise ValueError(f"must be a multiple of {record_alignment(self.nbytes)}")
        if len({part.name for part in self.parts}) != len(self.parts):
            raise ValueError("two parts of a record have the same name")
        return self


class PrototypeJson(_Strict):
    """``PrototypeEntry``."""

    id: Id
    file: FileName
    offset: Annotated[Count, Field(gt=0), _aligned(PART_ALIGNMENT)]
    layout: Layer
    weight: Annotated[Finite, Field(ge=0)]


class CacheJson(_Strict):
    """``CacheSettings``."""

    slots: Annotated[int, Field(ge=0, le=1 << 31)]
    policy: Name
    pin_share: Annotated[Finite, Field(ge=0, le=1)]
    quotas: Annotated[list[Count], Field(max_length=1 << 16)]
    predicted_hit: Annotated[Finite, Field(ge=0, le=1)] | None
    candidates: Annotated[dict[Name, Annotated[Finite, Field(ge=0, le=1)]], Field(max_length=64)]


class PrefetchJson(_Strict):
    """``PrefetchSettings``."""

    depth: Layer
    window: Layer
    resident_share: Annotated[Finite, Field(ge=0, le=1)]
    gain: Annotated[Finite, Field(le=1)] | None
    recall: dict[Layer, Annotated[Finite, Field(ge=0, le=1)]]


class OverviewJson(_Strict):
    """``LayerOverview``."""

    weights: list[Annotated[Finite, Field(ge=0)]]
    tokens: list[Count]
    distances: list[Annotated[Finite, Field(ge=0)] | None]


class OriginalJson(_Strict):
    """``LayerOriginal``."""

    neurons: Annotated[Count, Field(gt=0)]
    weights: Annotated[Count, Field(gt=0)]
    nbytes: Annotated[Count, Field(gt=0)]
    worth: Annotated[Finite, Field(ge=0)] | None = None


class FileJson(_Strict):
    """What is known of one file of the package."""

    size: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ManifestJson(_Strict):
    """``Manifest``. The keys of ``remap``, ``scales`` and ``constants`` are decoder layers."""

    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)]
    tool_version: Annotated[str, Field(max_length=200)]
    source: Json
    method: Name
    rate: Annotated[Finite, Field(ge=0, lt=1)]
    scope: Annotated[int, Field(ge=1, lt=1 << 16)]
    precision: Name
    dense_precision: Literal["source", "int8", "q6", "q4"] = "source"
    layouts: Annotated[list[LayoutJson], Field(max_length=1 << 16)]
    prototypes: list[PrototypeJson]
    remap: dict[Layer, Annotated[list[Id | None], Field(min_length=1, max_length=1 << 16)]]
    scales: dict[Layer, list[Scale]]
    constants: dict[Layer, list[Count | None]]
    files: dict[FileName, FileJson]
    plan: Json
    receipt: Json
    cache: Annotated[list[CacheJson], Field(max_length=1 << 16)] = []
    prefetch: PrefetchJson | None = None
    rerouted: Annotated[list[Layer], Field(max_length=1 << 16)] = []
    prefill_chunk: Annotated[int, Field(ge=1, le=MAX_CHUNK)] | None = None
    kv_precision: Literal["source", "int8"] = "source"
    notes: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=1 << 16)] = []
    overview: dict[Layer, OverviewJson] = {}
    originals: dict[Layer, OriginalJson] = {}
