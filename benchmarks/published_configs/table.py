"""``docs/models.md`` from the results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_STAGES = {
    "fit 0": "fit",
    "logits": "logits",
    "fit 50 %": "fit 50 %",
    "chat": "chat",
    "eval": "eval",
}
# Where the folder of a trial was is no part of what is said.
_FOLDER = re.compile(r"\S*/(full|small/source)\b")
_HEAD = """# Models

What this project does with the published configurations of {count} Mixture-of-Experts models. Made by

    python -m benchmarks.published_configs --work DIR --docs

on {date} with transformers {transformers} and torch {torch}. No weights were downloaded.

**Full size**: the model is built by transformers on the meta device from its published configuration; the names and
shapes of its tensors, as its class stores them, go into sparse files (FP8 and MXFP4 where the configuration declares
that), and `plan` looks at them, for three fifths of their bytes. Layers that predict further tokens are left out.
Under *s* stand the seconds of the processor that `plan` took, on a machine that was busy with other work.

**Small**: the same configuration with few layers (every kind of layer stays), narrow, with few experts and random
weights in fp32: `fit` at rate 0, whose logits are compared with transformers' own; `fit` at 50 %, `chat` (a greedy
answer) and `eval`. Models whose small configurations are the same share a run; where the column is empty there was no
run. A model that is refused is refused by `plan`, before anything is fetched; the reason is that of the refusal.

Where each configuration comes from is in its file in `benchmarks/published_configs/configs/`. Some are the defaults of
transformers' own class, which names the model.

"""


def markdown(results: Sequence[Mapping[str, Any]], date: str, versions: Mapping[str, str]) -> str:
    """The page."""
    works = [one for one in results if one["full"]["ok"]]
    refused = [one for one in results if not one["full"]["ok"]]
    lines = [_HEAD.format(count=len(results), date=date, **versions)]
    lines += [f"## Works ({len(works)})\n"]
    lines += ["| model | `model_type` | GB | form | tensors | s | plan | small |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for one in works:
        full = one["full"]
        lines.append(
            f"| {one['name']} | {one['model_type']} | {full['bytes'] / 1e9:.1f} | {full['form']} "
            f"| {full['tensors']:,} | {full['cpu_seconds']} | {full['verdict']} | {_small(one['small'])} |"
        )
    lines += [
        "",
        f"## Refused ({len(refused)})\n",
        "| model | `model_type` | says | why |",
        "|---|---|---|---|",
    ]
    for one in refused:
        full = one["full"]
        what = full.get("crash") or full["what"]
        what = _FOLDER.sub("the model", what)
        lines.append(f"| {one['name']} | {one['model_type']} | {what} | {full.get('why', '')} |")
    return "\n".join(lines) + "\n"


def _small(stages: Mapping[str, Any]) -> str:
    if not stages:
        return ""
    bad = next((name for name, outcome in stages.items() if not outcome["ok"]), None)
    if bad is not None:
        outcome = stages[bad]
        said = (
            outcome.get("crash") or outcome.get("what") or f"difference {outcome.get('difference')}"
        )
        return f"{_STAGES.get(bad, bad)}: {' '.join(str(said).split())[:160]}"
    difference = stages["logits"]["difference"]
    same = "the same logits" if difference == 0 else f"logits within {difference:.0e}"
    return f"{stages['small']['layers']} layers: {same}; fit 50 %, chat, eval"
