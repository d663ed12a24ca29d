"""A loaded package under lm-eval, the field's own harness.

lm-eval is an extra (``eval``) and takes long to import, so it is imported
when tasks are run and not before. The model object goes in as it is, with its runtime and its
budget, one sequence at a time. What lm-eval itself takes comes on top: its libraries (about 130 MiB
of RAM), the scores of one sequence over the vocabulary, in fp32 twice, and the data of its tasks.

Task files may name Python functions; lm-eval runs these. Nothing of a model folder is among them.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conmoe_edge.errors import ConmoeError, UsageError
from conmoe_edge.extras import install_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 1234


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task. ``filter`` is lm-eval's way of reading the answer; ``stderr`` may be unknown."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    examples: int | None
    fewshot: int | None


@dataclass(frozen=True, slots=True)
class TaskReport:
    """Scores in the order of the tasks' names, and the version of lm-eval that gave them."""

    scores: tuple[TaskScore, ...]
    harness: str
    limit: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def require_harness() -> None:
    """Say how to install lm-eval where it is missing, before a model is loaded for it.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "Tasks need lm-eval, which is not installed.",
            "it is an extra of conmoe-edge",
            install_command("eval"),
        )


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    tasks_path: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    bars: bool = True,
) -> TaskReport:
    """Run ``tasks`` on a model that ``load`` gave; arguments as for ``conmoe_edge.evaluate_tasks``."""
    require_harness()
    if tasks_path is not None and not tasks_path.is_dir():
        raise UsageError(
            f"There is no folder {tasks_path}.", "", "--tasks-path DIR with task files"
        )
    runtime: Any = model.conmoe
    with _calm(bars):
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models import huggingface
        from lm_eval.tasks import TaskManager

        manager: Any = None
        if tasks_path is not None:  # reading lm-eval's own thousands of task files takes long
            manager = TaskManager(include_path=str(tasks_path), include_defaults=False)
        if manager is None or not set(tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=None if tasks_path is None else str(tasks_path))
        _check_names(manager, tasks)
        # A longer question is cut from the left by lm-eval; the runtime itself would refuse it.
        wrapped: Any = huggingface.HFLM
        judged = wrapped(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=1,
            max_length=runtime.context,
            trust_remote_code=False,
        )
        try:
            found: Any = simple_evaluate(
                model=judged,
                tasks=list(tasks),
                num_fewshot=fewshot,
                limit=limit,
                log_samples=False,
                bootstrap_iters=1000,
                task_manager=manager,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
        except ConmoeError:
            raise
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            raise ConmoeError(
                f"lm-eval could not run {', '.join(tasks)}.",
                _first_line(error),
                "check that the data of the task is on this machine or that there is a network",
            ) from error
    return TaskReport(tuple(_scores(found)), version("lm_eval"), limit)


def _check_names(manager: Any, tasks: Sequence[str]) -> None:
    known = set(manager.all_tasks)
    unknown = [name for name in tasks if name not in known]
    if not tasks or unknown:
        raise UsageError(
            f"lm-eval has no task called {unknown[0]!r}." if unknown else "No task was named.",
            f"there are {len(known):,}, those of --tasks-path included",
            "lm-eval ls tasks",
        )


def _scores(found: Any) -> Iterator[TaskScore]:
    """lm-eval's table: ``{task: {"metric,filter": value, "metric_stderr,filter": value}}``."""
    for task, row in sorted(found["results"].items()):
        better = found.get("higher_is_better", {}).get(task, {})
        examples = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in sorted(row.items()):
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = row.get(f"{metric}_stderr,{name}")
            known = isinstance(error, int | float) and math.isfinite(error)
            yield TaskScore(
                task=task,
                metric=metric,
                filter=name,
                value=float(value),
                stderr=float(error) if known else None,  # pyright: ignore[reportArgumentType]
                higher_is_better=better.get(metric),
                examples=examples,
                fewshot=found.get("n-shot", {}).get(task),
            )


@contextmanager
def _calm(bars: bool) -> Iterator[None]:
    """lm-eval logs its settings; a report says what matters. Its progress bars go where ``bars`` says."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with nullcontext() if bars else redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].strip() if lines else type(error).__name__)[:200]
