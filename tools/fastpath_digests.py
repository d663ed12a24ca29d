"""Print the digests of the classes that the fast path serves, in the installed release of transformers.

    python -m tools.fastpath_digests

A line per class of ``conmoe_edge/offload/fastpath/supported.py``: its digest, and whether the list has it. To take in a
new release, look at what changed in the classes that are marked, and add their digests once their tests pass.
"""

from __future__ import annotations

import importlib

import transformers

from conmoe_edge.model.source_digest import source_digest
from conmoe_edge.offload.fastpath.supported import LISTED, OWN


def lines() -> list[str]:
    """One for each class on the list."""
    found = []
    for name, (_, digests) in sorted(LISTED.items()):
        family, _, kind = name.partition(".")
        place = f"transformers.models.{family}.modeling_{family}"
        if family == "torch":
            continue
        try:
            module = importlib.import_module(OWN if family == "deepseek" else place)
            digest = source_digest(getattr(module, kind))
        except (ImportError, AttributeError):
            found.append(f"{name:48} absent")
            continue
        found.append(f"{name:48} {digest}{'' if digest in digests else '  NOT ON THE LIST'}")
    return found


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}", *lines(), sep="\n")
