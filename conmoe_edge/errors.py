"""One hierarchy of errors.

Every error a user can meet carries three sentences: *what* happened, *why*, and the *fix* (a command or a flag,
with computed values where there are any). Libraries raise; only ``cli/`` formats and prints. ``exit_code`` is the
status with which the command line leaves.
"""

from __future__ import annotations


class ConmoeError(Exception):
    """Base of everything this package raises on purpose.

    Args:
        what: one sentence that names the thing that failed.
        why: one sentence with the reason; may be empty when ``what`` says it all.
        fix: a command, a flag or an action that helps; may be empty when there is none.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what = what
        self.why = why
        self.fix = fix
        super().__init__(what if not why else f"{what} ({why})")


class UsageError(ConmoeError):
    """The request itself is wrong: an unknown profile, a rate outside [0, 1), flags that exclude each other."""

    exit_code = 2


class DoesNotFit(ConmoeError):
    """No combination of the levers that may be used meets the budget. ``least_bytes`` would do, where that is known."""

    exit_code = 3

    def __init__(
        self, what: str, why: str = "", fix: str = "", least_bytes: int | None = None
    ) -> None:
        super().__init__(what, why, fix)
        self.least_bytes = least_bytes


class CheckpointError(ConmoeError):
    """The files of a model are missing, damaged, or of a kind that is not read (pickle, say)."""


class ModelNotFound(CheckpointError):
    """Neither an alias, nor a folder, nor a model that the hub (or its local cache) knows."""


class HubUnreachable(ModelNotFound):
    """The hub does not answer, and what was asked for is not in its local cache."""


class HubRefused(ConmoeError):
    """The hub did not take what was to be published: nobody is logged in, no right to write there, no connection."""


class UnsupportedModel(ConmoeError):
    """The model is whole, but nothing here can consolidate it: dense, unknown, or gated at the expert's input."""


class CalibrationError(ConmoeError):
    """The calibration text cannot be read or is too short to say anything."""


class ResumeMismatch(ConmoeError):
    """An unfinished run is there, but with other settings; ``why`` names the ones that differ."""


class OutputExists(ConmoeError):
    """The output folder is there already."""


class InUse(ConmoeError):
    """Another process works on the same output, or another answer goes on in the same conversation."""


class NoSpace(ConmoeError):
    """The disk has less free space than the run needs, or became full on the way."""


class PackageError(CheckpointError):
    """A package written by this tool is damaged, of another format version, or does not match its manifest."""


class NotFinite(PackageError):
    """A model computes NaN or infinity; ``why`` names layer and tensor."""


class OutOfMemory(ConmoeError):
    """Memory ran out after every retreat was tried, or would: the machine has less than is needed."""


class ContextFull(ConmoeError):
    """The conversation has reached the context that was planned for."""
