"""``conmoe-edge chat DIR``: talk to a package inside its budget, or ask it once."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conmoe_edge.api.slow_line import slow_line
from conmoe_edge.cli.chat_loop.make_room import ON_FULL, OnFull
from conmoe_edge.cli.chat_loop.silent_keys import silent_keys
from conmoe_edge.cli.ui.cli_options import (
    Tokens,
    cache_policy_option,
    common_options,
    kv_precision_option,
    misses_option,
    package_budget_option,
    prompt_cache_options,
    run_device_option,
    special_tokens_option,
    template_option,
)
from conmoe_edge.errors import PackageError, UsageError

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output
    from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
    from conmoe_edge.offload.generation.session import ChatSession


OF_THE_DEMO = "This is the demo model: twelve million parameters. It speaks, it knows nothing."


@click.command(short_help="Talk to a package that fit wrote, inside its budget.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@package_budget_option
@click.option("--prompt", "-p", metavar="TEXT", help="Answer this once and leave.")
@click.option(
    "--system", metavar="TEXT", default="", help="System text that stands before the conversation."
)
@click.option("--max-tokens", metavar="N", type=Tokens(), help="Longest answer, in tokens.")
@click.option(
    "--temperature",
    metavar="T",
    type=click.FloatRange(0, 10),
    help="0 is greedy; more is more varied.",
)
@click.option(
    "--top-p",
    metavar="P",
    type=click.FloatRange(0, 1, min_open=True),
    help="Draw from this share of the likelihood.",
)
@click.option(
    "--top-k",
    metavar="K",
    type=click.IntRange(0),
    help="Draw from so many of the likeliest tokens; 0 for all.",
)
@click.option(
    "--stop",
    metavar="TEXT",
    multiple=True,
    help="End the answer before this text; may be given again.",
)
@click.option("--seed", metavar="N", type=click.IntRange(0), help="Same seed, same answer.")
@click.option(
    "--context",
    metavar="N",
    type=Tokens(),
    help="Tokens of conversation to keep room for, 4096 or 32k.",
)
@run_device_option
@kv_precision_option
@cache_policy_option
@misses_option
@special_tokens_option
@template_option
@prompt_cache_options
@click.option(
    "--json-schema",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Answer with JSON of the schema in FILE, and nothing else.",
)
@click.option(
    "--on-full",
    type=click.Choice(ON_FULL),
    default="drop",
    show_default=True,
    help="When the context is full: drop the oldest turns, and say so, or stop.",
)
@click.option(
    "--no-markdown",
    is_flag=True,
    help="Leave answers as they came; do not render them when they end.",
)
@click.option("--no-history", is_flag=True, help="Keep what you type out of the history file.")
@common_options
def chat(
    folder: Path,
    gpu: str | None,
    prompt: str | None,
    system: str,
    context: int | None,
    device: str,
    kv_precision: str | None,
    cache_policy: str | None,
    misses: str,
    allow_special_tokens: bool,
    template: str | None,
    prompt_cache: Path | None,
    prompt_cache_size: int,
    on_full: OnFull,
    no_markdown: bool,
    no_history: bool,
    json_schema: Path | None,
    output: Output,
    **sampling: Any,
) -> None:
    """Talk to the package in DIR.

    On a terminal this is a conversation: Enter sends, Alt-Enter starts a new line, Ctrl-C stops an
    answer, /help lists the commands. With --prompt, or with text on standard input, it answers
    once: the answer goes to stdout, the numbers to stderr.

    \b
    Examples:
      conmoe-edge chat ./out
      conmoe-edge chat ./out --gpu 4GB --prompt "Name three rivers." --max-tokens 100
      cat letter.txt | conmoe-edge chat ./out --system "Answer in one sentence." --json
    """
    from conmoe_edge.cli.ui.text import path_text
    from conmoe_edge.offload.generation.sampling_settings import SamplingSettings

    check_package(folder)
    question = prompt if prompt is not None else _piped()
    if question is None and output.as_json:
        raise UsageError(
            "--json answers once and needs a question.",
            "",
            "--prompt TEXT, or text on standard input",
        )
    if question is not None and not question.strip():
        raise UsageError("The question is empty.", "", "--prompt TEXT, or text on standard input")
    drawn = SamplingSettings(**sampling)
    schema = None if json_schema is None else _read_schema(json_schema)
    output.note(f"Loading {path_text(folder)} ...")
    with silent_keys() if question is None else nullcontext():
        from conmoe_edge.api.running import open_session
        from conmoe_edge.memory.garbage import settle

        where = None if device == "auto" else device
        session = open_session(
            folder,
            gpu,
            where,
            context,
            cache_policy,
            misses,
            allow_special_tokens=allow_special_tokens,
            template=template,
            kv_precision=kv_precision,
            prompt_cache=prompt_cache,
            prompt_cache_bytes=prompt_cache_size,
            tell=output.warning,
        )
        settle()
    if slow := slow_line(str(session.runtime.device)):
        output.warning(slow)
    if schema is not None:
        drawn = replace(drawn, grammar=session.json_grammar(schema))
    if output.stdout_is_terminal:
        session.on_reasoning = lambda text: _show_reasoning(output, text)
    if question is None:
        looks = {"on_full": on_full, "markdown": not no_markdown}
        _converse(session, folder, system, drawn, output, keep_history=not no_history, **looks)
    else:
        _answer_once(session, question, system, drawn, output)


def check_package(folder: Path) -> None:
    """Say what is wrong with the folder before torch is loaded for it."""
    from conmoe_edge.checkpoint.fs.contained import is_there

    if is_there(folder, "conmoe.json"):
        return  # whatever it is, from here on it must be a sound package
    if not folder.exists():
        raise PackageError(f"There is no folder {folder}.", *_way_to(str(folder)))
    if (folder / "config.json").is_file():
        raise PackageError(
            f"{folder} is a model, but no package of conmoe-edge.",
            "it has no conmoe.json",
            f"conmoe-edge fit {folder} --out {folder.name or 'model'}-fit",
        )
    raise PackageError(
        f"{folder} is no package of conmoe-edge.",
        "it has no conmoe.json",
        "conmoe-edge fit MODEL --out DIR writes one",
    )


def _read_schema(path: Path) -> Any:
    """The JSON value in a file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"The schema in {path} cannot be read.",
            getattr(error, "strerror", None) or str(error),
            "a file with a JSON schema, as text in UTF-8",
        ) from error


