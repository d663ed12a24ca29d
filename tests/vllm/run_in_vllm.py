"""Run packages and checkpoints in vLLM, one after the other, and say what came out. For the interpreter that has vLLM.

    PYTHON run_in_vllm.py JOBS.json RESULTS.json

A job is ``{"folder", "prompts": [[token, ...], ...], "tokens": n, "options": {...}}``; ``options`` are vLLM's own. A
result is ``{"tokens": [[...], ...], "architecture", "parameter_bytes", "expert_bytes", "experts"}`` or ``{"error"}``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def weights_of(model: Any) -> dict[str, Any]:
    """Bytes of a rank's parameters, shared ones once, and the shapes of the stacked experts."""
    seen = {one.data_ptr(): (name, one) for name, one in model.named_parameters() if one.numel()}
    sizes = {name: one.numel() * one.element_size() for name, one in seen.values()}
    return {
        "architecture": type(model).__name__,
        "parameter_bytes": sum(sizes.values()),
        "expert_bytes": sum(size for name, size in sizes.items() if _stacked(name)),
        "experts": [list(one.shape) for name, one in seen.values() if _stacked(name)],
    }


def _stacked(name: str) -> bool:
    return name.endswith(("w13_weight", "w2_weight"))


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    options = job["options"]
    ranks = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    if ranks > 1:  # a core for each; by itself vLLM wants a NUMA node for each
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
    else:
        os.environ.pop("VLLM_CPU_OMP_THREADS_BIND", None)
    llm = LLM(job["folder"], **job["options"])
    try:
        sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        held = llm.apply_model(weights_of)
    finally:
        llm.llm_engine.engine_core.shutdown()
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        **held[0],
        "rank_bytes": [rank["parameter_bytes"] for rank in held],
    }


def main() -> None:
    # vLLM's workers find this module by its name, for the function they are sent.
    import run_in_vllm

    jobs, out = Path(sys.argv[1]), Path(sys.argv[2])
    results = []
    for job in json.loads(jobs.read_text()):
        try:
            results.append(run_in_vllm.run(job))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
            traceback.print_exc()
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
