"""What the fast path brings for single tokens, family by family: layers of true width with random weights.

    python -m benchmarks.fast_path                      # every family
    python -m benchmarks.fast_path olmoe gpt_oss --tokens 64 --rounds 5

A model of two layers of each family is written as a package with all its experts and loaded; every expert stays in
memory. Decoding with the fast path and without it take turns: without it every layer takes transformers' steps, with
native products, norms, routers and experts. "Served" is the share of layers that the operator answered for with it. A
round is ``--tokens`` tokens behind a prompt of 64; the medians of the
rounds are printed per layer, with their ratio. Peak memory: two layers, about 1 GB.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM

from conmoe_edge import load
from conmoe_edge.compat import cache_argument, cache_of
from conmoe_edge.offload.fastpath.attention import FusedAttention
from tests.families import tiny_config
from tests.hand_packages import identity, write_package

LAYERS, PROMPT = 2, 64
WIDTHS: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "moe_intermediate_size": 768,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 16,
    "n_routed_experts": 16,
    "num_local_experts": 16,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 0,
    "num_hidden_layers": LAYERS,
}
"""Near those of Qwen3-30B-A3B, but for the number of experts; what a token reads does not depend on that."""
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 16,
    "head_dim": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 512,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_key_value_heads": 16},
    "qwen3_moe": {"mlp_only_layers": []},
    "mixtral": {"num_experts_per_tok": 2, "intermediate_size": 3584},
    "qwen2_moe": {"shared_expert_intermediate_size": 2048},
    "glm4_moe": {},
    "deepseek_v3": {**_LATENT, "q_lora_rank": 768},
    "deepseek_v2": _LATENT,
    "gpt_oss": {
        "head_dim": 64,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "hidden_size": 2880,
    },
    "granitemoe": {},
    "ernie4_5_moe": {"moe_layer_start_index": 0, "moe_num_experts": 16, "moe_k": 6},
    "hunyuan_v1_moe": {"moe_topk": 8},
    "dots1": {},
    "minimax_m2": {"num_key_value_heads": 16},
    "phimoe": {"num_experts_per_tok": 2},
    "flex_olmo": {},
    "solar_open": {},
    "lfm2_moe": {"num_dense_layers": 0, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": _LINEAR,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What the fast path brings for single tokens.")
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, help="another width of the model")
    arguments = parser.parse_args()
    print(
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; ms a layer"
    )
    print(f"{'family':18} {'without':>8} {'with':>8} {'ratio':>6} {'served':>7}  what is live")
    for name in arguments.families:
        changes = {} if arguments.hidden is None else {"hidden_size": arguments.hidden}
        with tempfile.TemporaryDirectory() as folder:
            model = package(name, Path(folder) / "package", changes)
            without, with_it, served = measure(model, arguments.tokens, arguments.rounds)
            print(
                f"{name:18} {without:8.3f} {with_it:8.3f} {without / with_it:6.2f} {served:7.0%}  "
                f"{model.conmoe.fast_path.summary}",
                flush=True,
            )
            model.conmoe.close()


def package(name: str, folder: Path, changes: dict[str, Any]) -> Any:
    """Two layers of the family ``name``, loaded from a package with all its experts."""
    config = tiny_config(name, **{**WIDTHS, **FAMILIES[name], **changes})
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    write_package(plain, folder, identity(plain))
    return load(folder, device="cpu")


@contextmanager
def transformers_steps() -> Iterator[None]:
    """Without the calls of whole attentions and layers."""
    with patch.object(FusedAttention, "place", lambda *_: None):
        yield


def measure(model: Any, tokens: int, rounds: int) -> tuple[float, float, float]:
    """Milliseconds for a token in one layer, without the fast path and with it, medians of rounds in turns; and the
    share of layers that the operator answered for with it.
    """
    found: tuple[list[float], list[float]] = ([], [])
    before: dict[str, int] = {}
    for number in range(rounds + 1):
        with transformers_steps():
            first = decode(model, tokens)
        before = model.conmoe.fast_path.live()
        second = decode(model, tokens)
        if number:  # the first round touches every weight
            found[0].append(first)
            found[1].append(second)
    without, with_it = (statistics.median(one) * 1000 / tokens / LAYERS for one in found)
    now = model.conmoe.fast_path.live()
    layers = (now["tokens"] - before["tokens"]) * LAYERS
    return without, with_it, 1 - (now["transformers"] - before["transformers"]) / layers


def decode(model: Any, tokens: int) -> float:
    """Seconds for ``tokens`` single tokens behind a prompt."""
    ids = torch.arange(3, 3 + PROMPT)[None] % model.config.vocab_size
    with torch.inference_mode():
        cache = cache_of(model(ids, use_cache=True))
        model(ids[:, :1], **cache_argument(model, cache))
        start = time.perf_counter()
        for number in range(tokens):
            model(ids[:, number % PROMPT, None], **cache_argument(model, cache))
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
