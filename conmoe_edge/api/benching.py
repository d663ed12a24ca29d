"""``bench``: how fast a package runs inside its budget, and how far from the bound of this machine that is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conmoe_edge.api.bench_report import BenchReport, make_report
from conmoe_edge.api.running import open_session
from conmoe_edge.errors import UsageError
from conmoe_edge.model.tokenizers import encode

if TYPE_CHECKING:
    from conmoe_edge.memory.budget import Budget
    from conmoe_edge.offload.generation.benchmark import Round

Stage = Literal["machine", "load", "run"]


def bench(
    path: str | Path,
    *,
    budget: str | Budget | None = None,
    device: str | None = None,
    context: int | None = None,
    misses: str = "copy",
    kv_precision: str | None = None,
    prompt_tokens: int = 512,
    tokens: int = 64,
    repeats: int = 3,
    seed: int = 0,
    text: str | Path | None = None,
    on_stage: Callable[[Stage], None] | None = None,
    on_round: Callable[[int, Round], None] | None = None,
) -> BenchReport:
    """Measure how fast a package runs: prompts of real text, each followed by greedy tokens.

    Args:
        path: folder that ``fit`` wrote.
        budget, device, context, misses, kv_precision: as for ``load``.
        prompt_tokens: length of each prompt.
        tokens: that are generated after it.
        repeats: rounds, each with another prompt.
        seed: which prompts are taken from the text.
        text: UTF-8 text to take them from; by default the one that no calibration has seen.
        on_stage: called before this machine is measured, the package is loaded, the rounds are run.
        on_round: called after every round with its number, from 0.

    Raises:
        PackageError: the folder is no package, or it is damaged.
        DoesNotFit: the budget is too small even for one cache slot a layer.
        UsageError: the text cannot be used, or the prompts do not fit the context.
    """
    from conmoe_edge.api import bench_facts
    from conmoe_edge.offload.generation.benchmark import measure

    folder, stage = Path(path), on_stage or (lambda stage: None)
    words = _text(None if text is None else Path(text))
    stage("machine")
    rates = bench_facts.measured_rates(folder)
    stage("load")
    session = open_session(
        *(folder, budget, device, context), misses=misses, kv_precision=kv_precision
    )
    prompts = prompts_of(
        session.tokenizer,
        words,
        length=prompt_tokens,
        tokens=tokens,
        repeats=repeats,
        seed=seed,
        context=session.context,
    )
    settings = {
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "repeats": repeats,
        "seed": seed,
        "text": None if text is None else Path(text).name,
    }
    facts = bench_facts.gather(session, folder, rates, settings)
    stage("run")
    rounds = measure(session, prompts, tokens, on_round)
    fast_path = session.runtime.fast_path
    if fast_path is not None:  # read afterwards: it counts the tokens that it has served
        facts = replace(facts, fast_path=fast_path.summary, fast_path_json=fast_path.to_json())
    return make_report(facts, rounds)


def _text(path: Path | None) -> str:
    """The user's text, or the one that was held out of every calibration."""
    if path is None:
        from conmoe_edge.compress.stream.calibration_text import bundled_text

        return "\n\n".join(document.text for document in bundled_text().held_out or ())
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"The text {path} cannot be read.", error.strerror or "", "--text FILE, or none at all"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The text {path} is not UTF-8 text.",
            f"byte {error.start} does not belong there",
            "save it as UTF-8, or leave --text out",
        ) from error


def prompts_of(
    tokenizer: Any,
    text: str,
    *,
    length: int,
    tokens: int,
    repeats: int,
    seed: int,
    context: int,
) -> list[list[int]]:
    """Windows of the text, drawn by the seed; the same again where there are fewer than rounds.

    Raises:
        UsageError: they do not fit the context, or the text is too short.
    """
    if length + tokens > context:
        less = context - tokens
        fix = f"--prompt-tokens {less}, or " if less > 0 else ""
        raise UsageError(
            f"{length} tokens of prompt and {tokens} after it do not fit.",
            f"the package keeps room for {context} tokens of conversation",
            f"{fix}--context {length + tokens} if the model goes that far",
        )
    ids = encode(tokenizer, text)
    windows = len(ids) // length
    if windows == 0:
        raise UsageError(
            f"The text has only {len(ids)} tokens, and a prompt is to have {length}.",
            "",
            f"a longer --text, or --prompt-tokens {len(ids)}"
            if ids
            else "--text FILE with text in it, or none at all",
        )
    drawn = random.Random(seed).sample(range(windows), min(repeats, windows))
    chosen = [drawn[number % len(drawn)] for number in range(repeats)]
    return [ids[one * length : (one + 1) * length] for one in chosen]
