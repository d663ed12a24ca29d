"""Print the digests of the classes that the fast path serves, in the installed release of transformers.

    python -m tools.fastpath_digests

A line per class of ``conmoe_edge/offload/fastpath/supported.py``, then one per ``forward`` of the models that are made
of them and of their decoders (``single_step.py``): the digest, and whether the list has it. To take in a new release,
look at what changed in what is marked, and add its digest once its tests pass. A model whose ``forward`` is not on the
list has all but single steps; some do other things there and never will be.
"""

from __future__ import annotations

from collections.abc import Mapping

import transformers

from conmoe_edge.offload.fastpath.single_step import installed_forwards
from conmoe_edge.offload.fastpath.supported import installed_digests


def lines(found: Mapping[str, tuple[str | None, bool]]) -> list[str]:
    """One for each class: its digest, and whether that is known."""
    return [
        f"{name:48} {digest or 'absent'}{'' if known or digest is None else '  NOT ON THE LIST'}"
        for name, (digest, known) in found.items()
    ]


def main() -> None:
    """Print both lists."""
    print(f"transformers {transformers.__version__}", *lines(installed_digests()), sep="\n")
    print("\nforward", *lines(installed_forwards()), sep="\n")


if __name__ == "__main__":
    main()
