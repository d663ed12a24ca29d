"""What a layer asks for its prototypes: a ``Residency``, or weights that a model has loaded (``loaded_experts.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from conmoe_edge.offload.residency.address_table import AddressTable
from conmoe_edge.offload.storage.stored_expert import StoredExpert


class ExpertPool(Protocol):
    """Prototypes of one form, by their place in it."""

    def parts(self, slot: int) -> StoredExpert:
        """The one at ``slot``."""
        ...


class PrototypeSource(Protocol):
    """Prototypes by number, as ``Residency`` has them; what each of its members does stands there."""

    @property
    def table(self) -> AddressTable:
        """Where they lie."""
        ...

    @property
    def pools(self) -> Sequence[ExpertPool]:
        """What they lie in, by the first number of a place."""
        ...

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    @property
    def prefetcher(self) -> object | None:
        """``None`` where nothing is read ahead."""
        ...

    def kinds(self, numbers: Iterable[int]) -> list[StoredExpert]:
        """One of each form that ``numbers`` have."""
        ...

    def used(self, count: int) -> None:
        """So many that stay were computed with."""

    def asked(self, numbers: Sequence[int]) -> None:
        """These, which are there, were computed with."""

    def resident(self, numbers: Sequence[int]) -> list[StoredExpert] | None:
        """Those of ``numbers`` where all of them are there."""
        ...

    def visit(
        self,
        numbers: Sequence[int],
        compute: Callable[[Sequence[int], Sequence[StoredExpert]], None],
        *,
        scan: bool = False,
        ahead: Sequence[int] = (),
    ) -> None:
        """``compute(positions, experts)`` until every one of ``numbers`` has had its turn."""

    def likely_next(self, layer: int, hidden: Tensor) -> Sequence[int]:
        """What the layer after ``layer`` will probably ask for."""
        ...

    def scanned_next(self, layer: int, asked: int) -> Sequence[int]:
        """The same for a chunk of a prompt."""
        ...

    def prefetch(self, numbers: Sequence[int], keep: Sequence[int] = ()) -> None:
        """Read these ahead."""

    def collect(self, scanned: Sequence[int] = ()) -> None:
        """Notice what was read ahead."""
