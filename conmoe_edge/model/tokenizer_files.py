"""Whether a folder has a tokenizer at all, told by its files. Opens none, and imports nothing heavy.

transformers does not tell: for some models (OLMoE, Qwen) it makes an empty tokenizer out of nothing, to which every
text is no tokens.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from conmoe_edge.checkpoint.package.sidefiles import side_files

VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt")
"""Files that hold the tokens; one of them is enough."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a vocabulary is there, among the files that travel with a model."""
    names = [path.name for path in side_files(folder)]
    return any(fnmatchcase(name, pattern) for name in names for pattern in VOCABULARIES)
