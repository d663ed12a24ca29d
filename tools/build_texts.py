"""Build the calibration and held-out texts that ship inside the package.

    python tools/build_texts.py --corpora DIR

reads ``DOMAIN.train.txt`` and ``DOMAIN.valid.txt`` for six domains and writes
``calibration.txt`` (train files only) and ``heldout.txt`` (valid files only).  The result is
deterministic: consecutive paragraphs are grouped into documents of natural length and documents
are taken at even distances over the whole file, so that every part of a domain is represented.

File format: UTF-8; every document begins with a line ``<|document domain=NAME|>``; its
paragraphs (or examples, or code blocks) follow, separated by blank lines.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

DOMAINS = ("books", "math", "code", "wiki", "french", "german")
ENGLISH = ("books", "math", "code", "wiki")
CALIBRATION_BYTES = {
    "books": 110_000,
    "math": 70_000,
    "code": 80_000,
    "wiki": 60_000,
    "french": 38_000,
    "german": 38_000,
}
HELDOUT_BYTES = {
    "books": 50_000,
    "math": 35_000,
    "code": 35_000,
    "wiki": 30_000,
    "french": 15_000,
    "german": 15_000,
}
DOCUMENT_BYTES = 1_600
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "conmoe_edge" / "data" / "texts"

README = """# Calibration and held-out texts

Written by `tools/build_texts.py --corpora DIR` (deterministic, no random numbers).

| file | drawn from | use |
|---|---|---|
| `calibration.txt` | the train files only | expert statistics, quantisation, merging, prefetching |
| `heldout.txt` | the valid files only | losses; neither the demo model nor a calibration saw it |

The demo model was trained on the train files, so `calibration.txt` is text it has seen;
`heldout.txt` is not.

Format: UTF-8. A document begins with a line `<|document domain=NAME|>` and runs to the next such
line; paragraphs within it are separated by blank lines. A file without such lines is one document.

| domain | source | licence | calibration (documents, bytes) | held out (documents, bytes) |
|---|---|---|---|---|
{rows}

WikiText's rare words are the literal text `<unk>` there, and are kept. The wiki text is under
CC BY-SA 3.0 (authors: the contributors of Wikipedia, by way of WikiText-2); the changes made are
detokenising, trimming of lines and selection. Python's library sources are Copyright (c) Python
Software Foundation, used under the PSF License Version 2. GSM8K is Copyright (c) 2021 OpenAI,
MIT licence.
"""

SOURCES = {
    "books": ("novels from Project Gutenberg (headers removed, lines unwrapped)", "public domain"),
    "math": ("GSM8K training questions with answers (calculator marks removed)", "MIT"),
    "code": ("Python 3.11 standard library sources", "PSF-2.0"),
    "wiki": ("WikiText-2 validation text (detokenised)", "CC BY-SA 3.0"),
    "french": ("novels from Project Gutenberg", "public domain"),
    "german": ("novels from Project Gutenberg", "public domain"),
}


def read_domain(corpora: Path, domain: str, split: str) -> str:
    """Return one corpus file; lines of the wiki text are trimmed of detokenisation spaces."""
    text = (corpora / f"{domain}.{split}.txt").read_text(encoding="utf-8")
    text = text.replace("\r\n", "\n")
    if domain == "wiki":
        text = "\n".join(line.strip() for line in text.split("\n"))
        text = re.sub(r"\n(= [^=].*)", r"\n\n\1", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"


def split_units(text: str, domain: str) -> list[str]:
    """Split a corpus into the smallest units that are kept whole."""
    # In code, two blank lines stand between top-level definitions.
    separator = r"\n\n\n" if domain == "code" else r"\n\n+"
    return [part.strip("\n") for part in re.split(separator, text) if part.strip()]


def group_documents(units: list[str], domain: str, size: int = DOCUMENT_BYTES) -> list[str]:
    """Join consecutive units until a document has at least ``size`` bytes."""
    separator = "\n\n\n" if domain == "code" else "\n\n"
    documents: list[str] = []
    current: list[str] = []
    length = 0
    for unit in units:
        current.append(unit)
        length += len(unit.encode())
        if length >= size:
            documents.append(separator.join(current))
            current, length = [], 0
    if current:
        documents.append(separator.join(current))
    return documents


def pick_evenly(documents: list[str], budget: int) -> list[str]:
    """Take documents at even distances, skipping outsized ones, up to ``budget`` bytes."""
    fitting = [d for d in documents if len(d.encode()) <= 3 * DOCUMENT_BYTES]
    mean = sum(len(d.encode()) for d in fitting) / len(fitting)
    count = min(len(fitting), max(1, int(budget / mean)))
    chosen: list[str] = []
    used = 0
    for i in range(count):
        document = fitting[int((i + 0.5) * len(fitting) / count)]
        if used + len(document.encode()) <= budget:
            chosen.append(document)
            used += len(document.encode())
    return chosen


def build_split(corpora: Path, split: str, budgets: dict[str, int]) -> dict[str, list[str]]:
    """Return the chosen documents of one split by domain."""
    chosen = {}
    for domain in DOMAINS:
        text = read_domain(corpora, domain, split)
        documents = group_documents(split_units(text, domain), domain)
        chosen[domain] = pick_evenly(documents, budgets[domain])
    return chosen


def interleave(chosen: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Yield (domain, document) so that any prefix of the file has all domains in proportion."""
    order = [
        ((i + 0.5) / len(documents), domain, document)
        for domain, documents in chosen.items()
        for i, document in enumerate(documents)
    ]
    for _, domain, document in sorted(order, key=lambda item: (item[0], item[1])):
        yield domain, document


def render(chosen: dict[str, list[str]]) -> str:
    """Write the documents in the shipped format."""
    return "".join(
        f"<|document domain={domain}|>\n{document}\n" for domain, document in interleave(chosen)
    )


def describe(documents: list[str]) -> str:
    """Return 'count, bytes' for the table of sources."""
    return f"{len(documents)}, {sum(len(d.encode()) for d in documents):,}"


def main() -> None:
    """Write both texts and their README."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True, help="folder with the corpora")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write to")
    args = parser.parse_args()
    calibration = build_split(args.corpora, "train", CALIBRATION_BYTES)
    heldout = build_split(args.corpora, "valid", HELDOUT_BYTES)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("calibration.txt", calibration), ("heldout.txt", heldout)):
        data = render(chosen).encode()
        (args.out / name).write_bytes(data)
        print(f"{name}: {len(data):,} bytes")
    rows = "\n".join(
        f"| {d} | {SOURCES[d][0]} | {SOURCES[d][1]} "
        f"| {describe(calibration[d])} | {describe(heldout[d])} |"
        for d in DOMAINS
    )
    (args.out / "README.md").write_text(README.format(rows=rows), encoding="utf-8")


if __name__ == "__main__":
    main()
