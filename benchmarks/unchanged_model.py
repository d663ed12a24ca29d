"""What the operator brings to a model that fits as it is: its experts computed where transformers has loaded them.

    python -m benchmarks.unchanged_model                # the demo model, and two layers of OLMoE-1B-7B's shape
    python -m benchmarks.unchanged_model olmoe --prompt 512 --tokens 64 --rounds 5

The same model three times, in turns: unchanged by the operator, unchanged by transformers' experts functions (dense
products, norms and attention are the operator's there as well), and as a package of records in the source's precision.
A round is a prompt and greedy tokens behind it. Printed are the medians of the rounds: tokens a second of prompt and
answers, by the clock and by the processor's time (all threads), which other work on the machine disturbs less, and
whether scores and tokens are those of the package of records. Peak memory: the model three times; 5 GB for the second.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig

from conmoe_edge.compat import cache_argument, cache_of
from conmoe_edge.integrations import attach
from conmoe_edge.integrations.load import load_package
from tests.hand_packages import identity, write_package, write_unchanged

DEMO = Path(__file__).resolve().parents[1] / "conmoe_edge" / "data" / "demo"
LAYERS, VOCAB, CONTEXT = 2, 50304, 1024


@dataclass(frozen=True, slots=True)
class Round:
    """A prompt and an answer: seconds and processor seconds of each, the scores behind the prompt, the tokens."""

    prompt: tuple[float, float]
    answer: tuple[float, float]
    scores: Tensor
    tokens: list[int]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", default=["demo", "olmoe"], choices=["demo", "olmoe"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of the answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("tokens a second by the clock (by the processor's time)")
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            plain = demo(dtype) if name == "demo" else olmoe(dtype)
            ways = loaded(plain, Path(folder))
            del plain
            found = measure(ways, given.prompt, given.tokens, given.rounds)
            report(name, ways, found, given.prompt, given.tokens)
            for model in ways.values():
                model.conmoe.close()


def demo(dtype: torch.dtype) -> Any:
    """The demo model."""
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype)


def olmoe(dtype: torch.dtype) -> Any:
    """Few layers of OLMoE-1B-7B's shape, random; the vocabulary has its true share."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        num_hidden_layers=LAYERS, vocab_size=VOCAB * LAYERS // 16, eos_token_id=None
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 1.0 if "embed" in name else 0.02)
    return model


@contextmanager
def transformers_experts() -> Iterator[None]:
    """Models that are loaded here keep transformers' experts functions."""
    with patch.object(attach, "take_loaded_experts", lambda *_: None):
        yield


def loaded(plain: Any, folder: Path) -> dict[str, Any]:
    """The three ways of ``plain``."""
    unchanged = write_unchanged(plain.eval(), folder / "unchanged")
    records = write_package(plain, folder / "records", identity(plain))
    ways = {"unchanged, operator": load_package(unchanged, device="cpu", context=CONTEXT)}
    with transformers_experts():
        ways["unchanged, transformers"] = load_package(unchanged, device="cpu", context=CONTEXT)
    ways["records"] = load_package(records, device="cpu", context=CONTEXT)
    return ways


def measure(ways: dict[str, Any], prompt: int, tokens: int, rounds: int) -> dict[str, list[Round]]:
    """All ways in turns; the first round, which touches every weight, does not count."""
    found: dict[str, list[Round]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, model in ways.items():
            one = answered(model, prompt, tokens)
            if number:
                found[way].append(one)
    return found


def answered(model: Any, prompt: int, tokens: int) -> Round:
    """A prompt and greedy tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), generator=generator)
    with torch.inference_mode():
        start = clocks()
        out = model(ids, use_cache=True, logits_to_keep=1)
        behind = clocks()
        cache, made = cache_of(out), [int(out.logits[0, -1].argmax())]
        for _ in range(tokens):
            step = model(torch.tensor([[made[-1]]]), **cache_argument(model, cache))
            made.append(int(step.logits[0, -1].argmax()))
        end = clocks()
    first = behind[0] - start[0], behind[1] - start[1]
    return Round(first, (end[0] - behind[0], end[1] - behind[1]), out.logits[0, -1].clone(), made)


def clocks() -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    return time.perf_counter(), time.process_time()


def report(
    name: str, ways: dict[str, Any], found: dict[str, list[Round]], prompt: int, tokens: int
) -> None:
    """The table of one model."""
    wanted = found["records"][-1]
    print(f"\n{name}, {prompt} tokens of prompt, {tokens} of answer")
    print(f"{'':24} {'prompt':>18} {'answer':>18}  as records")
    for way, rounds in found.items():
        rates = [
            [
                count / statistics.median(getattr(one, part)[clock] for one in rounds)
                for clock in (0, 1)
            ]
            for part, count in (("prompt", prompt), ("answer", tokens))
        ]
        cells = [f"{by_clock:8.1f} ({by_processor:7.1f})" for by_clock, by_processor in rates]
        last = rounds[-1]
        same = torch.equal(last.scores, wanted.scores) and last.tokens == wanted.tokens
        print(f"{way:24} {cells[0]:>18} {cells[1]:>18}  {'to the bit' if same else 'other bits'}")
    for way, model in ways.items():
        print(f"{way}: {model.conmoe.fast_path.summary}", flush=True)


if __name__ == "__main__":
    main()
