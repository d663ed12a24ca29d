"""Shows that a change leaves fits as they were, byte for byte: makes small packages of every method, and compares them.

    python tools/fit_reference.py make DIR          # with the code before the change, then with the code after it
    python tools/fit_reference.py compare DIR DIR

Compared are the checksums of all files and every field of ``conmoe.json``, but for the plan and the gain of reading
ahead, which depend on measured speeds. Fits are deterministic on one machine; another processor may round sums in
another way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CASES: dict[str, tuple[str, ...]] = {
    "plan": (),
    "auto": ("--rate", "40%"),
    "auto-free": ("--rate", "40%", "--precision", "int4"),
    "auto-equal": ("--rate", "40%", "--widths", "equal", "--precision", "int4"),
    "auto-mixed": ("--rate", "40%", "--precision", "int8+int4", "--dense-precision", "int8"),
    "conmoe": ("--method", "conmoe", "--rate", "50%"),
    "conmoe-scope2": ("--method", "conmoe", "--rate", "50%", "--scope", "2"),
    "conmoe-mixed": ("--method", "conmoe", "--rate", "30%", "--precision", "bf16+int8"),
    "reap": ("--method", "reap", "--rate", "50%"),
    "reap-drop-scope3": ("--method", "reap+drop", "--rate", "50%", "--scope", "3"),
    "mone-scope2": ("--method", "mone", "--rate", "50%", "--scope", "2", "--precision", "int4"),
    "hc-smoe-scope2": ("--method", "hc-smoe", "--rate", "50%", "--scope", "2"),
    "m-smoe": ("--method", "m-smoe", "--rate", "50%"),
    "mc-smoe": ("--method", "mc-smoe", "--rate", "50%"),
    "mergemoe": ("--method", "mergemoe", "--rate", "50%"),
    "no-removal": ("--method", "conmoe", "--rate", "0%", "--precision", "int8"),
}


def make(out: Path) -> None:
    """One package for every case, into ``out``; those that are there already are kept."""
    out.mkdir(parents=True, exist_ok=True)
    program = (sys.executable, "-m", "conmoe_edge.cli.main", "fit", "demo", "--yes", "--offline")
    common = ("--gpu", "562MB", "--device", "cpu", "--calibration-tokens", "4096")
    with tempfile.TemporaryDirectory() as cache:
        for name, options in CASES.items():
            if (out / name).is_dir():
                continue
            print(name, flush=True)
            subprocess.run(
                [*program, *common, *options, "--out", str(out / name)],
                env=os.environ | {"CONMOE_CACHE_DIR": cache},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=True,
            )


def differences(one: Path, other: Path) -> list[str]:
    """The fields of two manifests that are not the same, files by name."""
    before, after = (_manifest(folder) for folder in (one, other))
    names = sorted({*before, *after} - {"files", "plan"})
    found = [name for name in names if before.get(name) != after.get(name)]
    files = [before["files"], after["files"]]
    found += [
        name for name in sorted({*files[0], *files[1]}) if files[0].get(name) != files[1].get(name)
    ]
    return found


def _manifest(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "conmoe.json").read_text())
    (found.get("prefetch") or {}).pop("gain", None)
    return found


def compare(one: Path, other: Path) -> int:
    """Print case by case what differs; 1 where anything does, or where nothing could be compared."""
    cases = sorted(path.name for path in one.iterdir() if (path / "conmoe.json").is_file())
    bad = 0 if cases else 1
    for name in cases:
        there = (other / name / "conmoe.json").is_file()
        found = differences(one / name, other / name) if there else ["not made"]
        print(f"{name:<18} {'same' if not found else 'DIFFERS: ' + ', '.join(found)}")
        bad |= bool(found)
    return bad


def main(words: list[str]) -> int:
    """Command line."""
    if len(words) == 2 and words[0] == "make":
        make(Path(words[1]))
        return 0
    if len(words) == 3 and words[0] == "compare":
        return compare(Path(words[1]), Path(words[2]))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
