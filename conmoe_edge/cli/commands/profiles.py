"""``conmoe-edge profiles``: the machines that ``--gpu NAME`` knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from conmoe_edge.cli.ui.cli_options import common_options
from conmoe_edge.cli.ui.lazy import SuggestingGroup
from conmoe_edge.cli.ui.name_completion import complete_profile

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output
    from conmoe_edge.memory.profiles import Profile


@click.group(
    cls=SuggestingGroup,
    invoke_without_command=True,
    short_help="The machines that --gpu NAME knows.",
)
@common_options
@click.pass_context
def profiles(ctx: click.Context, output: Output) -> None:
    """Show the profiles: machines with their memory and bandwidths, for `--gpu NAME`.

    Alone it lists them all.

    A profile of your own is a TOML file in the folder that `profiles list` names.

    \b
    Examples:
      conmoe-edge profiles
      conmoe-edge profiles show rtx-4090
      conmoe-edge plan olmoe --gpu rtx-3060-12gb
    """
    if ctx.invoked_subcommand is None:
        _list(output)


@profiles.command(name="list", short_help="All profiles, a line each.")
@common_options
def list_command(output: Output) -> None:
    """List all profiles, yours among them.

    \b
    Examples:
      conmoe-edge profiles list
      conmoe-edge profiles list --json
    """
    _list(output)


def _list(output: Output) -> None:
    from conmoe_edge.cli.ui.text import path_text
    from conmoe_edge.cli.views.plan_views import table_view
    from conmoe_edge.memory.profiles import list_profiles, user_folder
    from conmoe_edge.units import human_size

    found = list_profiles()
    output.value({"profiles": [_to_json(p) for p in found], "user_folder": str(user_folder())})
    rows = [(p.name, human_size(p.usable), _tier(p), p.title, _origin(p)) for p in found]
    output.result(table_view(("name", "usable", "", "machine", ""), rows, numbers=frozenset({1})))
    output.note()
    output.note(f"Your own go into {path_text(user_folder())} as NAME.toml.")


@profiles.command(short_help="One profile with all its figures.")
@click.argument("name", shell_complete=complete_profile)
@common_options
def show(name: str, output: Output) -> None:
    """Show everything the profile NAME says.

    \b
    Examples:
      conmoe-edge profiles show rtx-4090
      conmoe-edge profiles show cpu-16gb --json
    """
    from conmoe_edge.cli.views.plan_views import table_view
    from conmoe_edge.memory.profiles import get_profile
    from conmoe_edge.units import human_size

    profile = get_profile(name)
    output.value({"profile": _to_json(profile)})
    rows = [
        ("machine", profile.title),
        ("computes on", _tier(profile)),
        ("memory", human_size(profile.memory)),
        ("kept for the system", human_size(profile.reserve)),
        ("usable", human_size(profile.usable)),
        ("memory bandwidth", _speed(profile.memory_bandwidth)),
        ("link bandwidth", _speed(profile.link_bandwidth)),
        ("disk bandwidth", _speed(profile.disk_bandwidth)),
        ("RAM", "unknown" if profile.host_memory is None else human_size(profile.host_memory)),
        ("figures from", profile.source or "not said"),
        ("file", profile.origin),
    ]
    if profile.device == "cpu":
        # There RAM is the memory itself, and the disk is the link.
        rows = [row for row in rows if row[0] not in ("RAM", "link bandwidth")]
    output.result(table_view((profile.name, ""), rows))


def _tier(profile: Profile) -> str:
    return "GPU" if profile.device == "cuda" else "CPU"


def _origin(profile: Profile) -> str:
    return "" if profile.origin == "shipped" else f"yours: {profile.origin}"


def _speed(rate: float | None) -> str:
    return "unknown" if rate is None else f"{rate / 1e9:g} GB/s"


def _to_json(profile: Profile) -> dict[str, Any]:
    """The profile in plain JSON: bytes, and bytes per second."""
    from dataclasses import asdict

    return {**asdict(profile), "usable": profile.usable}
