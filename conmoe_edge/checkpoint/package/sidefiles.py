"""The small files that travel with a model: tokenizer, chat template, generation config, licence,
model card.

Only names on the list are taken, and never code, pickles or weights. Links are followed where they stay in the folder
(or in the hub's cache, which consists of links), and their content is copied. A link that leaves the folder is an error
for each of these files and not left out: a package without its chat template, or its licence, is silently another one.

Templates in a folder of their own (``additional_chat_templates``) travel inside ``tokenizer_config.json``, where
transformers looks for several of them as well: a package has no folders.

Peak memory: one file, and the templates. Raises ``CheckpointError`` for such a link and for a file that cannot be read,
``NoSpace``.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile, write_bytes, write_json
from conmoe_edge.checkpoint.fs.contained import is_there, read_inside
from conmoe_edge.checkpoint.tensors.folder_check import TEMPLATES_FOLDER, check_folder
from conmoe_edge.checkpoint.tensors.tensor_index import read_json_object
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

_TEMPLATE, _SETTINGS, _TEMPLATES = "chat_template.jinja", "tokenizer_config.json", "chat_template"
_MOST_TEMPLATES = 64


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
    templates = named_templates(source)
    instead = {_TEMPLATE, _SETTINGS} if templates else set()
    names = [path.name for path in side_files(source)]
    written = [
        write_bytes(
            target / (MODEL_CARD if name == "README.md" else name), read_inside(source, name)
        )
        for name in names
        if name not in instead
    ]
    if templates:
        settings = read_json_object(source / _SETTINGS) if _SETTINGS in names else {}
        named = [{"name": name, "template": one} for name, one in sorted(templates.items())]
        written.append(write_json(target / _SETTINGS, {**settings, _TEMPLATES: named}))
    return written


def named_templates(folder: Path) -> dict[str, str]:
    """All chat templates of a model by name, if some lie in a folder of their own; else none.

    As transformers takes them: those in the folder are called as their files, ``chat_template.jinja`` is called
    ``default``, and a file counts before a template of the same name in ``tokenizer_config.json``.

    Raises:
        CheckpointError: a file is a link that leads away, is no text, or there are too many.
    """
    inside = folder / TEMPLATES_FOLDER
    if not inside.is_dir() and not inside.is_symlink():
        return {}
    check_folder(folder)
    paths = sorted(inside.glob("*.jinja"))
    if not paths:
        return {}
    if len(paths) > _MOST_TEMPLATES:
        raise CheckpointError(
            f"{inside} holds {len(paths)} templates.",
            f"{_MOST_TEMPLATES} are enough for any tokenizer",
            "remove those that are not used",
        )
    found = _in_settings(folder)
    if is_there(folder, _TEMPLATE):
        found["default"] = _text(folder, _TEMPLATE)
    return found | {path.stem: _text(inside, path.name) for path in paths}


def _in_settings(folder: Path) -> dict[str, str]:
    own = read_json_object(folder / _SETTINGS) if is_there(folder, _SETTINGS) else {}
    template = own.get(_TEMPLATES)
    if isinstance(template, str):
        return {"default": template}
    listed = template if isinstance(template, list) else []
    return {
        one["name"]: one["template"]
        for one in listed
        if isinstance(one, dict)
        and all(isinstance(one.get(key), str) for key in ("name", "template"))
    }


def _text(folder: Path, name: str) -> str:
    try:
        return read_inside(folder, name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{folder / name} is no text.",
            str(error)[:200],
            "Get the file from the model's publisher again.",
        ) from None
