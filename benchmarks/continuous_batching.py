"""Could transformers' continuous batching serve a package? Three questions, asked of the real thing.

    python -m benchmarks.continuous_batching ./out

Does it run the experts through this project's function on this device; are its greedy tokens those of the same
model answering one question at a time; and what memory does it take beside the budget. It is run with the
attention that it accepts (``sdpa``), with a cache as small as the questions allow, and (``--defaults``) with
the size that it picks itself. docs/serve.md says what follows from it.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from typing import Any

import torch

from benchmarks.serve_throughput import QUESTIONS

PAGE = 256


def alone(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of each prompt by itself."""
    out = []
    for prompt in prompts:
        tokens = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=count)
        out.append(tokens[0, len(prompt) :].tolist())
    return out


def together(model: Any, prompts: list[list[int]], count: int, settings: Any) -> list[list[int]]:
    """Greedy tokens of all of them in one continuous batch."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample, config.max_new_tokens = False, count
    config.temperature = config.top_p = None
    found = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=settings
    )
    return [list(found[name].generated_tokens) for name in sorted(found, key=_number)]


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", help="a package that fit wrote")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--defaults", action="store_true", help="let it size its own cache")
    given = parser.parse_args()
    from transformers import AutoTokenizer, ContinuousBatchingConfig

    import conmoe_edge

    model: Any = conmoe_edge.load(given.folder)
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in QUESTIONS
    ]
    value: dict[str, Any] = {"budget": model.conmoe.stats().memory_budget, "prompts": len(prompts)}
    try:
        together(model, prompts[:1], 1, ContinuousBatchingConfig(num_blocks=1))
        value["as_loaded"] = "runs"
    except ValueError as error:
        value["as_loaded"] = str(error)
    model.set_attn_implementation("sdpa")
    start = time.perf_counter()
    expected = alone(model, prompts, given.tokens)
    value["alone_seconds"] = round(time.perf_counter() - start, 2)
    before = model.conmoe.stats()
    longest = max(map(len, prompts)) + given.tokens
    blocks = len(prompts) * -(-longest // PAGE)
    settings = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=PAGE)
    if given.defaults:
        settings = ContinuousBatchingConfig()
    start = time.perf_counter()
    batched = together(model, prompts, given.tokens, settings)
    value["together_seconds"] = round(time.perf_counter() - start, 2)
    now = model.conmoe.stats()
    value["prototypes_asked_for"] = now.hits + now.misses - before.hits - before.misses
    value["same_answers"] = sum(a == b for a, b in zip(expected, batched, strict=True))
    value["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
