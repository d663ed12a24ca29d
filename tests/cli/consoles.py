"""``python -m consoles MODEL PACKAGE FOLDER``: the main commands one after the other in this console's encoding."""

from __future__ import annotations

import sys

from conmoe_edge.cli.main import main as program

_HELP = ("run", "plan", "fit", "chat", "serve", "inspect", "doctor", "list", "export", "eval")


def main() -> None:
    """Each has to end with 0, and its help too."""
    model, package, folder = sys.argv[1:]
    plain = ("--gpu", "900MB", "--device", "cpu")
    for words in (
        ("plan", model, *plain),
        ("fit", model, *plain, "--out", f"{folder}/out", "--method", "reap", "--rate", "50%", "--calibration-tokens",
         "512", "--offline", "--yes"),
        ("inspect", package),
        ("inspect", package, "--verify"),
        ("doctor", "--folder", folder),
        ("list",),
        ("profiles", "list"),
        ("models",),
        ("chat", package, "--prompt", "Ärger über café", "--max-tokens", "4"),
        *((one, "--help") for one in _HELP),
    ):  # fmt: skip
        print(f"== {' '.join(words[:2])}".encode("ascii", "replace").decode("ascii"), flush=True)
        try:
            program.main([*words], prog_name="conmoe-edge")
        except SystemExit as end:
            assert end.code in (0, None), (words, end.code)


if __name__ == "__main__":
    main()
