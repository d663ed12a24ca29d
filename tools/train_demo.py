"""Train, evaluate and export the small Mixture-of-Experts model that ships with the package.

    python tools/train_demo.py --corpora DIR --tokens 30M --work WORK --out DIR
    python tools/train_demo.py --corpora DIR --tokens 30M --work WORK --out DIR --resume
    python tools/train_demo.py --corpora DIR --work WORK --export DIR
    python tools/train_demo.py --evaluate conmoe_edge/data/demo --corpora DIR

The model is an ``OlmoeForCausalLM`` (6 layers, 32 experts of width 96, 4 per token) with a
byte-level BPE vocabulary of 4,096.  Learning rate and context length follow the tokens seen of
``--tokens``, and the order of the data follows ``--seed``, so a run is the same however often it
is stopped.  Matrices are trained with Muon (momentum whose update is orthogonalised by a few
Newton-Schulz steps), everything else with AdamW.

Every ``--save-seconds``, at the end, and on SIGTERM or SIGINT the whole state of the run goes to
``WORK/checkpoint.pt``: weights, both optimisers, random numbers, the place in the data, and the
settings.  ``--resume`` goes on from there, and begins where there is no checkpoint yet.  Another
``--tokens`` on resuming is allowed: the schedule then goes on at the share of the new number.
``--export`` writes the model of the last checkpoint, also while the run goes on.

The ``--corpora`` folder holds ``DOMAIN.train.txt`` and ``DOMAIN.valid.txt`` for the domains books,
french, german, math, code and wiki.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from build_texts import DOMAINS, ENGLISH, group_documents, read_domain, split_units
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

# Settings read when the process starts: malloc keeps freed pages (giving them back slows training
# a lot), and threads sleep instead of spinning (spinning wastes a machine shared with others).
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "GOMP_SPINCOUNT": "0",
}
VOCAB_SIZE = 4096
BOS, PAD, SYSTEM, USER, ASSISTANT, END = (
    "<|endoftext|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
SPECIAL = [BOS, PAD, SYSTEM, USER, ASSISTANT, END]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "Work step by step.",
    "You are a teacher.",
    "Be concise and accurate.",
)
# Share of the training tokens drawn from each stream. Small streams get little, so that 30M tokens
# are at most about six passes over each text.
MIXTURE = {
    "books": 0.34,
    "code": 0.19,
    "math": 0.13,
    "math_chat": 0.12,
    "wiki": 0.06,
    "prose_chat": 0.06,
    "french": 0.06,
    "german": 0.04,
}
# What a resumed run may not change, since its losses would be those of another run.
SETTINGS = (
    "seed",
    "optimizer",
    "lr",
    "muon_lr",
    "ns_steps",
    "warmup",
    "batch_tokens",
    "length",
    "long_length",
    "long_from",
    "bf16",
)
TOKENIZER_BYTES = {
    "books": 1.0,
    "math": 0.35,
    "code": 0.7,
    "wiki": 1.0,
    "french": 0.5,
    "german": 0.5,
}  # megabytes of each domain that the vocabulary is built from


# ---------------------------------------------------------------- tokenizer


def train_tokenizer(corpora: Path) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE vocabulary on a balanced sample of the train files."""
    sample: list[str] = []
    for domain in DOMAINS:
        documents = group_documents(
            split_units(read_domain(corpora, domain, "train"), domain), domain
        )
        total = sum(len(d.encode()) for d in documents)
        share = min(1.0, TOKENIZER_BYTES[domain] * 1e6 / total)
        sample += [d for i, d in enumerate(documents) if int((i + 1) * share) > int(i * share)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


# ---------------------------------------------------------------- data


def chat(user: str, assistant: str, system: str | None = None) -> str:
    """Render one exchange exactly as the chat template does."""
    head = f"{SYSTEM}\n{system}{END}\n" if system else ""
    return f"{BOS}{head}{USER}\n{user.strip()}{END}\n{ASSISTANT}\n{assistant.strip()}{END}\n"


def math_chats(text: str, rng: np.random.Generator) -> list[str]:
    """Turn question/answer pairs into chats; a fifth of them has a system prompt."""
    chats = []
    for unit in split_units(text, "math"):
        question, _, answer = unit.partition("\nAnswer:")
        if question.startswith("Question:") and answer:
            system = str(rng.choice(SYSTEM_PROMPTS)) if rng.random() < 0.2 else None
            chats.append(chat(question.removeprefix("Question:"), answer, system))
    return chats


def first_sentence(paragraph: str) -> tuple[str, str]:
    """Split a paragraph after its first sentence of at least 40 characters."""
    for i in range(40, min(len(paragraph), 300)):
        if paragraph[i] in ".!?" and paragraph[i + 1 : i + 2] == " ":
            return paragraph[: i + 1], paragraph[i + 2 :]
    return "", ""


def prose_chats(text: str, domain: str, rng: np.random.Generator) -> list[str]:
    """Make continuation chats: the first sentence of a paragraph, then the rest of it."""
    chats = []
    for unit in split_units(text, domain):
        for paragraph in unit.split("\n"):
            start, rest = first_sentence(paragraph)
            if start and 120 <= len(rest) <= 1200 and "<unk>" not in paragraph:
                ask = f"Continue: {start}" if rng.random() < 0.5 else start
                chats.append(chat(ask, rest))
    return chats


def plain_documents(corpora: Path, domain: str) -> list[str]:
    """Documents of one domain, each opened by the beginning-of-text token."""
    units = split_units(read_domain(corpora, domain, "train"), domain)
    return [f"{BOS}{d}\n\n" for d in group_documents(units, domain, size=4000)]


def build_streams(
    corpora: Path, tokenizer: PreTrainedTokenizerFast, seed: int
) -> dict[str, np.ndarray]:
    """Tokenize every stream of the mixture into one long array each."""
    rng = np.random.default_rng(seed)
    texts = {domain: plain_documents(corpora, domain) for domain in DOMAINS}
    texts["math_chat"] = math_chats(read_domain(corpora, "math", "train"), rng)
    books = prose_chats(read_domain(corpora, "books", "train"), "books", rng)
    wiki = prose_chats(read_domain(corpora, "wiki", "train"), "wiki", rng)
    texts["prose_chat"] = books + wiki * 3
    streams = {}
    for name, documents in texts.items():
        order = rng.permutation(len(documents)) if name.endswith("chat") else range(len(documents))
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(
            [documents[i] for i in order], add_special_tokens=False
        )
        streams[name] = np.concatenate([np.asarray(e.ids, dtype=np.int32) for e in encoded])
    return streams


@dataclass
class Sampler:
    """Draws windows; every stream is walked in a new random order in each pass."""

    streams: dict[str, np.ndarray]
    rng: np.random.Generator
    queues: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    drawn: dict[str, int] = field(default_factory=dict)

    def window(self, name: str, length: int) -> np.ndarray:
        """Return the next ``length`` + 1 tokens of a stream."""
        queue = self.queues.setdefault((name, length), [])
        stream = self.streams[name]
        if not queue:
            offset = int(self.rng.integers(0, length))
            starts = np.arange(offset, len(stream) - length - 1, length)
            queue.extend(self.rng.permutation(starts).tolist())
        start = queue.pop()
        self.drawn[name] = self.drawn.get(name, 0) + length
        return stream[start : start + length + 1]

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """Return [rows, length + 1] tokens in the proportions of the mixture."""
        names, shares = list(MIXTURE), np.asarray(list(MIXTURE.values()))
        # Systematic sampling: the shares hold in every batch as nearly as rows allow.
        points = (np.arange(rows) + self.rng.random()) / rows * shares.sum()
        picks = np.searchsorted(np.cumsum(shares), points, side="right")
        windows = [self.window(names[min(i, len(names) - 1)], length) for i in picks]
        return torch.from_numpy(np.stack(windows).astype(np.int64))

    def state(self) -> str:
        """Return the place in every stream as JSON (its integers have up to 128 bits)."""
        queues = [[name, length, queue] for (name, length), queue in self.queues.items()]
        rng = self.rng.bit_generator.state
        sizes = {name: len(stream) for name, stream in self.streams.items()}
        return json.dumps({"rng": rng, "queues": queues, "drawn": self.drawn, "sizes": sizes})

    def restore(self, state: str) -> None:
        """Go on at the place that ``state`` returned; other streams are refused."""
        saved = json.loads(state)
        sizes = {name: len(stream) for name, stream in self.streams.items()}
        if saved["sizes"] != sizes:
            raise SystemExit(f"The corpora have changed: {saved['sizes']} tokens, now {sizes}")
        self.rng.bit_generator.state = saved["rng"]
        self.queues = {(name, length): queue for name, length, queue in saved["queues"]}
        self.drawn = saved["drawn"]


# ---------------------------------------------------------------- model


def sorted_experts(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Experts forward: sort once, one matrix product per expert on unbound weights."""
    top_k = top_k_index.shape[-1]
    order = top_k_index.reshape(-1).argsort(stable=True)
    counts = torch.bincount(top_k_index.reshape(-1), minlength=self.gate_up_proj.shape[0])
    tokens = order // top_k
    chunks = hidden_states.index_select(0, tokens).split(counts.tolist())
    # Indexing the fused weights would fill a zero tensor of full size per expert in backward.
    gate_up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
    hidden = torch.cat([F.linear(x, w) for x, w in zip(chunks, gate_up, strict=True)])
    gate, up = hidden.chunk(2, dim=-1)
    hidden = self.act_fn(gate) * up
    hidden = hidden * top_k_weights.reshape(-1).index_select(0, order)[:, None].to(hidden.dtype)
    parts = hidden.split(counts.tolist())
    out = torch.cat([F.linear(x, w) for x, w in zip(parts, down, strict=True)])
    return torch.zeros_like(hidden_states).index_add(0, tokens, out.to(hidden_states.dtype))


ALL_EXPERTS_FUNCTIONS.register("sorted_unbound", sorted_experts)


def build_model(tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    """Return the freshly initialised model."""
    config = OlmoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=2048,
        norm_topk_prob=False,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        initializer_range=0.04,
        output_router_logits=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return OlmoeForCausalLM(config)


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch-style load-balancing loss, taken layer by layer and averaged (1 x top_k at best)."""
    losses = []
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        chosen = probs.topk(top_k, -1).indices
        load = torch.bincount(chosen.reshape(-1), minlength=probs.shape[-1]) / len(probs)
        losses.append(probs.shape[-1] * (load * probs.mean(0)).sum())
    return torch.stack(losses).mean()


def losses(model: OlmoeForCausalLM, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (next-token loss, balance loss) of a batch of [rows, length + 1] tokens."""
    out = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
    loss = F.cross_entropy(out.logits.flatten(0, 1).float(), batch[:, 1:].flatten())
    return loss, balance_loss(out.router_logits, model.config.num_experts_per_tok)


# ---------------------------------------------------------------- optimiser


def orthogonalise(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest (semi-)orthogonal matrices, batched."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = (g.mT if tall else g).reshape(-1, min(g.shape[-2:]), max(g.shape[-2:]))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(g.shape)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices and stacks of matrices."""

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        steps: int = 5,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "steps": steps}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Apply one update; fused gate/up stacks are treated as their two halves."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])  # Nesterov
                shape = update.shape
                if update.ndim == 3 and shape[1] % 2 == 0 and shape[1] == shape[2]:  # gate and up
                    update = update.reshape(shape[0] * 2, shape[1] // 2, shape[2])
                update = orthogonalise(update, group["steps"])
                scale = 0.2 * max(update.shape[-2:]) ** 0.5  # update size as of AdamW
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(shape), alpha=-group["lr"] * scale)


def make_optimisers(
    model: OlmoeForCausalLM, args: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """AdamW for embeddings, routers and norms; Muon (or AdamW) for the matrices."""
    matrices, decayed, plain = [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            plain.append(p)
        elif "embed" in name or "lm_head" in name or ".gate.weight" in name:
            decayed.append(p)
        else:
            matrices.append(p)
    adam_groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": plain, "weight_decay": 0.0},
    ]
    if args.optimizer == "adamw":
        adam_groups[0]["params"] = decayed + matrices
    adam = torch.optim.AdamW(adam_groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    if args.optimizer == "adamw":
        return [adam]
    return [adam, Muon(matrices, lr=args.muon_lr, weight_decay=0.1, steps=args.ns_steps)]


def lr_scale(progress: float, warmup: float) -> float:
    """Linear warm-up, then linear decay to 2 % at the end of the tokens."""
    if progress < warmup:
        return progress / warmup + 0.01
    return 0.02 + 0.98 * (1 - progress) / (1 - warmup)


# ---------------------------------------------------------------- training


@dataclass
class Run:
    """Counters of a run: seconds of training, steps, tokens, and what was logged."""

    elapsed: float = 0.0
    step: int = 0
    tokens: int = 0
    history: list[dict] = field(default_factory=list)


@dataclass
class Training:
    """All that changes while a run goes on, which is what a checkpoint holds."""

    model: OlmoeForCausalLM
    optimisers: list[torch.optim.Optimizer]
    sampler: Sampler
    settings: dict
    run: Run = field(default_factory=Run)

    def save(self, path: Path) -> None:
        """Write a checkpoint beside the last one, then put it in its place."""
        state = {
            "model": self.model.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "sampler": self.sampler.state(),
            "random": torch.get_rng_state(),
            "settings": self.settings,
            "run": vars(self.run),
        }
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Restore a checkpoint; one of a run with other settings is refused."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in self.settings.items():
            if (saved := state["settings"][name]) != value:
                flag = name.replace("_", "-")
                raise SystemExit(f"The run in {path} has --{flag} {saved}, not {value}")
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.sampler.restore(state["sampler"])
        torch.set_rng_state(state["random"])
        self.run = Run(**state["run"])


class StopFlag:
    """Set by SIGTERM and SIGINT, so that a run ends between two steps."""

    def __init__(self) -> None:
        self.set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        self.set = True


def train_step(
    model: OlmoeForCausalLM,
    optimisers: list[torch.optim.Optimizer],
    batch: torch.Tensor,
    args: argparse.Namespace,
    scale: float,
) -> dict:
    """One optimisation step."""
    for optimiser in optimisers:
        peak = args.muon_lr if isinstance(optimiser, Muon) else args.lr
        for group in optimiser.param_groups:
            group["lr"] = peak * scale
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=args.bf16):
        loss, balance = losses(model, batch)
    (loss + model.config.router_aux_loss_coef * balance).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return {"loss": loss.item(), "balance": balance.item(), "norm": norm.item()}


def train(args: argparse.Namespace) -> None:
    """Train for ``--tokens`` and export."""
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists() and not args.resume:
        raise SystemExit(f"{checkpoint} is there: go on with --resume, or choose another --work")
    tokenizer = prepare_tokenizer(args)
    streams = build_streams(args.corpora, tokenizer, args.seed)
    print({k: len(v) for k, v in streams.items()}, flush=True)
    model = build_model(tokenizer).to(args.device)
    model.set_experts_implementation("sorted_unbound")
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    training = Training(
        model,
        make_optimisers(model, args),
        Sampler(streams, np.random.default_rng(args.seed)),
        {name: getattr(args, name) for name in SETTINGS},
    )
    if checkpoint.exists():
        training.load(checkpoint)
        print(f"resumed at step {training.run.step}, {training.run.tokens:,} tokens", flush=True)
    model.train()
    stop = StopFlag()
    take_steps(training, args, checkpoint, stop)
    training.save(checkpoint)
    run = training.run
    (args.work / "run.json").write_text(json.dumps(vars(run)))
    drawn = training.sampler.drawn.items()
    print({k: round(v / len(streams[k]), 2) for k, v in drawn}, "passes", flush=True)
    if stop.set:
        print(f"stopped at {run.tokens:,} of {args.tokens:,} tokens; --resume goes on", flush=True)
    elif args.out:
        export(model, tokenizer, args.out)


def take_steps(
    training: Training, args: argparse.Namespace, checkpoint: Path, stop: StopFlag
) -> None:
    """Step until ``--tokens`` are seen or ``stop`` is set; log and save on the way."""
    run = training.run
    saved = logged = begin = time.time()
    before, since, window = run.elapsed, run.tokens, []
    while run.tokens < args.tokens and not stop.set:
        progress = run.tokens / args.tokens
        length = args.length if progress < args.long_from else args.long_length
        rows = max(1, args.batch_tokens // length)
        batch = training.sampler.batch(rows, length).to(args.device)
        scale = lr_scale(progress, args.warmup)
        window.append(train_step(training.model, training.optimisers, batch, args, scale))
        run.step += 1
        run.tokens += rows * length
        now = time.time()
        run.elapsed = before + now - begin
        if run.step % args.log_steps == 0:
            means = {k: float(np.mean([w[k] for w in window])) for k in window[0]}
            rate = (run.tokens - since) / (now - logged)
            print(
                f"{time.strftime('%d.%m. %H:%M')} step {run.step} "
                f"tokens {run.tokens / 1e6:.3f}M of {args.tokens / 1e6:g}M "
                f"loss {means['loss']:.4f} balance {means['balance']:.3f} "
                f"norm {means['norm']:.2f} {rate:.0f} tok/s "
                f"ETA {(args.tokens - run.tokens) / rate / 3600:.1f} h",
                flush=True,
            )
            run.history.append({"step": run.step, "tokens": run.tokens, **means})
            logged, since, window = now, run.tokens, []
        if now - saved >= args.save_seconds:
            training.save(checkpoint)
            saved = now


def prepare_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerFast:
    """Load the tokenizer of the work folder, training it first where there is none."""
    folder = args.work / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(args.corpora).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def export(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save the model in bfloat16 under the per-expert names of the hub, with the tokenizer."""
    config = model.config.to_dict()
    state = {k: v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items()}
    copy = OlmoeForCausalLM(OlmoeConfig(**config)).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.config.dtype = torch.bfloat16
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(END), tokenizer.bos_token_id],
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        max_new_tokens=256,
    )
    copy.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    portable_tokenizer_config(out / "tokenizer_config.json")
    print(f"exported to {out}", flush=True)


def portable_tokenizer_config(path: Path) -> None:
    """Rewrite the tokenizer's settings so that older readers understand them as well."""
    config = json.loads(path.read_text())
    for name in ("backend", "is_local", "local_files_only", "extra_special_tokens"):
        config.pop(name, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = [SYSTEM, USER, ASSISTANT]
    config["chat_template"] = CHAT_TEMPLATE
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate_domain(
    model: OlmoeForCausalLM, ids: list[int], length: int, rows: int
) -> tuple[float, int, torch.Tensor]:
    """Return (summed nats, predicted tokens, [layers, experts] load) over windows of a text."""
    config = model.config
    load = torch.zeros(config.num_hidden_layers, config.num_experts)
    windows = [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]
    nats, count = 0.0, 0
    for group in [windows[i : i + rows] for i in range(0, len(windows), rows)]:
        full = [w for w in group if len(w) == length + 1]
        for batch in filter(None, [full, [w for w in group if len(w) <= length]]):
            tokens = torch.tensor(batch, device=model.device)
            out = model(input_ids=tokens[:, :-1], output_router_logits=True, use_cache=False)
            nats += F.cross_entropy(
                out.logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum"
            ).item()
            count += tokens[:, 1:].numel()
            for layer, logits in enumerate(out.router_logits):
                chosen = logits.topk(config.num_experts_per_tok, -1).indices.reshape(-1)
                load[layer] += torch.bincount(chosen.cpu(), minlength=config.num_experts)
    return nats, count, load


def evaluate(args: argparse.Namespace) -> dict:
    """Print a table and a JSON of losses per domain and of the experts' load."""
    tokenizer = AutoTokenizer.from_pretrained(args.evaluate)
    model = AutoModelForCausalLM.from_pretrained(args.evaluate, dtype=torch.float32)
    model.set_experts_implementation("sorted_unbound")
    model.to(args.device).eval()
    result: dict = {"window": args.long_length, "domains": {}}
    total = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    print("| domain | tokens | nats/token | bits/byte |\n|---|---|---|---|")
    for domain in DOMAINS:
        text = read_domain(args.corpora, domain, "valid")
        ids = tokenizer(text, add_special_tokens=False).input_ids
        nats, count, load = evaluate_domain(model, ids, args.long_length, 8)
        total += load / load.sum()
        row = {
            "tokens": count,
            "nats_per_token": round(nats / count, 4),
            "bits_per_byte": round(nats / math.log(2) / len(text.encode()), 4),
        }
        result["domains"][domain] = row
        print(
            f"| {domain} | {count:,} | {row['nats_per_token']:.3f} | {row['bits_per_byte']:.3f} |",
            flush=True,
        )
    english = [result["domains"][d]["nats_per_token"] for d in ENGLISH]
    result["english_mean"] = round(sum(english) / len(english), 4)
    share = total / total.sum(-1, keepdim=True) * model.config.num_experts
    result["load_max_over_mean"] = [round(v, 3) for v in share.max(-1).values.tolist()]
    result["load_min_over_mean"] = [round(v, 3) for v in share.min(-1).values.tolist()]
    print("\n| layer | max load / mean | min load / mean |\n|---|---|---|")
    for layer in range(model.config.num_hidden_layers):
        print(
            f"| {layer} | {result['load_max_over_mean'][layer]:.2f} "
            f"| {result['load_min_over_mean'][layer]:.2f} |"
        )
    print(json.dumps(result))
    return result


def sample(args: argparse.Namespace) -> None:
    """Print greedy and sampled answers of a model to a few chats."""
    tokenizer = AutoTokenizer.from_pretrained(args.sample)
    model = AutoModelForCausalLM.from_pretrained(args.sample, dtype=torch.float32)
    torch.manual_seed(args.seed)
    for prompt in (
        "Tom has 12 apples and gives 5 of them to Ann. How many apples does Tom have left?",
        "Continue: The old man looked out over the grey sea and said nothing for a long time.",
        "The film was released in the United States in the summer of 1998.",
        "Hello, who are you?",
    ):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        for options in (
            {"do_sample": False, "temperature": None, "top_p": None},
            {"do_sample": True, "temperature": 0.7},
        ):
            out = model.generate(**inputs, max_new_tokens=100, **options)
            text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
            print(f"### {prompt}\n[{'sampled' if options['do_sample'] else 'greedy'}] {text}\n")


def token_count(text: str) -> int:
    """Read a number of tokens such as 30M, 500k or 8192."""
    factor = {"k": 1_000, "M": 1_000_000}.get(text[-1:], 1)
    return int(float(text.rstrip("kM")) * factor)


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpora", type=Path, help="folder with the corpora")
    parser.add_argument("--tokens", type=token_count, default="30M", help="tokens to train on")
    parser.add_argument("--work", type=Path, default=Path("train_demo"), help="checkpoints")
    parser.add_argument("--out", type=Path, help="folder to export the trained model to")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--export", type=Path, help="only export the checkpoint in --work")
    parser.add_argument("--evaluate", type=Path, help="only evaluate this model folder")
    parser.add_argument("--sample", type=Path, help="only print samples of this model folder")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=8e-3, help="peak rate of Muon")
    parser.add_argument("--ns-steps", type=int, default=4, help="Newton-Schulz steps of Muon")
    parser.add_argument("--warmup", type=float, default=0.02, help="share of the tokens")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="context length at first")
    parser.add_argument("--long-length", type=int, default=512, help="context length at the end")
    parser.add_argument("--long-from", type=float, default=0.75, help="share of the tokens")
    parser.add_argument("--log-steps", type=int, default=10, help="steps of one line of the log")
    parser.add_argument("--save-seconds", type=float, default=300.0)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def set_environment() -> None:
    """Start over with the settings of ``ENVIRONMENT`` where they are missing."""
    if not ENVIRONMENT.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], ENVIRONMENT | os.environ)


def main() -> None:
    """Dispatch on the command line."""
    args = parse_args()
    set_environment()
    torch.set_num_threads(args.threads)
    if args.sample:
        sample(args)
    elif args.corpora is None:
        raise SystemExit("--corpora is needed")
    elif args.evaluate:
        evaluate(args)
    elif args.export:
        tokenizer = prepare_tokenizer(args)
        model = build_model(tokenizer)
        path = args.work / "checkpoint.pt"
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
        export(model, tokenizer, args.export)
    else:
        train(args)


if __name__ == "__main__":
    main()
