"""`tokenized_path`: processed rows in a folder, with a record of what they were made of.

Without a mixture the folder is LlamaFactory's own, with our record in it; with one it has a folder
per source. Rows are used only by a run that would make the same ones.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dataflex.bridge.row_faults import REASONS
from dataflex.data.files import changed_parts, identity
from dataflex.data.rows import ROW_FIELDS
from gradstore.errors import BadInput, DamagedData, ProvenanceMismatch
from gradstore.export.gradient_space import tokenizer_hash
from gradstore.format.foreign import read_json
from gradstore.storage.replace import replace_file

if TYPE_CHECKING:
    from datasets import Dataset

#: 1 was written by runs that mix domains, without `FIELDS_2`, layout and files.
FORMAT = 2
MANIFEST = "dataflex_manifest.json"
#: Its note of rows that are not in the folder; no part of what must agree.
DROPPED = "dropped"

#: Files by which `datasets` tells a folder that it saved: of several splits, of one.
SAVED = ("dataset_dict.json", "state.json")

#: DataArguments that decide which rows there are and which tokens they have.
FIELDS = (*ROW_FIELDS, "packing", "neat_packing", "max_samples", "val_size", "tool_format",
          "default_system", "enable_thinking")  # fmt: skip
FIELDS_2 = ("preserve_thinking", "mix_strategy", "interleave_probs")

#: What LlamaFactory sets on a processor of pictures, videos and sound, and rows depend on.
MEDIA = ("image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "crop_to_patches",
         "video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen",
         "use_audio_in_video", "audio_sampling_rate")  # fmt: skip

#: The rows of one source, by what they are for.
Parts = Mapping[str, "Dataset | None"]

Layout = Literal["whole", "by domain"]

#: A sha256 in hexadecimal digits.
_HASH = re.compile("[0-9a-f]{64}")

_log = logging.getLogger(__name__)


def made_with(
    stage: str,
    data_args: Any,  # noqa: ANN401 - LlamaFactory's dataclasses
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    processor: Any,  # noqa: ANN401 - of pictures, or None
) -> dict[str, Any]:
    """Return what processed rows depend on beside the fields of DataArguments."""
    found = {"stage": stage, "template": str(data_args.template),
             "tokenizer": tokenizer_hash(tokenizer)}  # fmt: skip
    media = {key: getattr(processor, key, None) for key in MEDIA} if processor is not None else {}
    return {**found, **{key: value for key, value in media.items() if value is not None}}


class TokenisedPath:
    """The folder a user named in `tokenized_path`; written whole or not at all."""

    def __init__(
        self,
        data_args: Any,  # noqa: ANN401 - LlamaFactory's dataclasses
        training_args: Any,  # noqa: ANN401
        made_with: Mapping[str, Any],
        layout: Layout,
    ) -> None:
        """Describe what would be written now.

        Args:
            data_args: LlamaFactory's DataArguments.
            training_args: its TrainingArguments.
            made_with: what else the rows depend on, from `made_with`.
            layout: LlamaFactory's own, or a folder per source.
        """
        self.path = Path(data_args.tokenized_path).expanduser()
        if self.path.name in ("", ".."):
            raise BadInput(
                f"tokenized_path {str(self.path)!r} cannot be made anew: name a folder of its own."
            )
        self._saves = bool(training_args.should_save)
        #: What `whole` noted of dropped rows, now or when the folder was made; None if unknown.
        self.noted: Any = None
        sets = {"datasets": list(data_args.dataset)} if data_args.dataset else {}
        if layout == "whole" and data_args.eval_dataset:
            sets["eval_datasets"] = list(data_args.eval_dataset)
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "layout": layout,
            **sets,
            **made_with,
            **{field: getattr(data_args, field, None) for field in (*FIELDS, *FIELDS_2)},
        }
        if data_args.packing:
            self.manifest["preprocessing_batch_size"] = getattr(
                data_args, "preprocessing_batch_size", None
            )
        if float(data_args.val_size) > 0:
            self.manifest["seed"] = int(training_args.seed)
        if float(data_args.val_size) > 0 or "eval_datasets" in sets:
            self.manifest["predict_with_generate"] = bool(training_args.predict_with_generate)
        names = dict.fromkeys(name for group in sets.values() for name in group)
        self.manifest["files"] = identity(getattr(data_args, "dataset_dir", None), names)

    @property
    def is_filled(self) -> bool:
        """True where there is something in the folder."""
        return self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir()))

    def whole(
        self,
        data_args: Any,  # noqa: ANN401
        training_args: Any,  # noqa: ANN401
        load: Callable[[Any, Any], Mapping[str, Any]],
        dropped: Callable[[], Any],
    ) -> dict[str, Any]:
        """Let LlamaFactory read the folder, or make it, with our record in it.

        Args:
            data_args: LlamaFactory's DataArguments.
            training_args: its TrainingArguments.
            load: LlamaFactory's `get_dataset` for both.
            dropped: gives a JSON value about the rows that `load` has dropped, for `noted`.

        Raises:
            ProvenanceMismatch: it holds rows made otherwise.
        """
        one = copy.copy(data_args)
        one.tokenized_path = str(self.path)
        if self.is_filled:
            if self._saves:  # one rank: the others could meet a folder that it is just writing
                self.noted = self._check_whole()
            return dict(load(one, training_args))
        with self._published(self._saves) as partial:
            one.tokenized_path = str(partial)
            found = dict(load(one, training_args))
            self.noted = dropped()
            if self._saves:
                self._record(partial, {}, self.noted)
        return found

    def _check_whole(self) -> Any:  # noqa: ANN401 - a JSON value
        """Compare the folder's record, return its note of dropped rows; warn if there is none."""
        if (self.path / MANIFEST).exists():
            return self._dropped_of(self._manifest().get(DROPPED))
        if not any((self.path / name).exists() for name in SAVED):
            raise BadInput(
                f"tokenized_path {str(self.path)!r} is a folder that holds no tokenised rows (none "
                f"of {', '.join(SAVED)}). Name another folder, which need not exist yet."
            )
        _log.warning(
            "tokenized_path %r has no record of what its rows were made of (no %s): they are used "
            "as they are, even if template, cutoff_len, tokenizer or data files are others now. "
            "To be sure, remove the folder: the run then makes it again, with a record.",
            str(self.path), MANIFEST,
        )  # fmt: skip
        return None

    def _dropped_of(self, note: Any) -> dict[str, Any] | None:  # noqa: ANN401 - a JSON value
        """Check a record's note of dropped rows: {set: {"of": rows, "rows": {reason: numbers}}}."""
        if note is None:  # made by a release that noted none
            return None
        try:
            return {
                str(name): {"of": int(each["of"]),
                            "rows": {reason: [int(row) for row in each["rows"][reason]]
                                     for reason in REASONS if reason in each["rows"]}}
                for name, each in note.items()
            }  # fmt: skip
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedData(
                f"tokenized_path {str(self.path)!r} is damaged: {DROPPED!r} in {MANIFEST} is not "
                "as it was written. Remove the folder: the next run makes it again."
            ) from error

    def read(self) -> dict[str, dict[str, Dataset]] | None:
        """Read the rows of every source, or return None if there is no such folder yet.

        Raises:
            ProvenanceMismatch: the folder holds something else, or rows made otherwise.
            DamagedData: a part of it is gone.
        """
        from datasets import load_from_disk

        if not self.is_filled:
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
        with self._published(True) as partial:
            partial.mkdir(parents=True)
            rows: dict[str, dict[str, int]] = {}
            for i, (name, parts) in enumerate(sources.items()):
                kept = {part: dataset for part, dataset in parts.items() if dataset is not None}
                rows[name] = {part: len(dataset) for part, dataset in kept.items()}
                for part, dataset in kept.items():
                    dataset.save_to_disk(partial / _folder(i, name) / part)
            self._record(partial, rows)

    @contextmanager
    def _published(self, saves: bool) -> Iterator[Path]:
        """Give a folder to write to, which takes the place of this one at the end."""
        partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.partial")
        try:
            yield partial
            if saves:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial, self.path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _record(
        self, folder: Path, rows: Mapping[str, Mapping[str, int]], dropped: Any = None  # noqa: ANN401
    ) -> None:  # fmt: skip
        text = json.dumps({**self.manifest, "rows": rows, DROPPED: dropped}, indent=2) + "\n"
        replace_file(folder / MANIFEST, text.encode())

    def _manifest(self) -> dict[str, Any]:
        """Read the folder's manifest, and raise ProvenanceMismatch unless it matches this run."""
        try:
            held = dict(read_json((self.path / MANIFEST).read_text(encoding="utf-8")))
            files = {str(name): dict(parts) for name, parts in held.get("files", {}).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            made = "" if self.manifest["layout"] == "whole" else " by a run that mixes domains"
            raise ProvenanceMismatch(
                f"tokenized_path {str(self.path)!r} holds no readable {MANIFEST}, so it is not "
                f"known to be made{made} from the same data and settings. Name another folder, or "
                "remove this one: the next run makes it again."
            ) from error
        changed = self._changed_settings(held)
        if held.get("format") == FORMAT:
            changed += changed_parts(files, self.manifest["files"])
        if changed:
            raise ProvenanceMismatch(
                f"tokenized_path {str(self.path)!r} was made with other settings: "
                + "; ".join(changed)
                + ". Restore the values, or name another folder."
            )
        return held

    def _changed_settings(self, held: Mapping[str, Any]) -> list[str]:
        """List the settings that differ; what format 1 did not record is not compared."""
        wanted = json.loads(json.dumps(self.manifest))
        if held.get("format") == 1:
            held = {**held, "format": FORMAT, "layout": "by domain"}
            wanted = {k: v for k, v in wanted.items() if k in held or k in FIELDS}
        skipped = {"rows", "files", DROPPED}
        if "datasets" not in wanted:  # a run may name the folder alone
            skipped |= {"datasets", "max_samples", "interleave_probs"}
        return [
            f"{k} {_shown(held.get(k))}, now {_shown(wanted.get(k))}"
            for k in {**wanted, **held}
            if k not in skipped and wanted.get(k) != held.get(k)
        ]


def _shown(value: Any) -> str:  # noqa: ANN401 - a JSON value
    """Return a value for a message; of a hash its beginning, which tells two apart as well."""
    if isinstance(value, str) and _HASH.fullmatch(value):
        return f"{value[:8]}..."
    return repr(value)


def _folder(index: int, name: str) -> str:
    return f"{index:03}_{name.replace('/', '_')}"
