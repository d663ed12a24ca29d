"""What a fit takes of memory beside what the plan counts, moment by moment.

    python -m benchmarks.fit_memory --work /data/fit-memory
    python -m benchmarks.fit_memory --work /data/fit-memory --only qwen3-30b/2x32 -- --method conmoe --precision int4
    python -m benchmarks.fit_memory --work /data/fit-memory --only demo -- --bits 2.6 --passes 2

A cell is ``demo`` or SHAPE[/LAYERS[xEXPERTS]] of ``generated_checkpoint.py``, served by a hub in this process. ``fit``
runs in a process of its own, in which a thread looks every 10 ms at the bytes that belong to no file, and at where the
program is. Printed for each moment of ``plan/fit_memory.py``: planned, measured with the pages of libraries, their
ratio, and where it was most. Words behind ``--`` go to ``fit``. What else the machine does changes nothing of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.fit_from_hub import command_of, serving
from benchmarks.generated_checkpoint import repository
from benchmarks.measure import run_child
from benchmarks.true_shapes import Cell
from conmoe_edge.units import GIB

CELLS = ("demo", "olmoe-7b/2x16", "qwen3-30b/2x32")
_LOOK_SECONDS = 0.01
_MOMENTS = {
    "load_outside": "outside",
    "open_streams": "embed",
    "divergences": "receipt",
    "survey": "survey",
    "load_subset": "load",
    "enter": "run",
    "aim": "run",
    "decide": "decide",
    "propagate": "propagate",
    "_compare": "receipt",
    "run_layer": "run",
}
"""Functions of the program -> the moment that it is in; the first that is running counts."""
_SHOWN = 4


class Most(threading.Thread):
    """The most bytes of no file at each moment of this process, and where its main thread was then."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.found: dict[str, tuple[int, str]] = {}
        self._done = threading.Event()
        self._main = threading.main_thread().ident

    def run(self) -> None:
        """Look until told to stop."""
        while not self._done.wait(_LOOK_SECONDS):
            self._look()

    def stop(self) -> dict[str, tuple[int, str]]:
        """Moment -> bytes and place."""
        self._done.set()
        self.join()
        return self.found

    def _look(self) -> None:
        assert self._main is not None
        frame = sys._current_frames().get(self._main)
        names = list(_names(frame))
        running = {name for _, name in names}
        moment = next((_MOMENTS[one] for one in _MOMENTS if one in running), "other")
        now = _anonymous()
        if now > self.found.get(moment, (0, ""))[0]:
            place = " < ".join(f"{file}:{name}" for file, name in names[:_SHOWN])
            self.found[moment] = (now, place)


def _names(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    """File and function of the program's frames, the innermost first."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "conmoe_edge" in path.parts:
            yield path.stem, frame.f_code.co_name
        frame = frame.f_back


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say what belongs to no file")


def _libraries() -> int:
    """Resident pages of the files of libraries: those that code is run from."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split(None, 1)[0]
        if not first.endswith(":"):
            name = line.split()[5:]
            inside = bool(name) and (".so" in name[0] or "/bin/" in name[0])
        elif inside and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


def inside(notes: Path, words: Sequence[str]) -> None:
    """A command of the program in this process, its most memory into ``notes``."""
    from conmoe_edge.cli.main import main as program

    most = Most()
    most.start()
    try:
        program(list(words))
    finally:
        found = {"most": most.stop(), "libraries": _libraries()}
        notes.write_text(json.dumps(found), encoding="utf-8")


def measured(cell: str, work: Path, gpu: str, words: Sequence[str]) -> dict[str, Any]:
    """The plan's ``fit_memory`` and what was found, of one fit."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    notes, name = work / "most.json", "demo"
    with ExitStack() as stack:
        if cell != "demo":
            name = f"generated/{cell.replace('/', '-')}"
            files = repository(Cell.of(f"{cell}:{gpu}").checkpoint())
            stack.enter_context(serving(name, files, work))
        command = command_of(name, gpu, work / "out", words)
        start = [*command[:1], "-m", "benchmarks.fit_memory", "--inside", str(notes)]
        done = run_child([*start, "--", *command[3:]])
        if done.returncode:
            raise SystemExit(f"fit ended with {done.returncode}\n{done.stdout}")
    found = {
        "cell": cell,
        "words": list(words),
        "planned": json.loads(done.stdout)["fit_memory"],
        **json.loads(notes.read_text(encoding="utf-8")),
        "cpu_seconds": done.cpu_seconds,
    }
    shutil.rmtree(work)
    return found


def lines(found: Mapping[str, Any]) -> list[str]:
    """For a reader."""
    planned, most = found["planned"], found["most"]
    libraries = found["libraries"]
    first = (
        f"{found['cell']} {' '.join(found['words'])} ({found['cpu_seconds']:.0f} CPU seconds; "
        f"GiB, of which {libraries / GIB:.2f} libraries)"
    )
    shown = [first, f"  {'moment':<10}{'planned':>9}{'measured':>10}{'ratio':>7}  most in"]
    for moment in dict.fromkeys((*planned["moments"], *most)):
        wanted, (seen, where) = planned["moments"].get(moment), most.get(moment, (0, "-"))
        seen += libraries if seen else 0
        ratio = "-" if not wanted or not seen else f"{seen / wanted:.2f}"
        said = "-" if wanted is None else f"{wanted / GIB:.2f}"
        shown.append(f"  {moment:<10}{said:>9}{seen / GIB:>10.2f}{ratio:>7}  {where}")
    peak = max(one for one, _ in most.values()) + libraries
    shown.append(
        f"  {'in all':<10}{planned['bytes'] / GIB:>9.2f}{peak / GIB:>10.2f}"
        f"{peak / planned['bytes']:>7.2f}"
    )
    terms = ", ".join(f"{one['name']} {one['nbytes'] / GIB:.2f}" for one in planned["terms"])
    return [*shown, f"  planned in {planned['moment']}: {terms}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", default=CELLS, metavar="CELL")
    parser.add_argument("--gpu", default="8GB")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("words", nargs="*", metavar="-- FLAGS OF FIT")
    given = parser.parse_args()
    if given.inside is not None:
        inside(given.inside, given.words)
        return
    if given.work is None:
        parser.error("--work is needed")
    words = ["--calibration-tokens", str(given.calibration_tokens)]
    for cell in given.only:
        found = measured(
            cell, given.work / "cell", given.gpu, [*words, *(given.words or ["--bits", "2.6"])]
        )
        print("\n".join(lines(found)), flush=True)


if __name__ == "__main__":
    main()
