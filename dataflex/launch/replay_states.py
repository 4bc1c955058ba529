"""A replay's finished segments on disk, from which the same command goes on after a kill.

```text
replay.parquet.states/
  states.json             what decides the result, sealed
  state-0001.safetensors  where segment 1 ends: parameters and moments
  backwards.safetensors   derivatives after the segment that was gone back through last
```

Letters: p numbers that are trained, q queries, n training rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import DamagedData, ProvenanceMismatch, StoreIOError
from gradstore.format.canonical import canonical_json, plain, seal, sha256_json, unseal
from gradstore.format.provenance import compare
from gradstore.replay.kept import Backwards
from gradstore.replay.steps import State
from gradstore.storage.hashing import tensor_hash
from gradstore.storage.replace import replace_file

_DESCRIPTION, _BACKWARDS = "states.json", "backwards.safetensors"


def check_states(folder: Path, description: Mapping[str, object]) -> None:
    """Refuse the states of another replay; nothing is written.

    Raises:
        ProvenanceMismatch: names what differs.
        DamagedData: their description is not as it was written.
    """
    path = folder / _DESCRIPTION
    try:
        found = unseal(path.read_bytes())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise StoreIOError(f'cannot read "{path}": {error.strerror}; check the folder') from error
    if differences := compare(found.get("replay", {}), description):
        lines = [f"{d.field} was {d.stored!r}, is {d.current!r}" for d in differences]
        raise ProvenanceMismatch(
            f'"{folder}" holds the states of another replay: {"; ".join(lines)}. Go back to that '
            "configuration, remove the folder to start again, or write to another -o",
            lines,
        )


def remove_states(folder: Path) -> None:
    """Remove a replay's states, once they are of no use; what else is in the folder stays."""
    # A write that was killed leaves its ".NAME.HEX.partial".
    for path in (*folder.glob("*.safetensors"), *folder.glob(".*.partial"), folder / _DESCRIPTION):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds somebody else's file
        folder.rmdir()


class States:
    """Folder of a replay's states; `gradstore.replay.kept.Kept`.

    Args:
        folder: made with the first state.
        description: what decides the result, as plain JSON.
        ended: parameters with which the recorded training ended. States of a training that ended
            elsewhere, to the bit, are refused.
        device: of the states.

    Raises:
        ProvenanceMismatch: the folder is another replay's.
        DamagedData: what is in it is not as it was written.
        StoreIOError: it can't be read or written.
    """

    def __init__(
        self,
        folder: Path,
        description: Mapping[str, object],
        ended: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self.folder, self._device = folder, device
        self._of = {
            "replay": sha256_json(description),
            "ended": tensor_hash(sorted(ended.items())),
        }
        check_states(folder, description)
        document = seal({"replay": plain(description, "replay")})
        replace_file(folder / _DESCRIPTION, canonical_json(document))

    def state(self, number: int) -> State | None:
        """Return the state in which segment `number` (from 1) ends; None where it is not kept."""
        found = self._read(_name(number))
        return None if found is None else State(_vectors(found, "state"))

    def keep_state(self, number: int, state: State) -> None:
        """Keep that state."""
        self._write(_name(number), {f"state.{i}": v for i, v in enumerate(state.vectors)})

    def backwards(self) -> Backwards | None:
        """Return the way back as far as it went; None where it did not begin."""
        found = self._read(_BACKWARDS)
        if found is None:
            return None
        by_weight = found["found"].cpu().numpy().astype(np.float64)
        cotangents = [_vectors(found, str(query)) for query in range(len(by_weight))]
        return Backwards(int(found["segments"]), cotangents, by_weight)

    def keep_backwards(self, done: Backwards) -> None:
        """Keep a segment's end in the place of what was kept before."""
        held = {f"{query}.{i}": vector for query, vectors in enumerate(done.cotangents)
                for i, vector in enumerate(vectors)}  # fmt: skip
        numbers = {"found": torch.from_numpy(done.found), "segments": torch.tensor(done.segments)}
        self._write(_BACKWARDS, {**held, **numbers})

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        seal_of = {"sha256": tensor_hash(sorted(held.items()))}
        replace_file(self.folder / name, save(held, {**self._of, **seal_of}))

    def _read(self, name: str) -> dict[str, Tensor] | None:
        from safetensors import SafetensorError, safe_open

        path = self.folder / name
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                sealed = file.metadata() or {}
                held = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise _damaged(path, str(error)) from error
        if sealed.get("sha256") != tensor_hash(sorted(held.items())):
            raise _damaged(path, "its tensors do not have the sha256 that is written beside them")
        if any(sealed.get(key) != value for key, value in self._of.items()):
            raise ProvenanceMismatch(
                f'"{path}" is of another replay, or of a training that ended with other '
                "parameters: other weights under the model's name, or a training that is not "
                f'deterministic. Remove "{self.folder}" to start again'
            )
        return {key: value.to(self._device) for key, value in held.items()}


def _name(number: int) -> str:
    return f"state-{number:04d}.safetensors"


def _vectors(held: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, ...]:
    count = sum(key.startswith(f"{prefix}.") for key in held)
    return tuple(held[f"{prefix}.{i}"] for i in range(count))


def _damaged(path: Path, why: str) -> DamagedData:
    return DamagedData(
        f'"{path}" is not as it was written: {why}. Remove it; what it held is computed again'
    )
