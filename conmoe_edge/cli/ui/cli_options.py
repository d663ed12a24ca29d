"""Flags that several commands share, and the words they take. Parsing only: what a value means is
the plan's business.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from conmoe_edge.cli.ui.name_completion import complete_budget, complete_method
from conmoe_edge.plan.dense_precision import DENSE_PRECISIONS
from conmoe_edge.plan.gguf_types import FILE_TYPES
from conmoe_edge.plan.kv_precision import KV_PRECISIONS
from conmoe_edge.plan.levers import PRECISIONS
from conmoe_edge.plan.request import DEVICES, PREFERENCES, WIDTHS, PlanRequest
from conmoe_edge.plan.serving import ENGINES, request_for
from conmoe_edge.units import parse_size


@dataclass(frozen=True, slots=True)
class Settings:
    """The flags that all commands have, as a group hands them to its commands."""

    debug: bool = False
    quiet: bool = False
    as_json: bool = False


def debug_wanted(flag: bool) -> bool:
    """The flag, or ``CONMOE_DEBUG`` set to anything but 0."""
    return flag or os.environ.get("CONMOE_DEBUG", "0") not in ("", "0")


class Share(click.ParamType):
    """A share as a person writes it: ``0.25`` or ``25%``. ``below_one`` refuses 1, ``auto`` lets
    that word through.
    """

    name = "share"

    def __init__(self, *, auto: bool = False, below_one: bool = False) -> None:
        self.auto = auto
        self.below_one = below_one

    def convert(self, value: Any, param: Any, ctx: Any) -> float | str:
        """The share as a float, or ``"auto"``."""
        text = str(value).strip()
        if self.auto and text.lower() == "auto":
            return "auto"
        number = self._number(text)
        if number is None or not 0 <= number <= 1 or (self.below_one and number == 1):
            hint = (
                f"say {text}% or 0.{text.zfill(2)}"
                if text.isdigit() and 1 < int(text) < 100
                else ""
            )
            wanted = "a share such as 25% or 0.25" + (", below 1" if self.below_one else "")
            self.fail(
                f"{text!r} is not a share: {hint}." if hint else f"{text!r} is not {wanted}.",
                param,
                ctx,
            )
        return number

    @staticmethod
    def _number(text: str) -> float | None:
        try:
            if text.endswith("%"):
                return float(text[:-1]) / 100
            return float(text)
        except ValueError:
            return None


class CountOrAuto(click.ParamType):
    """A whole number of at least one, or ``auto``."""

    name = "count"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """The number, or ``"auto"``."""
        text = str(value).strip()
        if text.lower() == "auto":
            return "auto"
        if not text.isdigit() or int(text) < 1:
            self.fail(f"{text!r} is neither 'auto' nor a whole number of at least 1.", param, ctx)
        return int(text)


class Tokens(click.ParamType):
    """A number of tokens, with or without thousands: ``4096``, ``4,096``, ``32k`` (32 x 1024)."""

    name = "tokens"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """The number of tokens, at least 1."""
        text = str(value).strip().lower().replace(",", "").replace("_", "")
        digits, factor = (text[:-1], 1024) if text.endswith("k") else (text, 1)
        if not digits.isdigit() or int(digits) < 1:
            self.fail(f"{value!r} is not a number of tokens such as 4096 or 32k.", param, ctx)
        return int(digits) * factor


def tokens_option(flag: str, help: str, default: int | None = None) -> Callable[..., Any]:
    """A flag that takes a number of tokens; without a ``default``, ``help`` says what happens without it."""
    shown = {} if default is None else {"default": default, "show_default": True}
    return click.option(flag, metavar="N", type=Tokens(), help=help, **shown)


def number_option(
    flag: str, help: str, *, least: int, default: int | None = None
) -> Callable[..., Any]:
    """A flag that takes a whole number of at least ``least``; as ``tokens_option``."""
    shown = {} if default is None else {"default": default, "show_default": True}
    return click.option(flag, metavar="N", type=click.IntRange(least), help=help, **shown)


def file_option(flag: str, help: str) -> Callable[..., Any]:
    """A flag that takes the path of a file."""
    kind = click.Path(path_type=Path, dir_okay=False)
    return click.option(flag, metavar="FILE", type=kind, help=help)


package_budget_option = click.option(
    "--gpu",
    metavar="SIZE|PROFILE|auto",
    shell_complete=complete_budget,
    help="Memory to stay within.  [default: what the package was planned for]",
)
"""``--gpu`` of the commands that run a package."""

planned_context_option = tokens_option(
    "--context",
    "Tokens of conversation to keep room for, 4096 or 32k.  [default: the plan's]",
)
"""``--context`` where a plan decides without it."""

run_device_option = click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="auto",
    show_default=True,
    help="Where to compute.",
)
"""``--device`` of the commands that run a package."""
cache_policy_option = click.option(
    "--cache-policy",
    type=click.Choice(["lru", "layer-lru", "lfru", "pins"]),
    help="Who goes when a cache slot is wanted.  [default: best on the calibration]",
)
"""``--cache-policy`` of the commands that answer."""

misses_option = click.option(
    "--misses",
    type=click.Choice(["copy", "auto"]),
    default="copy",
    show_default=True,
    help="With a GPU: copy what is not there, or let the processor compute some of it.",
)
"""``--misses`` of the commands that answer."""

kv_precision_option = click.option(
    "--kv-precision",
    type=click.Choice(KV_PRECISIONS),
    help="Keep keys and values in the model's own format (source) or in 8 bits. Answers depend on it.  [default: what "
    "the package was planned for]",
)
"""``--kv-precision`` of the commands that run a package."""

special_tokens_option = click.option(
    "--allow-special-tokens",
    is_flag=True,
    help="Let <|im_end|> and the like in messages steer the model, not be text.",
)
"""``--allow-special-tokens`` of the commands that answer."""


template_option = click.option(
    "--template",
    metavar="NAME",
    help="Chat template to use, of a model that has several.  [default: the one called default]",
)
"""``--template`` of the commands that answer."""


class Bytes(click.ParamType):
    """A size of memory or disk: ``2GB``, ``500MiB``."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """The bytes."""
        nbytes = parse_size(str(value))
        if nbytes is None:
            self.fail(f"{value!r} is not a size such as 2GB or 500MiB.", param, ctx)
        return nbytes


def prompt_cache_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--prompt-cache`` and ``--prompt-cache-size`` of the commands that answer."""
    folder = click.option(
        "--prompt-cache",
        metavar="DIR",
        type=click.Path(path_type=Path, file_okay=False),
        help="Keep what was computed of prompts in DIR, also for the next start. It says much of what was asked.",
    )
    size = click.option(
        "--prompt-cache-size",
        metavar="SIZE",
        type=Bytes(),
        default="2GB",
        show_default=True,
        help="Most that DIR may take; what was not used for the longest time goes first.",
    )
    return folder(size(function))


