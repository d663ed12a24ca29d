"""From the headers of GGUF files to the tensors that a plain checkpoint of the model would have.

No weight is read here. What has no place in the model, or is in a format that the library cannot expand, is refused by
name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from conmoe_edge.checkpoint.gguf.families import FAMILIES, OUTSIDE, Family
from conmoe_edge.checkpoint.gguf.files import GgufFiles
from conmoe_edge.checkpoint.gguf.metadata import PLAIN_MODEL, Fields
from conmoe_edge.checkpoint.gguf.types import TORCH_NAMES, can_expand
from conmoe_edge.checkpoint.tensors.tensor_index import TensorEntry
from conmoe_edge.errors import CheckpointError, UnsupportedModel

_MOST_LAYERS = 4096
# Rotary frequencies that llama.cpp reads in the place of those that it computes.
_FREQUENCIES = "rope_"

_DENSE = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.weight")

How = Literal["rows", "turned", "paired", "flipped", "joined"]


@dataclass(frozen=True, slots=True)
class GgufLogical:
    """One tensor of the plain checkpoint.

    Attributes:
        name, dtype, shape: as a read gives it; ``dtype`` is torch's name.
        form: GGML's name of how it is stored, in small letters (``q4_k``).
        nbytes: bytes that it takes in the file.
        stored: the tensors of the file that it is made of.
        first: the first row of it in a stored tensor, seen as [rows, columns].
        how: ``rows`` as they are; ``turned`` has them in the order of ``heads`` rotary embeddings; ``paired`` is
            gate and up, interleaved, and transposed; ``flipped`` is transposed; ``joined`` is, for each of ``heads``
            heads, a transposed stack and another one below it.
        heads: for ``turned`` and ``joined``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    form: str
    nbytes: int
    stored: tuple[str, ...]
    first: int = 0
    how: How = "rows"
    heads: int = 0


def family_of(files: GgufFiles) -> Family:
    """The family of the model in ``files``.

    Raises:
        UnsupportedModel: it is of none that is read.
    """
    family = FAMILIES.get(files.architecture)
    if family is None:
        raise UnsupportedModel(
            f"{files.path} is a model of the architecture {files.architecture[:40]}.",
            f"GGUF files of {', '.join(sorted(FAMILIES))} with experts are read",
            PLAIN_MODEL,
        )
    if f"{files.architecture}.expert_count" not in files.metadata:
        raise UnsupportedModel(
            f"{files.path} is a dense model: it has no experts.",
            f"{files.architecture}.expert_count is not in its metadata",
            "name a Mixture-of-Experts model: conmoe-edge models lists some",
        )
    return family


def config_of(files: GgufFiles, family: Family) -> dict[str, Any]:
    """``config.json`` of the plain model.

    Raises:
        CheckpointError: a field is missing or impossible.
        UnsupportedModel: a field has a meaning that is not computed here.
    """
    fields = Fields(files.path, family.architecture, files.metadata)
    shapes = {name: entry.shape for name, entry in files.index.tensors.items()}
    config = family.config(fields, shapes)
    fields.refuse_unread()
    return {**config, "dtype": main_dtype(files.index.tensors)}


def main_dtype(tensors: Mapping[str, TensorEntry]) -> str:
    """torch's name of the format that quantised tensors are expanded to: that of the experts where it is a plain one.

    Norms and routers are in F32 in every file; they say nothing.
    """
    sizes: dict[str, int] = {}
    for entry in tensors.values():
        if len(entry.shape) > 2:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + math.prod(entry.shape)
    most = max(sorted(sizes), key=lambda one: sizes[one], default="")
    return TORCH_NAMES.get(most, "bfloat16")


def logical_tensors(
    files: GgufFiles, family: Family, config: Mapping[str, Any]
) -> dict[str, GgufLogical]:
    """Every tensor of the plain checkpoint by its name; all tensors of the files are in one.

    Raises:
        UnsupportedModel: a tensor has no place, or is in a format that cannot be expanded.
        CheckpointError: shapes that cannot belong together.
    """
    layers = config["num_hidden_layers"]
    if layers > _MOST_LAYERS:
        raise CheckpointError(
            f"{files.path} says that it has {layers} layers.",
            f"no model has more than {_MOST_LAYERS}",
            "Download the file again.",
        )
    made = _Making(files, family, config).make(layers)
    return dict(sorted(made.items()))


