"""The tensors of a model whose dense part is in the package already: what is there unchanged is read from there.

So a dense weight of a model on the hub comes over the network once. Peak memory: the headers of the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.checkpoint.tensors.tensor_reader import Lazy, ShardReader


@contextmanager
def written_first(tensors: Mapping[str, Lazy], package: Path) -> Iterator[Mapping[str, Lazy]]:
    """``tensors``, by way of ``package`` where it has them in the same form.

    Raises:
        CheckpointError: the package's headers are damaged.
    """
    with ShardReader(CheckpointIndex.open(package)) as written:
        chosen: dict[str, Lazy] = {}
        for name, theirs in tensors.items():
            ours = written.get(name)
            same = ours is not None and (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
            chosen[name] = ours if ours is not None and same else theirs
        yield chosen