def common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--json --quiet --debug`` on a command, handed to it as one ``output``."""

    @click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON value on stdout.")
    @click.option("--quiet", "-q", is_flag=True, help="Nothing on stderr but warnings and errors.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def command(*args: Any, as_json: bool, quiet: bool, debug: bool, **kwargs: Any) -> Any:
        from conmoe_edge.cli.ui.json_stdout import of_this_run
        from conmoe_edge.cli.ui.output import Output, calm_libraries

        context = click.get_current_context()
        settings = context.find_object(Settings) or Settings()
        settings = Settings(
            debug=debug_wanted(debug or settings.debug),
            quiet=quiet or settings.quiet,
            as_json=as_json or settings.as_json,
        )
        context.obj = settings  # a group's words hold for its commands as well
        with of_this_run().alone() if settings.as_json else nullcontext():
            if not settings.debug:
                calm_libraries()
            output = Output(as_json=settings.as_json, quiet=settings.quiet)
            return function(*args, output=output, **kwargs)

    return command


_LEVERS = (
    click.option(
        "--gpu",
        metavar="SIZE|PROFILE|auto",
        shell_complete=complete_budget,
        default="auto",
        show_default=True,
        help="Memory of the target: a size (24GB, 7.5GiB), a profile (rtx-4090, see `profiles "
        "list`), or this machine.",
    ),
    click.option(
        "--rate",
        metavar="auto|R",
        type=Share(auto=True, below_one=True),
        default="auto",
        show_default=True,
        help="Share of the routed experts to remove, 0.25 or 25%; auto takes the least that fits.",
    ),
    click.option(
        "--scope",
        metavar="auto|G",
        type=CountOrAuto(),
        default="auto",
        show_default=True,
        help="How many neighbouring MoE layers share their prototypes.",
    ),
    click.option(
        "--method",
        metavar="NAME",
        shell_complete=complete_method,
        help="How prototypes are chosen. `auto` loses least: it measures, trims and refits them, and takes two to "
        "three times as long. `conmoe` is the paper's, with weights unchanged. `reap`, `man`, `msan`, `ean`, "
        "`seer`, `energy` and `frequency` remove experts and let the router choose among the rest (`reap+drop` "
        "and so on leave the router alone); `mone` puts constants in their place; `m-smoe`, `hc-smoe` and "
        "`mergemoe` merge experts, `mc-smoe` stores the merged ones as low rank and a few columns.  "
        "[default: auto; conmoe with --scope above 1]",
    ),
    click.option(
        "--widths",
        type=click.Choice(WIDTHS),
        default="free",
        show_default=True,
        help="Neurons of the prototypes that `auto` keeps: free gives each as many as it is worth, equal all the "
        "same, for engines that want one tensor.",
    ),
    click.option(
        "--precision",
        type=click.Choice(("auto", *PRECISIONS)),
        default="auto",
        show_default=True,
        help="Number format of the prototypes: source keeps the checkpoint's own, A+B stores in A those that B "
        "hurts most; auto takes fewer bits before it removes experts. mxfp4 is for models that are published in it, "
        "and stay in it; lowrank is what --method mc-smoe writes; free gives each prototype the neurons and bits that "
        "it is worth in the bytes there are.",
    ),
    click.option(
        "--bits",
        metavar="B",
        type=float,
        help="Average bits a weight of the routed experts, 2.6 say; each prototype gets the neurons and bits that "
        "it is worth.",
    ),
    click.option(
        "--dense-precision",
        type=click.Choice(["auto", *DENSE_PRECISIONS]),
        default="auto",
        show_default=True,
        help="Number format of attention, shared experts, embeddings and head: source is the checkpoint's own; auto "
        "takes fewer bits where they keep more of the experts than they cost.",
    ),
    click.option(
        "--kv-precision",
        type=click.Choice(("auto", *KV_PRECISIONS)),
        default="auto",
        show_default=True,
        help="Number format of keys and values in the cache: source is the model's own, int8 takes about half of it; "
        "auto takes it where it keeps more of the experts than it costs.",
    ),
    planned_context_option,
    click.option(
        "--device",
        type=click.Choice(DEVICES),
        default="auto",
        show_default=True,
        help="Where the target computes; auto takes the GPU if there is one.",
    ),
    click.option(
        "--prefer",
        type=click.Choice(PREFERENCES),
        default="quality",
        show_default=True,
        help="quality removes as little as fits; speed removes more, so that more is resident.",
    ),
    click.option(
        "--min-resident",
        metavar="S",
        type=Share(),
        help="Least share of the prototypes that must be in device memory at once, 0.8 or 80%.",
    ),
    click.option(
        "--min-speed",
        metavar="TOK/S",
        type=float,
        help="Tokens a second that the target is expected to make; the mildest setting that does is taken.",
    ),
    click.option(
        "--for",
        "engine",
        type=click.Choice(ENGINES),
        help="Make a package for another engine: vllm keeps every prototype on the device in the "
        "model's own number format, so only experts are removed (docs/cluster.md); hf and gguf keep every expert, all "
        "with as many neurons as fit, so that `export` writes a smaller plain checkpoint (docs/export.md).",
    ),
    click.option(
        "--quantise",
        metavar="TYPE",
        type=click.Choice(tuple(FILE_TYPES), case_sensitive=False),
        help="With --for gguf: the type that the file will have (Q4_K_M, Q8_0, ...); the budget is the file's then.",
    ),
    click.option("--revision", metavar="R", help="Branch, tag or commit of a model on the hub."),
    click.option("--offline", is_flag=True, help="Use only what is on this disk; open no socket."),
    click.option(
        "--keep-vision",
        is_flag=True,
        help="Of a model that takes pictures or sound, put those parts into the package too, for transformers; "
        "chat and serve answer text either way.",
    ),
    click.option(
        "--keep-source",
        is_flag=True,
        help="Download a model from the hub whole and keep it in the hub's cache; without it weights come layer by "
        "layer, and none stays.",
    ),
    click.option(
        "--passes",
        type=click.IntRange(1, 2),
        metavar="1|2",
        help="How often weights are read: 2 measures first what each layer is worth to `auto`, 1 gives every layer "
        "the same.  [default: 2; 1 from the hub]",
    ),
)


def lever_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What ``plan`` and ``fit`` decide by."""
    for option in reversed(_LEVERS):
        function = option(function)
    return function


def plan_request(parameters: dict[str, Any]) -> PlanRequest:
    """What the lever flags among a command's parameters ask for.

    Raises:
        UsageError: a flag does not go with ``--for``.
    """
    names = {field.name for field in fields(PlanRequest)} & parameters.keys()
    request = PlanRequest(budget=parameters["gpu"], **{name: parameters[name] for name in names})
    engine = parameters["engine"]
    return request if engine is None else request_for(engine, request)