class _Making:
    def __init__(self, files: GgufFiles, family: Family, config: Mapping[str, Any]) -> None:
        from gguf.constants import MODEL_ARCH_NAMES
        from gguf.tensor_mapping import get_tensor_name_map

        self.files = files
        self.family = family
        self.config = config
        self.left = dict(files.index.tensors)
        self.made: dict[str, GgufLogical] = {}
        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        self.names = get_tensor_name_map(numbers[family.architecture], config["num_hidden_layers"])

    def make(self, layers: int) -> dict[str, GgufLogical]:
        for name in OUTSIDE:
            self._rows(name, name)
        family = self.family
        for layer in range(layers):
            start = f"model.layers.{layer}."
            for name in family.layer:
                self._rows(start + name, start + family.aliases.get(name, name))
            self._fused_experts(layer)
            for known, name in family.experts.items():
                self._experts(start + name, start + known)
            for name, known in family.flipped.items():
                self._flipped(start + name, start + known)
            for name, pair in family.joined.items():
                self._joined(start + name, [start + one for one in pair])
            for name, pair in family.pairs.items():
                self._paired(start + name, [start + one for one in pair])
        if self.left:
            self._refuse_left(min(self.left))
        return self.made

    def _take(self, known: str) -> TensorEntry | None:
        """The tensor of the file that the library's map has for a name in a plain checkpoint."""
        name = self.names.get_name(known, try_suffixes=(".weight", ".bias"))
        entry = None if name is None else self.left.pop(name, None)
        return None if entry is None else self._expandable(entry)

    def _expandable(self, entry: TensorEntry) -> TensorEntry:
        if not can_expand(entry.dtype):
            raise UnsupportedModel(
                f"The tensor {entry.name} of {self.files.path} is stored as {entry.dtype}.",
                "the gguf library cannot expand this format",
                "take a file in another quantisation (Q4_K_M, Q8_0, BF16)",
            )
        return entry

    def _add(self, one: GgufLogical) -> None:
        self.made[one.name] = one

    def _dtype(self, entry: TensorEntry) -> str:
        return TORCH_NAMES.get(entry.dtype) or self.config["dtype"]

    def _rows(self, name: str, known: str) -> None:
        entry = self._take(known)
        if entry is None:
            return
        shape = entry.shape
        if name.endswith("shared_expert_gate.weight") and len(shape) == 1:
            shape = (1, *shape)  # a row of its own in the plain checkpoint
        field = self.family.turned.get(name.split(".", 3)[-1])
        how: How = "rows" if field is None else "turned"
        heads = 0 if field is None else self.config[field]
        if heads and (len(shape) != 2 or shape[0] % (2 * heads)):
            raise self._odd(entry, f"which {heads} heads cannot share")
        self._add(
            GgufLogical(
                name, self._dtype(entry), shape, entry.dtype.lower(), entry.nbytes,
                (entry.name,), how=how, heads=heads,
            )
        )  # fmt: skip

    def _experts(self, name: str, known: str) -> None:
        entry = self._take(known)
        if entry is None:
            return
        self._stack([name], entry)

    def _fused_experts(self, layer: int) -> None:
        """Gate and up of all experts in one stack, the rows of the gate first (``--fuse-gate-up-exps`` of llama.cpp's
        script). The library's maps name it for a few architectures only, llama.cpp reads it for all of these.
        """
        known = {place: name for name, place in self.family.fused.items()}
        entry = self.left.pop(f"blk.{layer}.ffn_gate_up_exps.weight", None) if known else None
        if entry is None:
            return
        start = f"model.layers.{layer}."
        self._stack([start + known["gate"], start + known["up"]], self._expandable(entry))

    def _stack(self, names: list[str], entry: TensorEntry) -> None:
        """A stack of matrices, or of matrices below one another, as the tensors ``names`` of each expert."""
        if len(entry.shape) != 3 or entry.shape[1] % len(names):
            raise self._odd(entry, "which is no stack of matrices")
        count, rows, columns = entry.shape
        rows //= len(names)
        for number in range(count):
            for place, name in enumerate(names):
                if name.format(number) in self.made:
                    raise self._odd(entry, "and its experts are in the file twice")
                self._add(
                    GgufLogical(
                        name.format(number), self._dtype(entry), (rows, columns),
                        entry.dtype.lower(), entry.nbytes // count // len(names), (entry.name,),
                        (number * len(names) + place) * rows,
                    )
                )  # fmt: skip

    def _flipped(self, name: str, known: str) -> None:
        entry = self._take(known)
        if entry is None:
            return
        if len(entry.shape) != 3:
            raise self._odd(entry, "which is no stack of matrices")
        count, rows, columns = entry.shape
        self._add(
            GgufLogical(
                name, self._dtype(entry), (count, columns, rows), entry.dtype.lower(),
                entry.nbytes, (entry.name,), how="flipped",
            )
        )  # fmt: skip

    def _paired(self, name: str, known: list[str]) -> None:
        found = [entry for one in known if (entry := self._take(one)) is not None]
        if not found:
            return
        if len(found) != 2 or found[0].shape != found[1].shape:
            raise self._odd(found[0], "and what belongs beside it is missing or of another shape")
        gate, up = found
        *lead, last = gate.shape
        if len(gate.shape) == 3:
            shape: tuple[int, ...] = (lead[0], last, 2 * lead[1])
        elif len(gate.shape) == 2:
            shape = (lead[0], 2 * last)
        else:
            raise self._odd(gate, "which is no stack")
        form = "+".join(sorted({one.dtype.lower() for one in found}))
        dtypes = {self._dtype(one) for one in found}
        dtype = dtypes.pop() if len(dtypes) == 1 else self.config["dtype"]
        self._add(
            GgufLogical(
                name,
                dtype,
                shape,
                form,
                gate.nbytes + up.nbytes,
                (gate.name, up.name),
                how="paired",
            )
        )

    def _joined(self, name: str, known: list[str]) -> None:
        found = [entry for one in known if (entry := self._take(one)) is not None]
        if not found:
            return
        keys, values = found[0], found[-1]
        if len(found) != 2 or len(keys.shape) != 3 or len(values.shape) != 3:
            raise self._odd(keys, "and what belongs below it is missing or of another shape")
        heads, rank, high = keys.shape
        if values.shape[0] != heads or values.shape[2] != rank or name in self.made:
            raise self._odd(values, f"which does not belong below {keys.name}")
        shape = (heads * (high + values.shape[1]), rank)
        form = "+".join(sorted({one.dtype.lower() for one in found}))
        dtypes = {self._dtype(one) for one in found}
        dtype = dtypes.pop() if len(dtypes) == 1 else self.config["dtype"]
        self._add(
            GgufLogical(
                name, dtype, shape, form, keys.nbytes + values.nbytes, (keys.name, values.name),
                how="joined", heads=heads,
            )
        )  # fmt: skip

    def _odd(self, entry: TensorEntry, why: str) -> CheckpointError:
        return CheckpointError(
            f"The tensor {entry.name} has the shape {list(entry.shape)}, {why}.",
            "the metadata and the tensors of the file belong to different models",
            "Download the file again; if it is the same afterwards, the file itself is broken.",
        )

    def _refuse_left(self, name: str) -> None:
        why = "nothing here knows what it does to the model"
        if name.startswith(_FREQUENCIES) or f".{_FREQUENCIES}" in name:
            why = "it holds rotary frequencies of its own, which are not read here"
        elif self.family.experts_everywhere and _DENSE.fullmatch(name):
            why = (
                f"it is of a layer without experts, and llama.cpp has experts in every layer of "
                f"{self.family.architecture}"
            )
        raise UnsupportedModel(
            f"The tensor {name} of {self.files.path} has no place in the model.", why, PLAIN_MODEL
        )
