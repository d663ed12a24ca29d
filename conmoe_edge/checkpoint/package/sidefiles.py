"""The small files that travel with a model: tokenizer, chat template, generation config, licence,
model card.

Only names on the list are taken, and never code, pickles or weights. Links are followed and their
content is copied, since the hub's cache consists of links. Peak memory: one file. Raises
``CheckpointError`` for an unreadable file, ``NoSpace``.
"""

from __future__ import annotations

import stat
from fnmatch import fnmatchcase
from pathlib import Path

from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile, write_bytes
from conmoe_edge.errors import CheckpointError

PATTERNS = (
    "tokenizer*.json",
    "*.tiktoken",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "generation_config.json",
    "*processor_config.json",
    "*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)
NEVER = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.safetensors", "*.so", "*.sh")
MODEL_CARD = "MODEL_CARD.md"
"""What the source's README becomes: it describes the model before it was consolidated, not the
package.
"""

_MOST_BYTES = 256 << 20


def side_files(folder: Path) -> list[Path]:
    """The files of ``folder`` that travel with its model, sorted by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if any(fnmatchcase(path.name, pattern) for pattern in PATTERNS)
        and not any(fnmatchcase(path.name.lower(), pattern) for pattern in NEVER)
        and path.is_file()
    )


def copy_side_files(source: Path, target: Path) -> list[WrittenFile]:
    """Copy them into ``target`` and say what was written."""
    written = []
    for path in side_files(source):
        name = MODEL_CARD if path.name == "README.md" else path.name
        try:
            info = path.stat()
            if not stat.S_ISREG(info.st_mode) or info.st_size > _MOST_BYTES:
                raise CheckpointError(
                    f"{path} is too large to be what its name says.", "", "Remove it and try again."
                )
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"Cannot read {path}.", error.strerror or "", "Download or copy the model again."
            ) from error
        written.append(write_bytes(target / name, data))
    return written
