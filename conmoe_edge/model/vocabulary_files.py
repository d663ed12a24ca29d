"""Vocabularies that are no ``tokenizer.json``: SentencePiece's and tiktoken's own files.

transformers reads both through the library of each, and for some kinds of models hands the vocabulary to a tokenizer of
another kind, which cuts text into other tokens without an error. So a library that is missing is named before, and
afterwards the library itself is asked how it cuts a line.

Peak memory: the file, and the vocabulary in the library. What the libraries raise is the caller's to catch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from conmoe_edge.checkpoint.fs.contained import is_there, read_inside

_MOST_BYTES = 128 << 20
_FILES = ("tokenizer.model", "tiktoken.model", "*.tiktoken", "*.model")
_OTHERS = ("tokenizer.json", "tekken.json", "vocab.json", "vocab.txt")
"""With one of these transformers needs no library."""
_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n?")
_NEEDED = {
    "sentencepiece": ("sentencepiece", "google.protobuf"),
    "tiktoken": ("tiktoken",),
}
_INSTALL = {"google.protobuf": "protobuf"}
_LINE = "The river runs to the sea and the ships wait for the wind"
"""Words and blanks: whatever tokenizers do with numbers, marks and scripts, they agree on these."""
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\s+"


@dataclass(frozen=True, slots=True)
class VocabularyFile:
    """The one vocabulary of a folder, where that is a file of SentencePiece or tiktoken.

    Attributes:
        name: of the file.
        library: whose format it has.
        data: its bytes.
    """

    name: str
    library: Literal["sentencepiece", "tiktoken"]
    data: bytes

    @property
    def missing(self) -> tuple[str, ...]:
        """Packages to install before it can be read."""
        absent = [name for name in _NEEDED[self.library] if not _is_installed(name)]
        return tuple(str(_INSTALL.get(name, name)) for name in absent)

    def agrees(self, tokenizer: Any) -> bool:
        """Whether ``tokenizer`` cuts words as the library does. What comes before the first word is a setting."""
        wanted = self._tokens()
        found = list(tokenizer(_LINE, add_special_tokens=False, verbose=False)["input_ids"])
        most = len(wanted) // 2
        return wanted[-most:] == found[-most:]

    def _tokens(self) -> list[int]:
        """How the library cuts the line."""
        if self.library == "sentencepiece":
            sentencepiece: Any = import_module("sentencepiece")
            return list(sentencepiece.SentencePieceProcessor(model_proto=self.data).encode(_LINE))
        tiktoken: Any = import_module("tiktoken")
        encoding = tiktoken.Encoding(
            self.name, pat_str=_WORDS, mergeable_ranks=_ranks(self.data), special_tokens={}
        )
        return list(encoding.encode(_LINE))


def vocabulary_file(folder: Path) -> VocabularyFile | None:
    """The vocabulary in ``folder``; ``None`` where it has another one, or one of neither library.

    Raises:
        CheckpointError: the file is too large, or no plain file of the folder.
    """
    if any(is_there(folder, name) for name in _OTHERS):
        return None
    names = sorted(path.name for path in folder.iterdir())
    for pattern in _FILES:
        for name in names:
            if fnmatchcase(name, pattern):
                data = read_inside(folder, name, _MOST_BYTES)
                is_ranks = _RANK.match(data) is not None
                return VocabularyFile(name, "tiktoken" if is_ranks else "sentencepiece", data)
    return None


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would lie in
        return False


def _ranks(data: bytes) -> dict[bytes, int]:
    import base64

    pairs = (line.split() for line in data.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}
