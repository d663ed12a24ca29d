"""The model card of a package: what the hub shows of it, made from the manifest alone.

The first lines are the hub's own metadata in YAML (https://huggingface.co/docs/hub/model-cards). Pure: reads no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.extras import ELSEWHERE
from conmoe_edge.report.match_rows import MATCH_HEADERS, MATCH_LEAD, match_rows
from conmoe_edge.units import human_size

_WORD = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
_COLUMNS = (
    ("loss_original", "loss before", ".3f"),
    ("loss_consolidated", "after", ".3f"),
    ("perplexity_ratio", "perplexity", "×.3f"),
    ("kl", "KL", ".4f"),
    ("top1_agreement", "same top token", "%"),
)


def source_licence(card: str) -> dict[str, str]:
    """``license``, and ``license_name`` where it has one, of the original's model card; empty where it says none."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (
        Exception
    ):  # a stranger's YAML: what a library says to it is of no account, and the field is left out
        return {}
    found = {key: data.get(key) for key in ("license", "license_name")}
    return {key: one for key, one in found.items() if isinstance(one, str) and _WORD.fullmatch(one)}


def model_card(
    manifest: Manifest, hub_id: str, origin: str | None, licence: Mapping[str, str]
) -> str:
    """The whole ``README.md``; ``origin`` is the original's id on the hub, ``licence`` as of ``source_licence``."""
    from huggingface_hub import ModelCardData

    facts: dict[str, Any] = {
        "library_name": "conmoe-edge",
        "pipeline_tag": "text-generation",
        "tags": ["conmoe-edge", "mixture-of-experts", "moe"],
        **licence,
    }
    if origin is not None:
        facts["base_model"] = origin
    front = ModelCardData(**facts).to_yaml()
    title = hub_id.partition("/")[2]
    made = (
        f"[{origin}](https://huggingface.co/{origin})" if origin else "a model of its maker's own"
    )
    lines = [
        *("---", front.strip(), "---", "", f"# {title}", ""),
        f"{made[0].upper()}{made[1:]}, fitted into less memory by conmoe-edge {manifest.tool_version}.".rstrip(),
        *("", "## What was done", "", *_plan(manifest)),
        *("", "## What it cost in quality", "", *_receipt(manifest.receipt)),
        *("", "## How to run it", "", "```bash", ELSEWHERE),
        *(f"conmoe-edge pull {hub_id}", f"conmoe-edge chat ./{title}", "```", ""),
    ]
    return "\n".join(lines)


def _plan(manifest: Manifest) -> list[str]:
    slots = [slot for row in manifest.slots.values() for slot in row]
    rows = [
        ("Method", manifest.method),
        ("Routed experts before", f"{len(slots):,}"),
        ("Prototypes kept", f"{len(manifest.prototypes):,}"),
        ("Number format of prototypes", manifest.precision),
        ("Number format of the rest", manifest.dense_precision),
        ("Keys and values", manifest.kv_precision),
        ("Layers that share prototypes", f"{manifest.scope:,}"),
        ("Size on disk", human_size(sum(one["size"] for one in manifest.files.values()))),
    ]
    budget = manifest.plan.get("budget")
    planned = budget.get("device_bytes") if isinstance(budget, dict) else None
    if isinstance(planned, int) and not isinstance(planned, bool):
        rows.append(("Planned for", f"{human_size(planned)} of device memory"))
    notes = [f"- {_plain(note)}" for note in manifest.notes]
    return [*_table(("", ""), rows), *([""] if notes else []), *notes]


def _receipt(receipt: Mapping[str, Any]) -> list[str]:
    if not receipt:
        return ["Nothing was measured."]
    domains = receipt.get("per_domain")
    rows = [("all", receipt)]
    if isinstance(domains, dict):
        rows += [(name, one) for name, one in sorted(domains.items()) if isinstance(one, dict)]
    cells = [
        (name, *(_figure(one.get(key), form) for key, _, form in _COLUMNS)) for name, one in rows
    ]
    return [
        "The package against the original, on text that calibration did not see. Loss in nats a token; KL is how far",
        "the distribution of the next token is from the original's.",
        "",
        *_table(("text", *(title for _, title, _ in _COLUMNS)), cells),
        *_exact(receipt),
    ]


def _exact(receipt: Mapping[str, Any]) -> list[str]:
    """What greedy decoding writes; nothing where a receipt has no counts of it."""
    rows = match_rows(receipt)
    if not rows:
        return []
    return ["", MATCH_LEAD, "", *_table(MATCH_HEADERS, rows)]


def _figure(value: object, form: str) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return ""
    if form == "%":
        return f"{100 * value:.1f} %"
    return f"{form[: form.index('.')]}{value:{form[form.index('.') :]}}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *(tuple(_plain(cell) for cell in row) for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _plain(text: str) -> str:
    """A manifest's words as words, in a table and outside: no markup, one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))
