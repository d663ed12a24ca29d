"""How a running fit shows itself: a bar with the time left on a terminal, one line a step
elsewhere, nothing when quiet.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from conmoe_edge.cli._output import Output
from conmoe_edge.cli._text import duration, percent, printable
from conmoe_edge.units import GIB

if TYPE_CHECKING:
    from conmoe_edge.api import Progress as Step

# What a stage counts, and what a user is told it does.
_LABELS = {
    "locate": ("file", "find the model"),
    "calibrate": ("layer", "calibrate"),
    "write": ("layer", "write"),
    "receipt": ("layer", "measure quality"),
    "verify": ("file", "verify"),
}


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
        if self._bar is not None:
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
        parts = [self._description(step)]
        if step.detail:
            parts.append(printable(step.detail))
        if step.device_bytes:
            parts.append(self._memory(step))
        if step.seconds_left:
            parts.append(f"{duration(step.seconds_left)} left")
        self._output.note(Text(" · ".join(parts)))

    def _move(self, bar: Progress, step: Step) -> None:
        # The bar starts with the first step, not with the view: the plan is printed in between.
        bar.start()
        if step.stage != self.stage or self._task is None:
            if self._task is not None:
                bar.update(self._task, left="")
            self._task = bar.add_task("", total=None, share="", memory="", left="")
        done = step.steps > 0 and step.step >= step.steps
        bar.update(
            self._task,
            description=self._description(step),
            total=step.steps or None,
            completed=step.step,
            share=percent(step.step / step.steps) if step.steps else "",
            memory=self._memory(step),
            left=f"ETA {duration(step.seconds_left)}" if step.seconds_left and not done else "",
        )

    def _description(self, step: Step) -> str:
        noun, label = _LABELS.get(step.stage, ("step", step.stage))
        width = max(len(label) for _, label in _LABELS.values())
        return f"{label:{width}}  {noun} {step.step}/{step.steps}" if step.steps else label

    def _memory(self, step: Step) -> str:
        if not step.device_bytes:
            return ""
        return f"memory {step.device_bytes / GIB:.2f} GiB"
