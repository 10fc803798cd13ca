"""What a user did or met, in one line each: the exceptions that end a command without a traceback."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


def nearest(word: str, words: Iterable[str]) -> str:
    """ "; did you mean X?" for the closest of `words`, or nothing."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def in_short(error: BaseException) -> str:
    """The first line of what others raise, and of a long one the beginning and the end, where the reason is."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if len(line) <= 250 else f"{line[:150]} ... {line[-95:]}"


class UserError(Exception):
    """One or more problems, each a line that says what is wrong, where, and what to do.

    `exit_code` is what the command ends with, so that whatever restarts a job can tell whether a retry helps.
    """

    exit_code = 1

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(UserError):
    """Bad configuration or usage: the same command can never succeed."""

    exit_code = 2


class DataError(UserError):
    """The data set cannot be read."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint is missing, unreadable or of another model."""

    exit_code = 4


class NumericsError(UserError):
    """Training does not go on: its loss or gradients are not finite. The same command comes to the same end."""

    exit_code = 5


class Lost(UserError):
    """Another process of the job is gone, or this one hangs: the same command, run again, goes on."""

    exit_code = 6


class Interrupted(UserError):
    """SIGTERM or Ctrl-C, after the state was saved."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


def report(error: UserError, where: str = "") -> int:
    """Print a line for each problem, `where` before it; returns the exit code."""
    for problem in error.problems:
        print("mae-jax:", where + " ".join(problem.split()), file=sys.stderr, flush=True)  # whatever was quoted
    return error.exit_code
