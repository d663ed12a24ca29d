"""``conmoe-edge serve DIR...``: packages behind OpenAI's API, with a page to talk to them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conmoe_edge.api.slow_line import slow_line
from conmoe_edge.cli.commands.chat import check_package
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
from conmoe_edge.errors import ConmoeError, UsageError
from conmoe_edge.extras import install_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conmoe_edge.cli.ui.output import Output
    from conmoe_edge.memory.budget import Budget
    from conmoe_edge.serve.loading import Loading
    from conmoe_edge.serve.settings import Settings

KEY_VARIABLE = "CONMOE_API_KEY"
_LARGEST_KEY_FILE = 4096


@click.command(short_help="Serve packages to OpenAI clients, with a page to talk to it.")
@click.argument(
    "folders", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@package_budget_option
@click.option(
    "--host",
    metavar="ADDRESS",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on.",
)
@click.option(
    "--port",
    metavar="N",
    type=click.IntRange(0, 65535),
    default=8123,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--name", metavar="NAME", help="Name of the model for clients.  [default: DIR's name]"
)
@click.option(
    "--alias",
    metavar="NAME",
    multiple=True,
    help="Another name of the model for clients; of several packages NAME=DIR. May be given several times.",
)
@click.option(
    "--keep-alive",
    metavar="TIME",
    help="How long a package stays in memory after its last answer: 5m, 90s, 0, forever. With one package without "
    "this, it stays.  [default: 5m]",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse fields that are not known, and other models' names, which are else said in a header.",
)
@click.option(
    "--api-key-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help=f"File with the key that clients must show; the variable {KEY_VARIABLE} does the same.",
)
@click.option(
    "--api-key",
    metavar="KEY",
    help="The key itself; others on this machine can read it in the process list.",
)
@click.option(
    "--allow-host",
    metavar="NAME",
    multiple=True,
    help="A name by which this server may be called, besides addresses and localhost.",
)
@click.option(
    "--allow-origin",
    metavar="ORIGIN",
    multiple=True,
    help="A site whose pages may use this server from a browser, https://site.example; * for all.",
)
@click.option(
    "--parallel",
    metavar="N",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Most answers that are made at once.",
)
@click.option(
    "--queue",
    metavar="N",
    type=click.IntRange(0, 10_000),
    default=64,
    show_default=True,
    help="Most requests that wait; more are refused with 429.",
)
@click.option(
    "--max-tokens", metavar="N", type=Tokens(), help="Longest answer that may be asked for."
)
@click.option(
    "--context",
    metavar="N",
    type=Tokens(),
    help="Tokens to keep room for, 4096 or 32k, over all answers that are made at once.",
)
@run_device_option
@kv_precision_option
@cache_policy_option
@misses_option
@special_tokens_option
@template_option
@prompt_cache_options
@common_options
def serve(
    folders: tuple[Path, ...],
    gpu: str | None,
    device: str,
    output: Output,
    **words: Any,
) -> None:
    """Serve the package in each DIR: OpenAI's /v1/chat/completions, /v1/completions, /v1/responses and /v1/models,
    Anthropic's /v1/messages,
    /health, /metrics for Prometheus, and a page at / to talk to it.

    Of several packages each is loaded when it is asked for, into the one budget, and unloaded when it was idle for
    --keep-alive or another one needs its room.

    It listens on this machine only. An address that others can reach needs an API key. Ctrl-C lets
    running answers finish for 10 s.

    \b
    Examples:
      conmoe-edge serve ./out
      conmoe-edge serve ./out --gpu 4GB --port 9000 --context 16k
      conmoe-edge serve ./olmoe ./qwen --gpu 24GB --keep-alive 30m --alias small=olmoe
      CONMOE_API_KEY=... conmoe-edge serve ./out --host 0.0.0.0 --allow-host tower.local
    """
    keep_alive = _keep_alive(words["keep_alive"])
    first, *others = folders
    several = bool(others) or keep_alive is not None
    if others and words["name"]:
        raise UsageError(
            "--name names one package, and there are several.",
            "they have the names of their folders",
            f"--alias {words['name']}={first}",
        )
    settings = _settings(first, words)
    settings.check()
    for folder in folders:
        check_package(folder)
    _need_extra()
    from conmoe_edge.serve.loading import Loading

    word = "auto" if several and gpu is None else gpu
    loading = Loading(
        first,
        budget=None if word is None else _budget(word, device, several=several),
        device=None if device == "auto" else device,
        context=words["context"],
        cache_policy=words["cache_policy"],
        misses=words["misses"],
        template=words["template"],
        kv_precision=words["kv_precision"],
        prompt_cache=words["prompt_cache"],
        prompt_cache_bytes=words["prompt_cache_size"],
    )
    if several:
        _serve_several(folders, settings, loading, keep_alive, output)
    else:
        _serve_one(settings, loading, output)
    output.note("Stopped.")


def _budget(word: str, device: Any, *, several: bool) -> Budget:
    """What ``--gpu word`` means on ``device``. The process in front of several packages does without torch where it
    can, since each of them runs in one of its own; there ``auto`` finds NVIDIA's GPUs alone.
    """
    if several and device in ("auto", "cpu", "cuda"):
        from conmoe_edge.memory.resolve import resolve_budget

        return resolve_budget(word, device)
    from conmoe_edge.model.accelerator import budget_here

    return budget_here(word, device)


def _serve_one(settings: Settings, loading: Loading, output: Output) -> None:
    """In this process, loaded at the start, until it is stopped."""
    output.note("Starting ...")
    from conmoe_edge.memory.heap import one_heap
    from conmoe_edge.serve.package_loader import PackageLoader
    from conmoe_edge.serve.server import Server

    one_heap()
    load = PackageLoader(loading, tell=output.warning).load
    server = Server(settings, load, on_ready=lambda loaded: _ready(server, loaded, output))
    output.note(f"Loading {settings.name}; {server.url}/health says when it is there.")
    server.run()


def _serve_several(
    folders: Sequence[Path],
    settings: Settings,
    loading: Loading,
    keep_alive: float | None,
    output: Output,
) -> None:
    """Each in a process of its own, loaded when it is asked for, until it is stopped."""
    from conmoe_edge.serve.front import FrontServer
    from conmoe_edge.serve.keep_alive import DEFAULT_SECONDS, FOREVER, keep_alive_text
    from conmoe_edge.serve.model_names import aliases_of, names_of
    from conmoe_edge.serve.model_pool import PooledModel

    assert loading.budget is not None, "several have one budget"
    if len(folders) == 1:
        names, aliases = [settings.name], [settings.aliases]
    else:
        names = names_of(folders)
        aliases = aliases_of(names, folders, settings.aliases)
    models = [
        PooledModel(name, folder.resolve(), of_one)
        for name, folder, of_one in zip(names, folders, aliases, strict=True)
    ]
    stays = DEFAULT_SECONDS if keep_alive is None else keep_alive
    server = FrontServer(
        settings,
        models,
        loading,
        loading.budget,
        keep_alive=stays,
        tell=output.note,
        warn=output.warning,
    )
    output.value({"url": server.url, "models": names, "api": f"{server.url}/v1"})
    after = (
        "and stays"
        if stays == FOREVER
        else f"and unloaded {keep_alive_text(stays)} after its last answer"
    )
    output.note(
        f"Serving {', '.join(names)}. Each is loaded when it is asked for, {after}.\n"
        f"Chat: {server.url}/   API: {server.url}/v1   Ctrl-C stops it."
    )
    server.run()


def _keep_alive(given: str | None) -> float | None:
    from conmoe_edge.serve.keep_alive import keep_alive_seconds

    try:
        return None if given is None else keep_alive_seconds(given)
    except ValueError:
        raise UsageError(
            f"--keep-alive {given} is no time.",
            "",
            "--keep-alive 5m, 90s, 1h30m, 0 or forever",
        ) from None


def _ready(server: Any, loaded: Any, output: Output) -> None:
    """Say where it is, once it answers."""
    from conmoe_edge.memory.garbage import settle
    from conmoe_edge.memory.heap import trim_heap

    settle()
    trim_heap()
    url, name = server.url, server.settings.name
    output.value({"url": url, "model": name, "api": f"{url}/v1"})
    if slow := slow_line(str(loaded.model.conmoe.device)):
        output.warning(slow)
    output.note(f"Serving {name}. Chat: {url}/   API: {url}/v1   Ctrl-C stops it.")


def _settings(folder: Path, words: dict[str, Any]) -> Settings:
    from conmoe_edge.serve.settings import Limits, Settings

    return Settings(
        folder=folder,
        host=words["host"],
        port=words["port"],
        name=words["name"] or folder.resolve().name or "model",
        api_key=_api_key(words["api_key"], words["api_key_file"]),
        allowed_hosts=tuple(words["allow_host"]),
        allow_special_tokens=words["allow_special_tokens"],
        aliases=tuple(words["alias"]),
        allowed_origins=tuple(words["allow_origin"]),
        strict=words["strict"],
        limits=Limits(
            max_tokens=words["max_tokens"], queue=words["queue"], parallel=words["parallel"]
        ),
    )


def _api_key(given: str | None, file: Path | None) -> str | None:
    """The key from the flag, the file or the variable; ``None`` for none."""
    if given is not None and file is not None:
        raise UsageError(
            "--api-key and --api-key-file exclude each other.", "", "--api-key-file FILE"
        )
    if file is not None:
        try:
            if file.stat().st_size > _LARGEST_KEY_FILE:
                raise UsageError(f"{file} is too large for a key.", "", "a file with one line")
            return file.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UsageError(
                f"The key in {file} cannot be read.",
                reason,
                "a file with one line of text that you may read",
            ) from error
    return given if given is not None else os.environ.get(KEY_VARIABLE)


def _need_extra() -> None:
    """Say how to get what only the server needs."""
    try:
        import fastapi
        import httpx
        import uvicorn
    except ImportError as error:
        raise ConmoeError(
            "The server needs fastapi, uvicorn and httpx.",
            f"{error.name} is not installed",
            install_command("serve"),
        ) from error
    del fastapi, httpx, uvicorn
