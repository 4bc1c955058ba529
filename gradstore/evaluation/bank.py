"""Bank of retrained models: each query's loss after training on a subset, measured once and kept.

A retrained model is worth only the losses it gave, so these are what is kept: one small sealed file
per (subset, configuration, seed), replaced whole. A run killed at any point goes on with the next
retraining. Letters: n training rows, q queries, s subsets.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gradstore.errors import (
    BadInput,
    DamagedData,
    ProvenanceMismatch,
    StoreIOError,
    expect_whole,
)
from gradstore.evaluation.estimates import Floats, Mask, numbers, row_masks
from gradstore.format.canonical import Json, canonical_json, plain, seal, sha256_json, unseal
from gradstore.pace import duration
from gradstore.storage.replace import replace_file

#: Trains on rows (k,) int64, ascending, with a seed; returns the loss of each query, (q,).
Retrain = Callable[[npt.NDArray[np.int64], int], npt.ArrayLike]


@dataclass(frozen=True)
class Progress:
    """Stand of a filling.

    Attributes:
        done: retrainings that are in the bank.
        total: retrainings asked for.
        seconds_left: forecast by the mean time of those in the bank.
    """

    done: int
    total: int
    seconds_left: float

    def __str__(self) -> str:
        left = f", about {duration(self.seconds_left)} left" if self.done < self.total else ""
        return f"retrained {self.done:,} of {self.total:,}{left}"


class Bank:
    """Folder of measured losses of one training configuration.

    Args:
        folder: made if need be.
        configuration: all that decides the losses besides subset and seed, as plain JSON: model,
            rows, queries, hyperparameters (hashes where they are long).
        rows: n.
        queries: q.

    Raises:
        ProvenanceMismatch: the folder is the bank of another configuration; names what differs.
        DamagedData: its description is not as it was written.
        StoreIOError: the folder can't be read or written.
    """

    def __init__(
        self, folder: str | Path, configuration: Mapping[str, object], rows: int, queries: int
    ) -> None:
        self.folder = Path(folder)
        self.rows, self.queries = expect_whole(rows, "rows"), expect_whole(queries, "queries")
        described = {**configuration, "bank_rows": self.rows, "bank_queries": self.queries}
        self._description: dict[str, Json] = plain(described, "configuration")
        self.configuration_hash = sha256_json(self._description)
        path = self.folder / "bank.json"
        if (found := read_sealed(path)) is None:
            replace_file(path, canonical_json(seal({"configuration": self._description})))
        else:
            self._check(found.get("configuration"))

    def fill(
        self,
        subsets: npt.ArrayLike,
        retrain: Retrain,
        *,
        budget: int,
        seed: int | Sequence[int] = 0,
        tell: Callable[[Progress], None] = lambda progress: None,
        forecast: Callable[[Mask], float] | None = None,
    ) -> Floats:
        """Return the losses (s, q) after training on each subset; retrain for those not banked.

        Training itself is noisy (initial weights, order, dropout): of several seeds each loss is
        the mean, whose noise is smaller by the root of their number.

        Args:
            subsets: (s, n) bool, True for rows to train on.
            retrain: called for each subset that is missing; the losses it returns are kept at once.
            budget: retrainings that may be made now.
            seed: of the training; or several, each of which retrains on every subset.
            tell: called after each retraining.
            forecast: seconds of retraining on a subset (n,); asked where the budget is short and
                no entry says it.

        Raises:
            BadInput: before any work, if more retrainings are missing than the budget allows, a
                subset is empty or there is no seed; losses of another shape, or not finite.
            ProvenanceMismatch: an entry was measured with another configuration.
            DamagedData: an entry is not as it was written.
            StoreIOError: the folder can't be read or written.
        """
        masks = row_masks(subsets, "subsets", self.rows)
        if (empty := np.flatnonzero(~masks.any(axis=1))).size:
            raise BadInput(f"subset {empty[0]} holds no row to train on; give at least one")
        allowed, seeds = expect_whole(budget, "budget", 0), _seeds(seed)
        # The first seed's models come first: they alone are an answer, if a noisier one.
        entries = {self._path(mask, each): (mask, each) for each in seeds for mask in masks}
        known = {path: entry for path in entries if (entry := self._entry(path)) is not None}
        if (missing := len(entries) - len(known)) > allowed:
            seconds = _mean_seconds(known) if known else forecast(masks[0]) if forecast else None
            raise self._budget_short(missing, len(known), seconds, allowed)
        for path, (mask, each) in entries.items():
            if path in known:
                continue
            known[path] = self._measure(path, mask, retrain, each)
            left = len(entries) - len(known)
            tell(Progress(len(known), len(entries), left * _mean_seconds(known)))
        losses = [[known[self._path(mask, each)]["losses"] for each in seeds] for mask in masks]
        return np.asarray(np.mean(losses, axis=1), dtype=np.float64)

    def _measure(self, path: Path, mask: Mask, retrain: Retrain, seed: int) -> dict[str, Json]:
        began = time.perf_counter()
        wanted = f"one loss for each of {self.queries} queries"
        losses = numbers(np.asarray(retrain(np.flatnonzero(mask), seed)), "losses", 1, wanted)
        if losses.size != self.queries:
            raise BadInput(f"retraining gave {losses.size} losses; it must give {wanted}")
        entry = {
            "configuration": self.configuration_hash,
            "subset": _subset_hash(mask),
            "seed": seed,
            "rows": int(mask.sum()),
            "losses": losses,
            "seconds": time.perf_counter() - began,
        }
        document = seal(entry)
        replace_file(path, canonical_json(document))
        return document

    def _path(self, mask: Mask, seed: int) -> Path:
        return self.folder / "entries" / f"{_subset_hash(mask)[:32]}-{seed}.json"

    def _entry(self, path: Path) -> dict[str, Json] | None:
        entry = read_sealed(path)
        if entry is not None and entry["configuration"] != self.configuration_hash:
            raise ProvenanceMismatch(
                f'"{path}" was measured with another training configuration '
                f"({entry['configuration'][:12]}, not {self.configuration_hash[:12]}); remove it"
            )
        return entry

    def _check(self, found: Json) -> None:
        """Raise ProvenanceMismatch, naming each key, unless the configuration is this one."""
        ours, theirs = self._description, found if isinstance(found, dict) else {}
        differences = [
            f"{key}: {theirs.get(key)!r} in the bank, {ours.get(key)!r} now"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key) or (key in ours) != (key in theirs)
        ]
        if differences:
            raise ProvenanceMismatch(
                f'"{self.folder}" is the bank of another configuration: {"; ".join(differences)}. '
                "Choose another folder, or go back to that configuration",
                differences,
            )

    def _budget_short(
        self, missing: int, known: int, seconds: float | None, budget: int
    ) -> BadInput:
        cost = "" if seconds is None else f", about {duration(missing * seconds)}"
        return BadInput(
            f'{missing:,} retrainings are missing in "{self.folder}" ({known:,} are there)'
            f"{cost}; the budget is {budget:,}: give a budget of {missing:,}, or fewer subsets"
        )


def _seeds(given: int | Sequence[int]) -> list[int]:
    """Return the seeds, each once; raise BadInput for none, or one that is no whole number."""
    listed = list(given) if isinstance(given, Sequence) else [given]
    if not listed:
        raise BadInput("seed is empty; give at least one seed to train with")
    return list(dict.fromkeys(expect_whole(each, "seed", 0) for each in listed))


def _mean_seconds(entries: Mapping[Path, Json]) -> float:
    return float(np.mean([entry["seconds"] for entry in entries.values()]))


def _subset_hash(mask: Mask) -> str:
    """Compute the sha256 of which rows are in a subset."""
    head = f"{mask.size}:".encode()
    return hashlib.sha256(head + np.packbits(mask).tobytes()).hexdigest()


def read_sealed(path: Path) -> dict[str, Json] | None:
    """Read a sealed document of a bank; None if there is none.

    Raises:
        DamagedData: it is not as it was written.
        StoreIOError: it can't be read.
    """
    try:
        return unseal(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreIOError(f'cannot read "{path}": {error.strerror}; check the folder') from error
    except ValueError as error:
        raise DamagedData(
            f'"{path}" is not as it was written: {error}. Remove it; what it held is measured again'
        ) from error
