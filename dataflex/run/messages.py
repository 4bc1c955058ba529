"""Failures of the user's or the machine's making, and the exit code each ends with.

A failure may be reported by another process than the one it happened in: a worker's by its parent,
rank 0's by every rank. `RemoteFailure` carries it there.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import sysconfig
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from dataflex.config.secrets import redacted
from gradstore.errors import BadInput, StoreError, StoreIOError
from gradstore.format.names import printable

#: Environment variable: processes of torchrun show tracebacks.
DEBUG = "DATAFLEX_DEBUG"

#: Words of errors other than MemoryError: a GPU's, an unmapped library's, torch's allocator's.
NO_MEMORY = ("CUDA out of memory", "failed to map segment from shared object",
             "Cannot allocate memory", "can't allocate memory",
             "cannot allocate memory")  # fmt: skip

#: What to do about a failure of the operating system, by its number.
NEXT_STEPS = {
    errno.ENOENT: "Correct the path; one that does not begin with / counts from the folder that "
    "the command is started in",
    errno.ENOSPC: "Make room there, or choose another folder",
    errno.EDQUOT: "Make room there, or choose another folder",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "Choose a place that may be read and written, or change its permissions",
    ),
}

#: Code that is ours; libraries that may be installed from a folder of their developers' (editable);
#: and folders of code that is nobody's own: Python's and installed.
PACKAGES = ("dataflex", "gradstore", "gradkernels")
LIBRARIES = ("llamafactory", "transformers", "peft", "trl", "accelerate", "datasets", "torch",
             "deepspeed")  # fmt: skip
NOT_USERS = tuple(
    {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
)


@dataclass(frozen=True)
class Failure:
    """One message for stderr, without known secrets, and the code the process exits with."""

    code: int
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", redacted(self.message))


class RemoteFailure(StoreError):
    """A failure of another process, with that one's message and exit code."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.exit_code = failure.code  # type: ignore[misc]


def explain(error: BaseException) -> Failure | None:
    """Exit code and message of a failure to report in one line; None for a bug (a traceback)."""
    if isinstance(error, StoreError):
        return Failure(error.exit_code, str(error))
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
        said = f" ({error})" if str(error) else ""
        return Failure(
            StoreIOError.exit_code,
            f"not enough memory{said}. Raise the limit (ulimit -v, or the container's), or use a "
            "smaller model, batch or data set.",
        )
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        kind = BadInput if isinstance(error, FileNotFoundError) else StoreIOError
        where = f" ({error.filename})" if error.filename else ""
        next_step = NEXT_STEPS.get(error.errno, "Run again with --debug to see what was asked for")
        return Failure(kind.exit_code, f"{error.strerror}{where}. {next_step}.")
    if isinstance(error, KeyboardInterrupt):
        return Failure(
            130,
            "interrupted. Run the same command again with resume_from_checkpoint=true: it goes on "
            "from the newest checkpoint. Run it as it was if there is none yet.",
        )
    if isinstance(error, Exception) and (place := _users_code(error)) is not None:
        return Failure(
            BadInput.exit_code,
            f"{place}: {type(error).__name__}: {error}. This is code of your own; run again with "
            "--debug for the whole traceback.",
        )
    return None


def show_traceback(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    """Print a traceback to stderr, as Python does, but without known secrets."""
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, where))))


def _users_code(error: Exception) -> str | None:
    """Name the innermost line of a user's own code that ours called; None where there is none."""
    found, below_ours = None, False
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = frame.f_code.co_filename
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in PACKAGES:
            below_ours = True
        elif below_ours and package not in LIBRARIES and not path.startswith(("<", *NOT_USERS)):
            owner = type(frame.f_locals["self"]).__name__ if "self" in frame.f_locals else None
            name = frame.f_code.co_name if owner is None else f"{owner}.{frame.f_code.co_name}"
            found = f"{name} ({path}, line {line})"
    return found


class _PrintableFormatter(logging.Formatter):
    """Formatter whose lines hold no control character and no known secret, whatever they quote."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return printable(redacted(super().format(record)))


class _BesideBars(logging.StreamHandler[TextIO]):
    """Handler whose lines take the place of a progress bar, which is drawn again below them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        tqdm = sys.modules.get("tqdm")
        if tqdm is None:  # whoever shows a bar has imported it
            super().emit(record)
            return
        with tqdm.tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def end_bars() -> None:
    """Close the progress bars that a failure has left open: its message gets a line of its own."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(getattr(getattr(tqdm, "tqdm", None), "_instances", ())):
        bar.close()


def set_up_logging() -> None:
    """Send our own messages to stderr, one line each; of a run's other ranks only warnings."""
    sys.excepthook = show_traceback
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    handler = _BesideBars(sys.stderr)
    handler.setFormatter(_PrintableFormatter("[dataflex] %(message)s"))
    for name in ("dataflex", "gradstore", "gradkernels"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(handler)
            logger.setLevel(level)
            logger.propagate = False
