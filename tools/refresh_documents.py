"""Documents print what the commands print: ``python tools/refresh_documents.py [--check] [PAGE ...]``.

Runs every command of a page in the page's order, in an empty folder, with the demo model and without a network, and
writes the printed blocks again. ``--check`` writes nothing and leaves with 1 where a block is no longer printed.
``--list`` runs nothing and shows which commands would be run, and which not, with the reason.

One rule for what may differ: figures. A block is compared line by line, in order, without its figures, blanks and drawn
maps; words and units have to be there. Lines of the output that a page leaves out may be left out.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^    conmoe-edge (.*?)(?:\s+#\s.*)?$", re.MULTILINE)
_NUMBER = re.compile(r"[+-]?\d[\d,.]*")
_BLANKS = re.compile(r"\s+")
_MAP = re.compile(r"^\s*\d+\s+[░▒▓█● ]+$")
_BARS = re.compile(r"[━─█▏▎▍▌▋▊▉]{2,}|[━▏▎▍▌▋▊▉]")
_SECONDS = 900
_TYPED = "Hello.\n"
"""What comes on stdin: one message for ``chat`` and ``run``."""
_ASK = ("rm", "run")
"""Commands that ask on a terminal and refuse to go on without one: they get ``--yes``."""


@dataclass(frozen=True)
class Page:
    """One document.

    Attributes:
        name: its path.
        before: commands that are run first: what its text says that the package is, and what its lines need.
        answers: for each printed block the command that prints it.
        elsewhere: commands that are not run here, and why not.
        python: whether its lines of Python are run as well, in an empty folder of their own.
    """

    name: str
    before: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    elsewhere: dict[str, str] = field(default_factory=dict)
    python: bool = False


_HUB = "the model is on the hub"
_HALF = "fit demo --gpu 2GiB --device cpu --precision source --rate 50% --method conmoe"
_TALK = 'chat ./out --prompt "The old house" --max-tokens 24 --temperature 0'
PAGES = (
    Page(
        "README.md",
        elsewhere={
            "fit --gpu 8GB olmoe": _HUB,
            "chat ./out": "the first time it talks to that one; the second time it is run",
        },
        python=True,
    ),
    Page(
        "docs/quick-start.md",
        answers=("plan demo --gpu 562MB --device cpu", "fit demo --gpu 562MB --device cpu", _TALK),
        elsewhere={
            "plan allenai/OLMoE-1B-7B-0924 --gpu 8GB": _HUB,
            "fit allenai/OLMoE-1B-7B-0924 --gpu 8GB --out ./olmoe-8gb": _HUB,
            "fit ./my-checkpoint --gpu rtx-4060-laptop-8gb": "the folder is the reader's",
        },
    ),
    Page(
        "docs/evaluate.md",
        before=(
            _HALF,
            "fit demo --gpu 2GiB --device cpu --rate 75% --method conmoe --out ./other-fit",
        ),
        answers=("eval ./out", _HALF),
        elsewhere={
            "eval ./out --tasks arc_easy,hellaswag --limit 100": "the tasks' data are on the hub",
            "eval ./out --tasks my_task --tasks-path ./my-tasks --gpu 8GB": "the tasks are the reader's",
        },
    ),
    Page(
        "docs/inspect.md",
        before=("fit demo --gpu 2GiB --device cpu --rate 50% --scope 2 --method conmoe",),
        answers=("inspect ./out",),
    ),
)
BY_NAME = {page.name: page for page in PAGES}


def text_of(page: Page) -> str:
    """The document as it stands."""
    return (ROOT / page.name).read_text(encoding="utf-8")


def commands(page: Page) -> Iterator[tuple[str, str | None]]:
    """Its command lines in order, without the program's name, and why one is not run (``None`` where it is)."""
    yield from ((line, None) for line in page.before)
    left_out = dict(page.elsewhere)
    for line in (found.strip() for found in COMMAND.findall(text_of(page))):
        why = left_out.get(line)
        if why is not None and why.startswith("the first time"):
            del left_out[line]
        yield line, why


