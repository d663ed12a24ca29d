"""``load`` and ``evaluate_tasks``: a package inside its budget, and lm-eval's tasks on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from conmoe_edge.integrations.harness import TaskReport
    from conmoe_edge.offload.generation.session import ChatSession


def load(
    path: str | Path,
    budget: str | Budget | None = None,
    device: str | None = None,
    context: int | None = None,
    cache_policy: str | None = None,
    misses: str = "copy",
    kv_precision: str | None = None,
) -> PreTrainedModel:
    """Open a package: a transformers model whose ``generate`` works, inside the budget.

    Args:
        path: folder that ``fit`` wrote.
        budget: as for ``plan``; by default what the package was planned for.
        device: ``cpu``, ``cuda``, ``hip``, ``mps`` or ``xpu``; by default what the budget says.
        context: tokens that the key-value cache must hold; by default what was planned.
        cache_policy: who goes when a cache slot is wanted: ``lru``, ``layer-lru``, ``lfru``, ``pins``; by default what
            would have had the most hits on the calibration's routing. Changes speed only.
        misses: with a GPU, what becomes of prototypes that are not there: ``copy``, or ``auto`` to let the processor
            compute as many of them as is faster. It rounds differently, so the last bits of a result may change.
        kv_precision: ``int8`` keeps keys and values in 8 bits, ``source`` in the model's own format; by default what
            was planned. Answers depend on it.

    Raises:
        PackageError: the folder is no package, or it is damaged.
        DoesNotFit: the budget is too small even for one cache slot a layer.
    """
    from conmoe_edge.integrations.load import load_package
    from conmoe_edge.model.accelerator import budget_here

    if isinstance(budget, str):
        budget = budget_here(budget, device)
    return load_package(
        Path(path),
        budget=budget,
        device=device,
        context=context,
        cache_policy=cache_policy,
        misses=misses,
        kv_precision=kv_precision,
    )


def open_session(
    path: str | Path,
    budget: str | Budget | None = None,
    device: str | None = None,
    context: int | None = None,
    cache_policy: str | None = None,
    misses: str = "copy",
    *,
    allow_special_tokens: bool = False,
    template: str | None = None,
    kv_precision: str | None = None,
    prompt_cache: str | Path | None = None,
    prompt_cache_bytes: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> ChatSession:
    """A package to talk to, or to measure: loaded as by ``load``, with its tokenizer.

    Args:
        path, budget, device, context, cache_policy, misses, kv_precision: as for ``load``.
        allow_special_tokens: whether control tokens that are spelt out in messages steer the model.
        template: name of a chat template; by default the only one, or the one called ``default``.
        prompt_cache: a folder for keys and values of prompts, which a later session of the same package begins with.
            They are private: they say much of the text.
        prompt_cache_bytes: most bytes of that folder, 2 GB unless it is said; what was not used for the longest time is
            deleted.
        tell: gets a line where a file in that folder is ignored; by default a ``PromptCacheWarning`` is given.

    Raises:
        PackageError, DoesNotFit: as ``load``.
        CalibrationError: it has no tokenizer.
        UsageError: it has no such template, or others may write to ``prompt_cache``.
    """
    from conmoe_edge.offload.generation.named_templates import choose_template
    from conmoe_edge.offload.generation.prompt_files import PromptFiles
    from conmoe_edge.offload.generation.session import ChatSession

    tokenizer = None
    if template is not None:  # before the model is loaded for it
        tokenizer = load_tokenizer(Path(path))
        choose_template(tokenizer, template)
    model = load(path, budget, device, context, cache_policy, misses, kv_precision)
    tokenizer = tokenizer or load_tokenizer(Path(path))
    files = None
    if prompt_cache is not None:
        files = PromptFiles.of_model(
            model, Path(prompt_cache), most_bytes=prompt_cache_bytes, tell=tell
        )
    return ChatSession(
        model, tokenizer, context, allow_special_tokens=allow_special_tokens, files=files
    )


def evaluate_tasks(
    path: str | Path,
    tasks: Sequence[str],
    *,
    tasks_path: str | Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    budget: str | Budget | None = None,
    device: str | None = None,
    context: int | None = None,
    kv_precision: str | None = None,
    bars: bool = True,
) -> TaskReport:
    """Tasks of lm-eval on a package that runs inside its budget. Needs the extra ``eval``.

    Args:
        path: folder that ``fit`` wrote.
        tasks: names as lm-eval has them.
        tasks_path: a folder with task files of your own.
        limit: examples of each task at the most.
        fewshot: examples in front of each question; by default what the task says.
        bars: whether lm-eval shows its progress on stderr.
        budget, device, context, kv_precision: as for ``load``. The scores of one sequence over the vocabulary, which
            lm-eval asks for, come on top of the budget.

    Raises:
        UsageError: lm-eval is not installed, or there is no such task.
        ConmoeError: a task cannot be run, as without its data.
    """
    from conmoe_edge.integrations.harness import require_harness, run_tasks

    require_harness()
    model = load(path, budget=budget, device=device, context=context, kv_precision=kv_precision)
    return run_tasks(
        model,
        load_tokenizer(Path(path)),
        tasks,
        tasks_path=None if tasks_path is None else Path(tasks_path),
        limit=limit,
        fewshot=fewshot,
        bars=bars,
    )
