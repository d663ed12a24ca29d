"""Small packages of this version with the tokens that they give, for later versions to open.

    python -m tools.reference_packages DIR

writes one package a case and ``tokens.json``: for each a prompt, its greedy continuation, and the least margin between
the likeliest and the second likeliest token on the way, in standard deviations of the scores. Among many prompts the
one with the widest margin is taken, so that processors that round differently still agree on every token.
``tests/test_older_packages.py`` opens what an older version has written. Peak memory: a few hundred MB.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from conmoe_edge.compat import cache_argument, cache_of

PROMPT, TOKENS, TRIED = 6, 32, 96
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 16,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
}
TEXT = "the quick brown fox jumps over the lazy dog 0123456789 " * 60


@dataclass(frozen=True, slots=True)
class Case:
    """A tiny model of ``family`` with other sizes than usual, and what ``fit`` is told."""

    family: str
    dtype: torch.dtype
    fit: dict[str, Any]
    sizes: dict[str, Any] = field(default_factory=dict)


CASES = {
    "olmoe-auto-bf16": Case("olmoe", torch.bfloat16, {"rate": 0.5}, {"intermediate_size": 64}),
    "qwen3-conmoe-scope2-int4": Case(
        "qwen3_moe",
        torch.bfloat16,
        {"rate": 0.5, "method": "conmoe", "scope": 2, "precision": "int4"},
        {"mlp_only_layers": []},
    ),
    "mixtral-mone-int8-dense-int8": Case(
        "mixtral",
        torch.bfloat16,
        {"rate": 0.5, "method": "mone", "precision": "int8", "dense_precision": "int8"},
        {"intermediate_size": 64},
    ),
    "deepseek-v3-reap-fp32": Case(
        "deepseek_v3",
        torch.float32,
        {"rate": 0.25, "method": "reap"},
        {"num_hidden_layers": 3, "head_dim": None},
    ),
    "olmoe-mc-smoe": Case(
        "olmoe", torch.bfloat16, {"rate": 0.5, "method": "mc-smoe"}, {"intermediate_size": 64}
    ),
}


def greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], float]:
    """``count`` greedy tokens after ``prompt``, and the least margin on the way."""
    tokens, margin = list(prompt), float("inf")
    step, cache = torch.tensor([prompt]), None
    with torch.no_grad():
        for _ in range(count):
            out = model(input_ids=step, **cache_argument(model, cache), use_cache=True)
            cache, scores = cache_of(out), out.logits[0, -1].float()
            best = scores.topk(2).values
            margin = min(margin, float((best[0] - best[1]) / scores.std()))
            tokens.append(int(scores.argmax()))
            step = torch.tensor([tokens[-1:]])
    return tokens[len(prompt) :], margin


def best_prompt(model: Any, vocabulary: int) -> dict[str, Any]:
    """The prompt of ``TRIED`` random ones whose continuation is the most certain."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"margin": -1.0}
    for _ in range(TRIED):
        prompt = torch.randint(5, vocabulary, (PROMPT,), generator=generator).tolist()
        tokens, margin = greedy(model, prompt, TOKENS)
        if margin > found["margin"]:
            found = {"prompt": prompt, "tokens": tokens, "margin": round(margin, 4)}
    return found


def main(folder: Path) -> None:
    """Write every case below ``folder``."""
    import conmoe_edge
    from tests.families import VOCAB, save_tiny, save_tokenizer

    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as place:
        text = Path(place) / "text.txt"
        text.write_text(TEXT, encoding="utf-8")
        for name, case in CASES.items():
            source = Path(place) / name
            save_tiny(case.family, source, dtype=case.dtype, **{**SIZES, **case.sizes})
            save_tokenizer(source)
            conmoe_edge.fit(
                str(source),
                folder / name,
                budget="4GB",
                device="cpu",
                context=128,
                calibration=text,
                calibration_tokens=2048,
                overwrite=True,
                **case.fit,
            )
            model = conmoe_edge.load(folder / name, device="cpu")
            found[name] = best_prompt(model, VOCAB)
            model.conmoe.close()
            print(f"{name}: margin {found[name]['margin']}")
    (folder / "tokens.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
