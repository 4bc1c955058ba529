"""Which failures are the user's or the machine's, and the exit code each ends with."""

from __future__ import annotations

from dataclasses import dataclass

from gradstore.errors import BadInput, StoreError, StoreIOError


@dataclass(frozen=True)
class Failure:
    """One message for stderr and the code the process exits with."""

    code: int
    message: str


def explain(error: BaseException) -> Failure | None:
    """Exit code and message of a failure to tell in one line; None for a bug (a traceback)."""
    if isinstance(error, StoreError):
        return Failure(error.exit_code, str(error))
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        kind = BadInput if isinstance(error, FileNotFoundError) else StoreIOError
        where = f" ({error.filename})" if error.filename else ""
        return Failure(kind.exit_code, f"{error.strerror}{where}")
    if isinstance(error, KeyboardInterrupt):
        return Failure(
            130, "interrupted. Run the same command again: it goes on from the newest checkpoint."
        )
    return None
