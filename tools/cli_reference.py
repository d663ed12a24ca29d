"""Writes docs/cli.md from the commands themselves: ``python tools/cli_reference.py``.

``--check`` writes nothing and leaves with 1 where the file differs, so that a test notices drift.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

_HEAD = """# Command line

<!-- Made by tools/cli_reference.py from the commands; change them, then run it again. -->

Results go to stdout, everything else to stderr. `--json` prints exactly one value on stdout, with
`schema_version`; an error is then `{"schema_version": 1, "error": {"type", "what", "why", "fix"}}`.
An error after the value has been printed (a page that cannot be written, a server that dies) is said
on stderr; so is whatever libraries print. A number that JSON cannot write is `null`. Without
`--json` an error is at most three lines on stderr: `error:`, `why:`, `fix:`.

| Exit status | Meaning |
|---|---|
| 0 | done |
| 1 | failure |
| 2 | usage: the request itself is wrong |
| 3 | does not fit; the fix is the smallest change that would |
| 130 | interrupted |

"""

_VARIABLES = (
    (
        ("CONMOE_DEBUG=1",),
        "tracebacks, as with `--debug`",
    ),
    (
        ("CONMOE_CONFIG_DIR",),
        "folder of your own profiles and aliases",
    ),
    (
        ("CONMOE_STATE_DIR",),
        "folder of the chat history",
    ),
    (
        ("CONMOE_CACHE_DIR",),
        "folder of what was measured on this machine",
    ),
    (
        ("CONMOE_DATA_DIR",),
        "folder of the packages that `run` makes",
    ),
    (
        ("CONMOE_API_KEY",),
        "the key that `serve` asks its clients for, as `--api-key`",
    ),
    (
        ("CONMOE_OPERATOR=off",),
        "torch's own kernels instead of the compiled operator: several times slower",
    ),
    (
        ("CONMOE_OPERATOR_LEVEL",),
        "instruction set of the operator, one that this processor has: `avx512-vnni`, "
        "`avx512`, `avx-vnni`, `avx2`, `dotprod`, `neon` or `plain`; the best by default",
    ),
    (
        ("CONMOE_OPERATOR_AWAKE",),
        "microseconds for which a thread of the operator waits awake for its next work, "
        "up to 1000000; 50 by default",
    ),
    (
        ("CONMOE_OPERATOR_SANITIZE=1",),
        "the operator compiled with sanitizers, which have to be loaded before Python: "
        "for its tests (`make test-asan`)",
    ),
    (
        ("CXX",),
        "the C++ compiler of the operator, with its flags; `g++`, `clang++` or `c++` by default",
    ),
    (
        ("OMP_NUM_THREADS",),
        "threads that compute; by default as many as torch takes",
    ),
    (
        ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"),
        "how threads of torch's OpenMP wait; where neither is set, for 2000 turns at the "
        "most (Linux)",
    ),
    (
        ("CUDA_VISIBLE_DEVICES",),
        "which GPU counts: the first that it names; none where it is empty",
    ),
    (
        ("XDG_CACHE_HOME",),
        "folder of the compiled operator, in `conmoe-edge/operator`",
    ),
    (
        ("SHELL",),
        "the shell that `completion` is for, where none is named",
    ),
    (
        ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "ZDOTDIR"),
        "where `completion install` writes",
    ),
    (
        ("WAYLAND_DISPLAY", "DISPLAY"),
        "the display whose clipboard `/copy` in a chat writes to",
    ),
    (
        ("NO_COLOR",),
        "no colours",
    ),
    (
        ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"),
        "how much these libraries say; errors alone by default",
    ),
    (
        ("HF_HOME", "HF_HUB_OFFLINE"),
        "where downloaded models lie; use only those",
    ),
    (
        ("HF_TOKEN", "HF_ENDPOINT"),
        "the key for models that are not open to all; another hub",
    ),
)


def page() -> str:
    """The whole page."""
    from conmoe_edge.cli.main import main

    rows = (
        f"| {', '.join(f'`{one}`' for one in names)} | {meaning} |\n"
        for names, meaning in _VARIABLES
    )
    head = "".join((_HEAD, "| Variable | Meaning |\n|---|---|\n", *rows))
    return head + "".join(_sections(main, "conmoe-edge", None))


def _sections(command: click.Command, path: str, parent: click.Context | None) -> Iterator[str]:
    # The width is fixed: a page must not depend on the terminal of whoever made it.
    context = click.Context(command, info_name=path, parent=None, terminal_width=90)
    context.max_content_width = 90
    if parent is not None:
        context.help_option_names = parent.help_option_names
    else:
        context.help_option_names = ["-h", "--help"]
    text = command.get_help(context)
    body = "\n".join(line.rstrip() for line in text.splitlines())
    yield f"\n## `{path}`\n\n```text\n{body}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                yield from _sections(child, f"{path} {name}", context)


def run(arguments: list[str]) -> int:
    """Write the page, or compare it; the exit status."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python tools/cli_reference.py [--check]\n")
        return 2
    wanted = page()
    if not arguments:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == wanted:
        return 0
    sys.stderr.write("docs/cli.md differs from the commands: run python tools/cli_reference.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