def _show_reasoning(output: Output, text: str | None) -> None:
    """Reasoning stands dimmed before the answer; ``None`` ends it."""
    from conmoe_edge.cli.ui.text import without_controls

    output.stream("\n\n" if text is None else f"\x1b[2m{without_controls(text)}\x1b[22m")


def _way_to(name: str) -> tuple[str, str]:
    """Why a folder is not there, and what helps: it may be the name of a model."""
    from conmoe_edge.checkpoint.sources.model_names import aliases, is_hub_id

    on_hub = is_hub_id(name) and not Path(name).parent.exists()
    if name.lower() in aliases() or on_hub:
        return (
            f"{name} is a model, which is fitted into a package first",
            f"conmoe-edge run {name} does both; or conmoe-edge fit {name} --out DIR, then chat DIR",
        )
    return "", f"conmoe-edge fit MODEL --out {name}"


def _piped() -> str | None:
    """What stands on standard input; ``None`` where that is a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    from conmoe_edge.checkpoint.fs.utf8_text import decode_utf8

    raw = sys.stdin.buffer.read()  # whatever the locale says: it would let other bytes through
    try:
        return decode_utf8(raw).replace("\r\n", "\n")
    except ValueError as error:
        raise UsageError(
            "Standard input is no UTF-8 text.",
            str(error),
            "send it as UTF-8: iconv -f latin1 -t utf-8 FILE | conmoe-edge chat DIR",
        ) from error


def _converse(
    session: ChatSession,
    folder: Path,
    system: str,
    sampling: SamplingSettings,
    output: Output,
    *,
    keep_history: bool,
    **looks: Any,
) -> None:
    from conmoe_edge.cli.chat_loop.chat_stats import loaded_line, read_stats
    from conmoe_edge.cli.chat_loop.conversation import Conversation
    from conmoe_edge.cli.chat_loop.prompt_input import Reader, open_history
    from conmoe_edge.cli.chat_loop.repl import COMMANDS, WELCOME, Repl

    history, problem = open_history(keep_history)
    if problem:
        output.warning(problem)
    output.note(loaded_line(read_stats(session)))
    if session.runtime.manifest.source.get("name") == "demo":
        output.note(OF_THE_DEMO)
    output.note(WELCOME)
    output.note()
    name = folder.resolve().name
    talk = Conversation(system)
    repl = Repl(session, output, name=name, conversation=talk, sampling=sampling, **looks)
    repl.run(Reader(list(COMMANDS), history))


def _answer_once(
    session: ChatSession, question: str, system: str, sampling: SamplingSettings, output: Output
) -> None:
    from conmoe_edge.cli.chat_loop.chat_stats import footer, read_stats, stats_json
    from conmoe_edge.cli.chat_loop.conversation import Conversation
    from conmoe_edge.cli.chat_loop.turn import run_turn
    from conmoe_edge.cli.ui.error_text import Interrupted
    from conmoe_edge.cli.ui.text import without_controls

    clean = without_controls if output.stdout_is_terminal else str

    def show(piece: str) -> None:
        if not output.as_json:
            output.stream(clean(piece))

    turn = run_turn(session, Conversation(system).asking(question), sampling, show)
    if turn.stopped and output.as_json:
        raise Interrupted("Stopped before the answer was complete.")
    stats = read_stats(session)
    output.value({"reply": turn.text, "stats": stats_json(stats)})
    if not output.as_json:
        output.stream("" if turn.text.endswith("\n") else "\n")
    output.note(footer(stats))
    if turn.full is not None:
        output.warning("The context is full, so the answer ends here; --context N makes room.")
    if turn.stopped:
        raise Interrupted("Stopped before the answer was complete.")
