"""Keys and values in 8 bits beside the model's own format: loss, KL, memory and speed at a long context.

    python -m benchmarks.kv_precision                        # the demo model, all of it in memory
    python -m benchmarks.kv_precision ./out --context 2048 --sequences 16 --rounds 9
    python -m benchmarks.kv_precision ./out --json figures.json

Both are one package that is loaded twice. Loss and KL are over held-out text in sequences of the whole context, each
of which goes through both in the package's chunks. The row "other chunks" is the first setting against itself with
half of the chunk: how far rounding alone goes, which a router near a tie makes a choice of. Speed is that of a chat's
tokens behind a context that is nearly full, the two settings in turns, the median of all rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KINDS = ("source", "int8")
FLOOR = "other chunks"
ROWS = 256
"""Positions that are compared at once."""
PLENTY = "1TiB"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, help="a package that fit wrote")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or _demo(Path(scratch))
        found = measure(folder, given.context, given.sequences, given.rounds, given.tokens)
    print("\n".join(lines(found)))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _demo(scratch: Path) -> Path:
    import conmoe_edge

    conmoe_edge.fit("demo", scratch / "demo", budget=PLENTY, device="cpu")
    return scratch / "demo"


def measure(folder: Path, context: int, sequences: int, rounds: int, tokens: int) -> dict[str, Any]:
    """All figures of the package in ``folder``; losses in nats, bytes, tokens a second."""
    import conmoe_edge

    models = {
        kind: conmoe_edge.load(folder, device="cpu", context=context, kv_precision=kind)
        for kind in KINDS
    }
    ids = _held_out(folder, context, sequences)
    with torch.inference_mode():
        quality = _quality(models, ids)
        speed, memory = _speed_and_memory(folder, models, ids[0], context, rounds, tokens)
    for model in models.values():
        model.conmoe.close()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return {
        "folder": folder.name,
        "context": context,
        "sequences": len(ids),
        "threads": torch.get_num_threads(),
        "quality": quality,
        "memory": memory,
        "tokens_per_second": speed,
        "behind_tokens": context - tokens,
    }


def _held_out(folder: Path, context: int, sequences: int) -> Tensor:
    from conmoe_edge.compress.stream.calibration_text import bundled_text, token_sets
    from conmoe_edge.model.tokenizers import load_tokenizer

    wanted = sequences * context
    _, held_out = token_sets(
        bundled_text(),
        load_tokenizer(folder),
        length=context,
        tokens=context,
        held_out_tokens=wanted,
    )
    return held_out.ids[:sequences]


def _quality(models: dict[str, Any], ids: Tensor) -> dict[str, dict[str, float]]:
    """Mean loss of each setting, and its KL from the first."""
    sums = {name: [0.0, 0.0] for name in (*KINDS, FLOOR)}
    positions = 0
    runtime = models[KINDS[0]].conmoe
    whole = runtime.prefill_chunk
    for row in ids:
        inputs = row[None]
        logits = {kind: models[kind](inputs).logits[0] for kind in KINDS}
        runtime.prefill_chunk = max(1, whole // 2)
        logits[FLOOR] = models[KINDS[0]](inputs).logits[0]
        runtime.prefill_chunk = whole
        for start in range(0, len(row) - 1, ROWS):
            stop = min(start + ROWS, len(row) - 1)
            wanted = row[start + 1 : stop + 1, None]
            first = logits[KINDS[0]][start:stop].float().log_softmax(-1)
            for name, rows in logits.items():
                scores = rows[start:stop].float().log_softmax(-1)
                sums[name][0] -= float(scores.gather(1, wanted).double().sum())
                sums[name][1] += float((first.exp() * (first - scores)).double().sum())
            positions += stop - start
    return {
        name: {"loss": loss / positions, "kl": divergence / positions}
        for name, (loss, divergence) in sums.items()
    }


def _speed_and_memory(
    folder: Path, models: dict[str, Any], row: Tensor, context: int, rounds: int, tokens: int
) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
    from conmoe_edge.compat import cache_of
    from conmoe_edge.model.tokenizers import load_tokenizer
    from conmoe_edge.offload.generation.benchmark import measure as rounds_of
    from conmoe_edge.offload.generation.session import ChatSession

    held = context - tokens
    tokenizer = load_tokenizer(folder)
    prompt = row[:held].tolist()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    memory: dict[str, dict[str, int]] = {}
    sessions = {
        kind: ChatSession(model, tokenizer, context=context) for kind, model in models.items()
    }
    for _ in range(rounds):
        for kind, session in sessions.items():
            (one,) = rounds_of(session, [prompt], tokens - 1)
            found[kind].append(one.decode.tokens_per_second)
    for kind, model in models.items():
        cache = cache_of(model(row[None, :held], use_cache=True, logits_to_keep=1))
        memory[kind] = {
            "planned": model.conmoe.cache_bytes(context),
            "measured": _held_bytes(cache),
        }
    return {kind: statistics.median(speeds) for kind, speeds in found.items()}, memory


def _held_bytes(cache: Any) -> int:
    """Of all memory behind a cache's keys and values, shared memory once."""
    found: dict[int, int] = {}
    for layer in cache.layers:
        for one in (layer.keys, layer.values):
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def lines(found: dict[str, Any]) -> list[str]:
    """The table."""
    quality, memory, speed = found["quality"], found["memory"], found["tokens_per_second"]
    base = quality[KINDS[0]]["loss"]
    out = [
        f"{found['folder']}: {found['sequences']} held-out sequences of {found['context']} tokens, "
        f"{found['threads']} threads; speed behind {found['behind_tokens']} tokens",
        f"{'keys and values':16}{'loss':>9}{'rise':>10}{'KL':>11}{'planned MiB':>13}{'measured':>10}{'tok/s':>8}",
    ]
    for name, one in quality.items():
        row = f"{name:16}{one['loss']:9.4f}{one['loss'] - base:+10.5f}{one['kl']:11.2e}"
        if name in memory:
            planned, measured = memory[name]["planned"] / 2**20, memory[name]["measured"] / 2**20
            row += f"{planned:13.2f}{measured:10.2f}{speed[name]:8.1f}"
        out.append(row)
    return out


if __name__ == "__main__":
    main()
