"""The arm of this project: a package, opened inside a budget, through the session that chat uses.

Routes come from a trace (``traces.py``), or are the model's own where the job has none. The session is driven by token
numbers: its tokenizer is one that takes them as they are, so that no arm computes a token more or less than another.
What chat does, this does: chunks of the prompt, the cache between steps, greedy sampling, the text stream, counters.
What a step is fed is the text's token, in place of the one it chose: the embedding looks that one up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import conmoe_edge
from benchmarks.comparison.clock import Arm, main
from benchmarks.comparison.on_device import device_of, limit, used
from benchmarks.comparison.traces import Routes
from conmoe_edge.model.experts import find_experts
from conmoe_edge.offload.generation.benchmark import dense_read_bytes
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.session import ChatSession

ENDLESS = 1 << 30


class Numbers:
    """A tokenizer whose text is the numbers themselves, and which has no end mark."""

    chat_template = None
    eos_token_id = None

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(f" {token}" for token in tokens)


class OurArm(Arm):
    """``job``: ``path``, ``threads``, ``context``, ``budget`` (as for ``--gpu``), perhaps ``trace`` and ``misses``; and
    as ``on_device.py`` says.
    """

    def load(self) -> None:
        torch.set_num_threads(self.job["threads"])
        limit(self.job)
        self.replay: Routes | None = None
        if "trace" in self.job:
            routes = torch.load(self.job["trace"], weights_only=True)["routes"]
            self.replay = Routes(routes.to(device_of(self.job)))
        self.model: Any = conmoe_edge.load(
            self.job["path"],
            budget=self.job["budget"],
            device=device_of(self.job),
            context=self.job["context"],
            misses=self.job.get("misses", "copy"),
        )
        if self.replay is not None:
            for layer, (path, _) in find_experts(self.model).items():
                router = self.model.get_submodule(f"{path.rpartition('.')[0]}.gate")
                router.register_forward_hook(self.routed(layer, self.replay))
        self.model.generation_config.eos_token_id = None
        self.fed: int | None = None
        self.lookups = 0
        self.model.get_input_embeddings().register_forward_pre_hook(self.feed)
        self.session = ChatSession(self.model, Numbers(), allow_special_tokens=True)
        self.answer: Iterator[str] = iter(())
        self.before, self.steps = self.model.conmoe.stats(), 0

    def feed(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The token of the text, where a step looks one up."""
        if self.fed is None:
            return args
        self.lookups += 1
        return (torch.full_like(args[0], self.fed), *args[1:])

    def routed(self, layer: int, replay: Routes) -> Callable[..., Any]:
        """Puts the trace's slots into what a router gives."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            logits, gates, slots = output
            return logits, gates, replay.next(layer, slots)

        return hook

    def prompt(self, tokens: Sequence[int]) -> int:
        if self.replay is not None:
            self.replay.rewind()
        self.session.forget()
        self.fed = None
        content = " ".join(str(token) for token in tokens)
        room = self.session.context - len(tokens) - 1
        self.answer = self.session.reply(
            [{"role": "user", "content": content}],
            SamplingSettings(max_tokens=min(room, ENDLESS), temperature=0),
        )
        return int(next(self.answer))

    def step(self, token: int) -> int:
        self.steps += 1
        self.fed = token
        return int(next(self.answer))

    def mark(self) -> None:
        self.before, self.steps, self.lookups = self.model.conmoe.stats(), 0, 0

    def facts(self) -> dict[str, Any]:
        """The counters of the steps, and what the package is."""
        now, before = self.model.conmoe.stats(), self.before
        if self.replay is not None and not self.replay.calls:
            raise RuntimeError("the routes were not replayed: no router was asked")
        if self.lookups < self.steps - 1:
            raise RuntimeError("the text was not fed: the embedding was not asked for every step")
        hits, misses = now.hits - before.hits, now.misses - before.misses
        manifest = self.model.conmoe.manifest
        sizes = [manifest.layouts[one.layout].nbytes for one in manifest.prototypes]
        asked = (hits + misses) / max(1, self.steps)
        return {
            "dense_token_bytes": dense_read_bytes(self.model),
            "routed_token_bytes": round(asked * sum(sizes) / len(sizes)),
            "hits": hits,
            "misses": misses,
            "hit": hits / (hits + misses) if hits + misses else 1.0,
            "record_bytes": now.bytes_read - before.bytes_read,
            "stats": asdict(now),
            "rate": manifest.rate,
            "precision": manifest.precision,
            "prefill_chunk": self.model.conmoe.prefill_chunk,
            "package_bytes": sum(
                path.stat().st_size for path in Path(self.job["path"]).glob("*.safetensors")
            ),
            "torch": torch.__version__,
            **used(self.job),
        }


if __name__ == "__main__":
    main(OurArm)
