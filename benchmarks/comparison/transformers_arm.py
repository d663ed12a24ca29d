"""The arms of transformers: all in memory, or ``device_map="auto"`` with a CPU share and the disk.

In memory, transformers gets the best of its experts implementations, prompt and steps apart: each is
tried for a few tokens before the clock runs and the tries are reported. ``batched_mm`` gathers a
copy of the weights for every token, so it is tried for single tokens only. With offload a token
takes many seconds, so there nothing is tried and ``grouped_mm``, what transformers takes by itself,
stays.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import accelerate
import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.comparison.clock import Arm, main
from benchmarks.comparison.on_device import device_of, limit, used

FOR_PROMPTS = ("grouped_mm", "eager")
FOR_STEPS = ("grouped_mm", "eager", "batched_mm")
TRY_STEPS = 3
TRY_PROMPT = 128


class TransformersArm(Arm):
    """``job``: ``path``, ``threads``, ``cpu_bytes`` with ``offload_folder`` for the offloading one (``gpu_bytes`` for
    what it puts on a card); and as ``on_device.py`` says.
    """

    def load(self) -> None:
        torch.set_num_threads(self.job["threads"])
        limit(self.job)
        device = device_of(self.job)
        words: dict[str, Any] = {}
        offloads = self.job.get("cpu_bytes") is not None
        if offloads:
            memory: dict[int | str, int] = {"cpu": self.job["cpu_bytes"]}
            if device == "cuda":
                memory[0] = self.job["gpu_bytes"]
            words = {
                "device_map": "auto",
                "max_memory": memory,
                "offload_folder": self.job["offload_folder"],
            }
        elif device == "cuda":
            words = {"device_map": {"": 0}}
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            self.job["path"], dtype=torch.bfloat16, **words
        )
        self.cache: Any = None
        self.tried: dict[str, dict[str, float]] = {}
        self.for_prompts = self.for_steps = "grouped_mm"
        if not offloads:
            self._try_implementations()

    @torch.no_grad()
    def _feed(self, tokens: Sequence[int]) -> int:
        out = self.model(
            input_ids=torch.tensor([list(tokens)], device=device_of(self.job)),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        return int(out.logits[0, -1].argmax())

    def prompt(self, tokens: Sequence[int]) -> int:
        self._use(self.for_prompts)
        self.cache = None
        token = self._feed(tokens)
        self._use(self.for_steps)
        return token

    def step(self, token: int) -> int:
        return self._feed([token])

    def _use(self, implementation: str) -> None:
        self.model.set_experts_implementation(implementation)

    def _try_implementations(self) -> None:
        """Keep the fastest for prompts and the fastest for steps."""
        prompts: dict[str, float] = {}
        steps: dict[str, float] = {}
        for name in FOR_STEPS:
            self._use(name)
            self.cache = None
            if name in FOR_PROMPTS:
                self._feed(range(100, 116))  # the first touch of everything is not its fault
                self.cache = None
                start = time.perf_counter()
                token = self._feed(range(200, 200 + TRY_PROMPT))
                prompts[name] = time.perf_counter() - start
            else:
                token = self._feed([100])
            laps = []
            for _ in range(TRY_STEPS):
                start = time.perf_counter()
                token = self._feed([token])
                laps.append(time.perf_counter() - start)
            steps[name] = min(laps)
        self.for_prompts = min(prompts, key=prompts.__getitem__)
        self.for_steps = min(steps, key=steps.__getitem__)
        self.tried = {"prompt_seconds": prompts, "step_seconds": steps}

    def facts(self) -> dict[str, Any]:
        """Versions, and what was tried."""
        places = list(getattr(self.model, "hf_device_map", {}).values())
        config = self.model.config
        parts = {"routed": 0, "dense": 0}
        for name, tensor in self.model.named_parameters():
            if name != "model.embed_tokens.weight":
                parts["routed" if ".experts." in name else "dense"] += tensor.nbytes
        return {
            "dense_token_bytes": parts["dense"],
            "routed_token_bytes": parts["routed"]
            * config.num_experts_per_tok
            // config.num_experts,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            **used(self.job),
            "experts": {"prompt": self.for_prompts, "steps": self.for_steps, "tried": self.tried},
            "modules_on_disk": places.count("disk"),
            "modules_in_memory": len(places) - places.count("disk"),
        }


if __name__ == "__main__":
    main(TransformersArm)
