"""`tokenized_path` of a run by domain: one folder per source, and a manifest of what made them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.data.rows import ROW_FIELDS
from gradstore.errors import DamagedData, ProvenanceMismatch
from gradstore.format.foreign import read_json
from gradstore.storage.replace import replace_file

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 1
MANIFEST = "dataflex_manifest.json"

#: DataArguments that decide which rows there are and which tokens they have.
FIELDS = (*ROW_FIELDS, "packing", "neat_packing", "max_samples", "val_size", "tool_format",
          "default_system", "enable_thinking")  # fmt: skip

#: The rows of one source, by what they are for.
Parts = Mapping[str, "Dataset | None"]


class TokenisedPath:
    """The folder a user named in `tokenized_path`; written whole or not at all."""

    def __init__(
        self,
        path: str,
        data_args: Any,  # noqa: ANN401 - LlamaFactory's dataclasses
        training_args: Any,  # noqa: ANN401
        made_with: Mapping[str, Any],
    ) -> None:
        """Describe what would be written now.

        Args:
            path: the folder.
            data_args: LlamaFactory's DataArguments.
            training_args: its TrainingArguments.
            made_with: what else the rows depend on: stage, template, tokenizer.
        """
        self.path = Path(path).expanduser()
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "datasets": list(data_args.dataset),
            **made_with,
            **{field: getattr(data_args, field, None) for field in FIELDS},
        }
        if float(data_args.val_size) > 0:
            self.manifest["seed"] = int(training_args.seed)
            self.manifest["predict_with_generate"] = bool(training_args.predict_with_generate)

    def read(self) -> dict[str, dict[str, Dataset]] | None:
        """Read the rows of every source, or return None if there is no such folder yet.

        Raises:
            ProvenanceMismatch: the folder holds something else, or rows made otherwise.
            DamagedData: a part of it is gone.
        """
        from datasets import load_from_disk

        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return None
        held = self._manifest()
        found: dict[str, dict[str, Dataset]] = {}
        try:
            for i, name in enumerate(self.manifest["datasets"]):
                folder, rows = self.path / _folder(i, name), held["rows"][name]
                found[name] = {part: load_from_disk(folder / part) for part in rows}
                if {part: len(dataset) for part, dataset in found[name].items()} != rows:
                    raise ValueError(f"{name!r} does not have the rows it was written with")
        except (OSError, ValueError, KeyError) as error:
            raise DamagedData(
                f"tokenized_path {str(self.path)!r} is damaged ({error}). Remove the folder: the "
                "next run writes it again."
            ) from error
        return found

    def write(self, sources: Mapping[str, Parts]) -> None:
        """Save the rows of every source; the folder is published once it is complete."""
        partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.partial")
        partial.mkdir(parents=True)
        try:
            rows: dict[str, dict[str, int]] = {}
            for i, (name, parts) in enumerate(sources.items()):
                kept = {part: dataset for part, dataset in parts.items() if dataset is not None}
                rows[name] = {part: len(dataset) for part, dataset in kept.items()}
                for part, dataset in kept.items():
                    dataset.save_to_disk(partial / _folder(i, name) / part)
            text = json.dumps({**self.manifest, "rows": rows}, indent=2) + "\n"
            replace_file(partial / MANIFEST, text.encode())
            os.replace(partial, self.path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _manifest(self) -> dict[str, Any]:
        """Read the folder's manifest, and raise ProvenanceMismatch unless it matches this run."""
        try:
            held = dict(read_json((self.path / MANIFEST).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ProvenanceMismatch(
                f"tokenized_path {str(self.path)!r} holds no readable {MANIFEST}: it was not made "
                "by a run that mixes domains. Name another folder."
            ) from error
        wanted = json.loads(json.dumps(self.manifest))
        compared = [k for k in {**wanted, **held} if k != "rows"]
        changed = [k for k in compared if wanted.get(k) != held.get(k)]
        if changed:
            raise ProvenanceMismatch(
                f"tokenized_path {str(self.path)!r} was made with other settings: "
                + "; ".join(f"{k} {held.get(k)!r}, now {wanted.get(k)!r}" for k in changed)
                + ". Restore the values, or name another folder."
            )
        return held


def _folder(index: int, name: str) -> str:
    return f"{index:03}_{name.replace('/', '_')}"
