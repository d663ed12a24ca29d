"""What shared steps bring: tokens a second of 1, 4, 8 and 16 answers at once, on OLMoE-1B-7B's shape in 4 bits.

    python -m benchmarks.shared_steps                       # makes its package in a temporary folder, about 1 GB
    python -m benchmarks.shared_steps --folder ./shape --layers 2 --dense int8 --kind q4
    python -m benchmarks.shared_steps --slots 40            # prototypes from the disk

The package has few decoder layers of the true shape with random weights, and a vocabulary that is as much smaller
than the true one as there are fewer layers, so that layers and head have their true shares. In a round each number of
answers has its turn, every answer with a prompt of its own; answers are made as ``serve`` makes them. Printed are the
medians of the rounds: tokens a second over all answers, their ratio to one answer, milliseconds of a step and of the
processor for a token, how many different prototypes a layer computed with for each token that it got, bytes read a
token, and how many answers had the tokens that they have alone. The last column is the ratio that the bytes allow:
those of so many answers one by one, over those that are read together. Peak memory: the layers in bf16 while the
package is written.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.answer import Generation
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.generation.shared_steps import may_share, shared_scores
from tests.hand_packages import identity, write_package

LAYERS, VOCAB, PROMPT, CHUNK, CONTEXT = 16, 50304, 32, 512, 512


@dataclass(frozen=True, slots=True)
class Round:
    """What a number of answers took, and the tokens that they had."""

    seconds: float
    processor: float
    computed: float
    read: float
    tokens: list[list[int]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What shared steps bring.")
    parser.add_argument("--folder", type=Path, help="the package; made where there is none")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--kind", default="q4", help="form of the prototypes")
    parser.add_argument("--dense", default="int8", help="form of the other weights, or plain")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=32, help="of each answer in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slots", type=int, help="cache slots, instead of one for each prototype")
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "shape"
        if not folder.exists():
            make(folder, given.layers, given.kind, given.dense)
        slots = None if given.slots is None else (given.slots,)
        model: Any = load_package(folder, device="cpu", context=CONTEXT, slots=slots)
        stack.callback(model.conmoe.close)
        measure(model, given.clients, given.tokens, given.rounds)


def make(folder: Path, layers: int, kind: Any, dense: Any) -> None:
    """A package of ``layers`` layers with random weights."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        num_hidden_layers=layers, vocab_size=VOCAB * layers // LAYERS // 64 * 64, eos_token_id=None
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 1.0 if "embed" in name else 0.02)
    names = [name for name, one in model.named_parameters() if name.endswith("proj.weight")]
    forms = {} if dense == "plain" else dict.fromkeys([*names, "lm_head.weight"], dense)
    write_package(model, folder, identity(model), kind=kind, in_int8=forms, prefill_chunk=CHUNK)


def measure(model: Any, clients: list[int], tokens: int, rounds: int) -> None:
    """All numbers of ``clients`` in turns."""
    runtime = model.conmoe
    together = may_share(runtime)
    print(
        f"{torch.get_num_threads()} threads, {runtime.stats().kernel}; {runtime.fast_path.summary}"
    )
    if together is None:
        raise SystemExit(f"no shared steps: {runtime.fast_path.apart}")
    draw, vocabulary = Random(0), model.config.vocab_size
    prompts = [[draw.randrange(3, vocabulary) for _ in range(PROMPT)] for _ in range(max(clients))]
    alone = [answered(model, [prompt], tokens).tokens[0] for prompt in prompts]
    found: dict[int, list[Round]] = {count: [] for count in clients}
    for _ in range(rounds):
        for count in clients:
            found[count].append(answered(model, prompts[:count], tokens))
    print(
        "answers  tokens/s   ratio  step ms  cpu ms/token  prototypes/token  MiB/token   same  bound"
    )
    first = None
    record = max(layout.nbytes for layout in runtime.manifest.layouts)
    others = dense_bytes(model)
    for count in clients:
        seconds = statistics.median(one.seconds for one in found[count])
        speed = count * (tokens - 1) / seconds
        first = first or speed / count
        last = found[count][-1]
        processor = statistics.median(one.processor for one in found[count])
        layers, chosen = len(runtime.fast_path.layers), found[clients[0]][-1].computed
        one_by_one = count * (layers * chosen * record + others)
        bound = one_by_one / (layers * last.computed * count * record + others)
        same = sum(one == wanted for one, wanted in zip(last.tokens, alone, strict=False))
        print(
            f"{count:7d} {speed:9.2f} {speed / first:7.2f} {1000 * seconds / (tokens - 1):8.2f} "
            f"{1000 * processor / count / (tokens - 1):13.2f} {last.computed:17.2f} "
            f"{last.read / 2**20:10.2f} {same:3d}/{count:<2d} {bound:6.2f}",
            flush=True,
        )


def dense_bytes(model: Any) -> int:
    """What a token reads of the weights outside the routed experts."""
    table = model.get_input_embeddings()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(
        one.numel() * one.element_size()
        for _, one in tensors
        if one is not table.weight and not one.is_meta
    )


def answered(model: Any, prompts: list[list[int]], tokens: int) -> Round:
    """One answer to each prompt; the time is that of all but the first tokens."""
    together, runtime = may_share(model.conmoe), model.conmoe
    settings = SamplingSettings(temperature=0, max_tokens=tokens)
    answers = [
        Generation(
            *(model, CachedTokens(model, CHUNK), prompt, settings),
            **{"context": CONTEXT, "ends": frozenset()},
        )
        for prompt in prompts
    ]
    for one in answers:
        one.advance()
    runtime.reset_stats()
    start, before = time.perf_counter(), time.process_time()
    while answers[0].finish is None:
        if len(answers) == 1:
            answers[0].advance()
            continue
        assert together is not None
        scores = shared_scores(together, answers)
        assert scores is not None, "every step is shared"
        for one, row in zip(answers, scores, strict=True):
            one.draw(row)
    seconds, processor = time.perf_counter() - start, time.process_time() - before
    stats, made = runtime.stats(), len(answers) * (tokens - 1)
    layers = len(runtime.fast_path.layers)
    return Round(
        seconds,
        processor,
        (stats.hits + stats.misses) / made / layers,
        stats.bytes_read / made,
        [one.tokens[PROMPT:] for one in answers],
    )


if __name__ == "__main__":
    main()
