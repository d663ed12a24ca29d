"""The small files that travel with a model: tokenizer, chat template, generation config, licence,
model card.

Only names on the list are taken, and never code, pickles or weights. Links are followed where they stay in the folder
(or in the hub's cache, which consists of links), and their content is copied. A link that leaves the folder is an error
for each of these files and not left out: a package without its chat template, or its licence, is silently another one.

Peak memory: one file. Raises ``CheckpointError`` for such a link and for a file that cannot be read, ``NoSpace``.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile, write_bytes
from conmoe_edge.checkpoint.fs.contained import read_inside

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
    "chat_template.json",
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


def side_files(folder: Path) -> list[Path]:
    """The files of ``folder`` that travel with its model, sorted by name; whether they may be read is not decided."""
    return sorted(
        path
        for path in folder.iterdir()
        if any(fnmatchcase(path.name, pattern) for pattern in PATTERNS)
        and not any(fnmatchcase(path.name.lower(), pattern) for pattern in NEVER)
        and (path.is_symlink() or not path.is_dir())
    )


def copy_side_files(source: Path, target: Path) -> list[WrittenFile]:
    """Copy them into ``target`` and say what was written.

    Raises:
        CheckpointError: as ``read_inside``.
    """
    names = [path.name for path in side_files(source)]
    return [
        write_bytes(
            target / (MODEL_CARD if name == "README.md" else name), read_inside(source, name)
        )
        for name in names
    ]
