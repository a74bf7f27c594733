"""Every error that lowbit raises on purpose, drawn as one tree.

    LowbitError
    ├── CheckpointError     a checkpoint cannot be read: missing, truncated, wrong shape, NaN, pickle
    ├── ArchitectureError   the model's layout is unknown
    ├── CalibrationError    the calibration text is missing or too short
    ├── RecipeError         a recipe or flag asks for something that does not exist or cannot be done
    ├── FormatError         a scheme does not fit a format, or stored data breaks the format
    ├── ResumeError         an interrupted run cannot be continued with what is asked now
    ├── VerificationError   the artifact was read back and is not good enough
    ├── EvaluationError     a task's data, or an endpoint that is asked, is missing, broken or cannot give what is needed
    ├── SideEnvironmentError a side environment is missing, broken or could not be made
    ├── DistributedError    one of several processes that work on one model is gone
    ├── ServeError          a runtime is missing, cannot serve the artifact, or ended
    └── OutputError         the output cannot be written: no space, no permission, already there

A message is one sentence that says the cause and what was done about it; `hint` names the knob.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowbitError(Exception):
    """Base of all expected errors. The command line prints `message`, then `hint: ...`, and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CheckpointError(LowbitError):
    """A checkpoint cannot be read."""


class ArchitectureError(LowbitError):
    """The model's layout is unknown."""


class CalibrationError(LowbitError):
    """Calibration text is missing, unreadable or too short."""


class RecipeError(LowbitError):
    """A recipe or flag asks for something that does not exist or cannot be done."""

    exit_code = 2


class FormatError(LowbitError):
    """A scheme does not fit a format, or stored data breaks the format."""


class ResumeError(LowbitError):
    """An interrupted run cannot be continued with what is asked now."""


class VerificationError(LowbitError):
    """The artifact was read back and is not good enough."""

    exit_code = 3


class EvaluationError(LowbitError):
    """A task's data or an endpoint cannot be used."""


class SideEnvironmentError(LowbitError):
    """A side environment is missing, broken or could not be made."""


class DistributedError(LowbitError):
    """One of several processes that work on one model ended or cannot be reached."""


class ServeError(LowbitError):
    """A runtime is missing, cannot serve the artifact, or ended."""


class OutputError(LowbitError):
    """The output cannot be written."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest known name, else `""`; for the end of an error message."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
