"""Print the digests of the classes that the fast path serves, in the installed release of transformers.

    python -m tools.fastpath_digests

A line per class of ``conmoe_edge/offload/fastpath/supported.py``: its digest, and whether the list has it. To take in a
new release, look at what changed in the classes that are marked, and add their digests once their tests pass.
"""

from __future__ import annotations

import transformers

from conmoe_edge.offload.fastpath.supported import installed_digests


def lines() -> list[str]:
    """One for each class on the list."""
    return [
        f"{name:48} {digest or 'absent'}{'' if known or digest is None else '  NOT ON THE LIST'}"
        for name, (digest, known) in installed_digests().items()
    ]


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}", *lines(), sep="\n")
