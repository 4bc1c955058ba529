"""Room in memory, as far as it has shown; kept longer than the batches that found it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Room:
    """Room for batches of one model and kind of pass.

    Attributes:
        tokens: of a padded batch; None as long as memory has not run out.
    """

    tokens: int | None = None
