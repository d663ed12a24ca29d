"""How a running fit shows itself: a bar with the time left on a terminal, one line a step
elsewhere, nothing when quiet.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from conmoe_edge.cli.ui.output import Output
from conmoe_edge.cli.ui.text import duration, percent_whole, printable
from conmoe_edge.units import human_size

if TYPE_CHECKING:
    from conmoe_edge.compress.run.job import Progress as Step

# What a user is told that a stage does; those that count layers.
_LABELS = {
    "locate": "find the model",
    "survey": "weigh layers",
    "scope": "try pools",
    "trial": "try divisions",
    "calibrate": "calibrate",
    "write": "write",
    "receipt": "measure quality",
    "verify": "verify",
    "model": "run the model",
    "reference": "run reference",
    "compare": "compare",
    "continue": "continue",
    "convert": "convert",
}
_BY_LAYER = ("survey", "trial", "scope", "calibrate", "receipt", "model", "reference")
_WIDTH = max(map(len, _LABELS.values()))


class ProgressView:
    """Takes every ``Progress`` of ``api.fit``; remembers where a stop would leave the run.

    Attributes:
        layers_done, layers: how far calibration is, for the sentence after Ctrl-C.
        stage: the last stage that reported.
    """

    def __init__(self, output: Output) -> None:
        self.layers_done = 0
        self.layers = 0
        self.stage = ""
        self._output = output
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if output.stderr_is_terminal and not output.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[share]}"),
                TextColumn("{task.fields[memory]}", style="dim"),
                TextColumn("{task.fields[left]}"),
                console=output.stderr_console,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is None:
            return
        if error is None:
            self._finish(self._bar)
        self._bar.stop()

    def update(self, step: Step) -> None:
        """One report: ``step.step`` of ``step.steps`` are done."""
        if step.stage == "calibrate":
            self.layers_done, self.layers = step.step, step.steps
        if self._bar is None:
            self._line(step)
        else:
            self._move(self._bar, step)
        self.stage = step.stage

    def _line(self, step: Step) -> None:
        parts = [f"[{time.strftime('%H:%M:%S')}] {_description(step)}"]
        if step.device_bytes:
            parts.append(_memory(step))
        if step.seconds_left:
            parts.append(f"{duration(step.seconds_left)} left")
        self._output.note(Text(" · ".join(parts)))

    def _move(self, bar: Progress, step: Step) -> None:
        # The bar starts with the first step, not with the view: the plan is printed in between.
        bar.start()
        if step.stage != self.stage or self._task is None:
            self._finish(bar)
            self._task = bar.add_task("", total=None, share="", memory="", left="")
        bar.update(
            self._task,
            description=_description(step),
            total=step.steps or None,
            completed=step.step,
            share=percent_whole(step.step / step.steps) if step.steps else "",
            memory=_memory(step),
            left=f"ETA {duration(step.seconds_left)}" if step.seconds_left else "",
        )

    def _finish(self, bar: Progress) -> None:
        """The stage before has ended, though its last report named the step it began."""
        if self._task is not None:
            task = next(task for task in bar.tasks if task.id == self._task)
            label = _LABELS.get(self.stage, self.stage)
            done = task.total or 1
            bar.update(
                self._task, description=label, total=done, completed=done, share="100 %", left=""
            )


def _description(step: Step) -> str:
    """``calibrate  layer 7/16``: the step that is being worked on, not the number of those done."""
    label = f"{_LABELS.get(step.stage, step.stage):{_WIDTH}}"
    if step.stage in _BY_LAYER:
        return f"{label}  layer {min(step.step + 1, step.steps)}/{step.steps}"
    return f"{label}  {printable(step.detail)}".rstrip()


def _memory(step: Step) -> str:
    return f"memory {human_size(step.device_bytes)}" if step.device_bytes else ""