def skeleton(text: str) -> list[tuple[str, str]]:
    """Its lines, each without figures, blanks and drawings, and as it is; empty ones are left out. Units stay."""
    found = []
    for line in text.splitlines():
        plain = "<map>" if _MAP.match(line) else _NUMBER.sub("#", _BARS.sub("", line))
        plain = _BLANKS.sub(" ", plain).strip()
        if plain:
            found.append((plain, line))
    return found


def printed_now(block: str, output: str) -> str:
    """``block`` with the figures of ``output``.

    Raises:
        ValueError: a line of it is no longer printed, or not in this order.
    """
    now, found = iter(skeleton(output)), []
    for line in block.splitlines():
        wanted = skeleton(line)
        if not wanted:
            found.append(line)
            continue
        same = next((other for plain, other in now if plain == wanted[0][0]), None)
        if same is None:
            raise ValueError(f"no longer printed: {line}")
        found.append(same.rstrip())
    return "".join(f"{line}\n" for line in found)


def run(line: str, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """One command line: its exit status, and what it printed, stdout before stderr."""
    words, _, into = line.partition(" > ")
    command = ["-m", "conmoe_edge", *shlex.split(words)]
    command += ["--yes"] if shlex.split(words)[0] in _ASK else []
    status, said, errors = _run(command, folder, environment)
    if into:
        (folder / into).write_text(said, encoding="utf-8")
    return status, f"{said}\n{errors}"


def _run(words: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        said, errors = process.communicate(_TYPED, timeout=_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
    return process.returncode, said, errors


def walk(page: Page, folder: Path, check: bool) -> list[str]:
    """Run all of a page in ``folder``, which is empty; what is wrong. Writes the page again unless ``check``."""
    environment = _environment(folder)
    work = folder / "work"
    work.mkdir(parents=True)
    outputs: dict[str, str] = {}
    wrong = []
    for line, why in commands(page):
        if why is not None:
            continue
        status, output = run(line, work, environment)
        outputs.setdefault(line, output)
        if status:
            wrong.append(f"{page.name}: conmoe-edge {line}: exit status {status}\n{output[-2000:]}")
    text = text_of(page)
    for number, code in enumerate(PYTHON.findall(text) if page.python else ()):
        apart = folder / f"python-{number}"
        apart.mkdir()
        status, said, errors = _run(["-c", code], apart, environment)
        if status:
            wrong.append(f"{page.name}: its Python: exit status {status}\n{said}\n{errors[-2000:]}")
    found = BLOCK.findall(text)
    if len(found) != len(page.answers):
        wrong.append(f"{page.name}: {len(found)} printed blocks, {len(page.answers)} are known")
        return wrong
    for block, line in zip(found, page.answers, strict=True):
        try:
            text = text.replace(block, printed_now(block, outputs[line]), 1)
        except ValueError as error:
            wrong.append(f"{page.name}: conmoe-edge {line}: {error}\n{outputs[line][-6000:]}")
    if not check:
        (ROOT / page.name).write_text(text, encoding="utf-8")
    return wrong


def _environment(folder: Path) -> dict[str, str]:
    """Nobody's own settings, and nothing outside ``folder`` is written but the compiled operator."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("CONMOE_") and k != "COLUMNS"}
    kinds = ("CACHE", "CONFIG", "DATA", "STATE")
    ours = {f"CONMOE_{kind}_DIR": str(folder / kind.lower()) for kind in kinds}
    paths = os.pathsep.join([str(ROOT), *filter(None, [own.get("PYTHONPATH")])])
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    return {**own, **ours, **hub, "PYTHONPATH": paths, "PYTHONUTF8": "1"}


def main(arguments: Sequence[str]) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Print again what documents print.")
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=", ".join(BY_NAME))
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where one differs")
    parser.add_argument("--list", action="store_true", help="run nothing; show the commands")
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.pages if name not in BY_NAME]
    if unknown:
        parser.error(f"there is no page {unknown[0]}; there are {', '.join(BY_NAME)}")
    wrong: list[str] = []
    for page in [BY_NAME[name] for name in asked.pages] or PAGES:
        if asked.list:
            for line, why in commands(page):
                print(f"{page.name}: {line}" + ("" if why is None else f"    (not run: {why})"))
            continue
        with tempfile.TemporaryDirectory() as folder:
            wrong += walk(page, Path(folder), asked.check)
    for one in wrong:
        sys.stderr.write(f"{one}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
