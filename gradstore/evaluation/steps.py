"""Bank of single steps: each query's log-probability after one, measured once and kept.

One small sealed file per row, replaced whole, in a folder per configuration:

```text
bank/steps/3f9a02c1d4b7e856/
  configuration.json   what decides the values, the checkpoint among it
  17.json              after the step on row 17
```

A row that more queries ask for later is stepped on again for these; its file then holds them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gradstore.errors import ProvenanceMismatch
from gradstore.evaluation.bank import read_sealed
from gradstore.format.canonical import Json, canonical_json, plain, seal, sha256_json
from gradstore.storage.replace import replace_file


class StepBank:
    """Folder of what one step on a row did to queries.

    Steps of another configuration lie beside these, so one folder serves several checkpoints.

    Args:
        folder: of the bank; made if need be.
        configuration: all that decides a log-probability besides row and query, as plain JSON:
            checkpoint, rows, queries, learning rate (hashes where they are long).

    Raises:
        DamagedData: its description is not as it was written.
        StoreIOError: the folder can't be read or written.
    """

    def __init__(self, folder: str | Path, configuration: Mapping[str, object]) -> None:
        description: Json = plain(configuration, "configuration")
        self.configuration_hash = sha256_json(description)
        self.folder = Path(folder) / "steps" / self.configuration_hash[:16]
        path = self.folder / "configuration.json"
        if read_sealed(path) is None:
            replace_file(path, canonical_json(seal({"configuration": description})))

    def known(self, row: int) -> dict[int, float]:
        """Return the log-probability of each query that was measured after a step on a row.

        Raises:
            ProvenanceMismatch: the entry is another row's, or of another configuration.
            DamagedData: it is not as it was written.
            StoreIOError: it can't be read.
        """
        path = self._path(row)
        if (found := read_sealed(path)) is None:
            return {}
        if (found["configuration"], found["row"]) != (self.configuration_hash, row):
            raise ProvenanceMismatch(
                f'"{path}" is of row {found["row"]} and configuration {found["configuration"][:12]}'
                f", not of row {row} and {self.configuration_hash[:12]}; remove it"
            )
        return {int(query): value for query, value in found["log_probabilities"].items()}

    def keep(self, row: int, measured: Mapping[int, float]) -> None:
        """Keep what was measured after a step on a row, beside what is known of it.

        Args:
            row: its position.
            measured: query -> log-probability.

        Raises:
            BadInput: a value is not finite.
            StoreIOError: the folder can't be written.
        """
        held = {**self.known(row), **measured}
        entry = {
            "configuration": self.configuration_hash,
            "row": row,
            "log_probabilities": {str(query): value for query, value in held.items()},
        }
        replace_file(self._path(row), canonical_json(seal(entry)))

    def _path(self, row: int) -> Path:
        return self.folder / f"{row}.json"
