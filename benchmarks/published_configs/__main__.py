"""The command: runs every configuration, prints the table, writes JSON and ``docs/models.md``."""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from benchmarks.published_configs.collection import collection
from benchmarks.published_configs.table import markdown
from benchmarks.published_configs.trial import trial

_DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published_configs", description=__doc__
    )
    parser.add_argument("--work", type=Path, required=True, help="keeps the result of every model")
    parser.add_argument("--only", nargs="*", help="models whose name has one of these words in it")
    parser.add_argument("--no-small", action="store_true", help="plan at full size only")
    parser.add_argument("--docs", action="store_true", help=f"write {_DOCS.name}")
    args = parser.parse_args()
    results = []
    for one in collection():
        if args.only and not any(word.lower() in one.name.lower() for word in args.only):
            continue
        started = time.monotonic()
        result = trial(one, args.work / one.slug, small=not args.no_small)
        results.append(result)
        print(one.name, json.dumps(result["full"]), flush=True)
        for stage, outcome in result["small"].items():
            if not outcome["ok"] or stage in ("logits", "small"):
                print("   ", stage, json.dumps(outcome), flush=True)
        print(f"    {time.monotonic() - started:.0f} s", flush=True)
    (args.work / "results.json").write_text(json.dumps(results, indent=1))
    if args.docs:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        today = datetime.now(UTC).date().isoformat()
        _DOCS.write_text(markdown(results, today, versions))


if __name__ == "__main__":
    main()
