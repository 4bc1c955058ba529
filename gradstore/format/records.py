"""Records of a generation (`GenerationRecord`) and of its rows (`RowSet`)."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, SupportsFloat

import numpy as np

from gradstore.errors import BadInput, expect, expect_whole
from gradstore.format.canonical import Json, plain
from gradstore.format.layout import EMBEDDING
from gradstore.format.names import GenerationName, Role, space_run
from gradstore.format.sources import Sources, check_sources

HASH_BYTES = 16
_SHA256 = re.compile(r"[0-9a-f]{64}")

#: In place of the hash and the source of a row that was removed on request; of no row's bytes.
NO_HASH = hashlib.blake2b(b"a row that was removed on request", digest_size=HASH_BYTES).digest()
NO_SOURCE = ("forgotten", 0)

#: Key of `libraries` under which an exporter says where it loaded its model from; never compared.
LOADED_FROM = "loaded_from"

_NOT_IDENTITY = ("name", "run_id", "learning_rate", "libraries")
#: Fields of a row's share of a step that are estimated from the state and the rows compared anyway;
#: their last digits depend on how rows were batched.
_ESTIMATES = ("tokens", "norm")


@dataclass(frozen=True, kw_only=True)
class GenerationRecord:
    """Record of the inputs that made one generation of features; kept in its plan.

    Attributes:
        name: `[run/]train/<step>` or `[run/]target/<set>/<step>`, without attempt.
        role: train or target.
        set: name of the target set as the user gave it, "" for train.
        step: optimizer step of the checkpoint.
        run_id: stable id of the training run; equal = a resume or replay, different = another run.
        adapter_hash: hash of the trainable parameters the gradients or embeddings were taken at;
            of the whole model, where embeddings come from another one than is trained.
        optimizer_hash: hash of the moments, None where the feature needs none.
        effective_seed: seed of this generation's projection, hash(base seed, step); 0 without one.
        autocast: dtype of autocast, or "off".
        attention: attention implementation.
        projection: `ProjectionSpec.to_dict()` with the effective seed; {} for embeddings.
        feature: adam_marginal | adam | sgd | sign | embedding.
        feature_options: eps mode, bias correction, betas ...; pooling, layer ... of embeddings.
        learning_rate: mean learning rate since the previous generation, None if unknown.
        libraries: versions, GPU, world size: a difference only warns. Under `LOADED_FROM`, where
            model and checkpoints lay, which is not even told.
    """

    name: str
    role: Role
    step: int
    set: str = ""
    run_id: str
    adapter_hash: str
    effective_seed: int
    projection: Mapping[str, Any]
    feature: str
    feature_options: Mapping[str, Any] = field(default_factory=dict)
    optimizer_hash: str | None = None
    learning_rate: float | None = None
    autocast: str = "off"
    attention: str = "eager"
    libraries: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parsed = self.parsed
        if parsed.attempt != 1:
            raise BadInput(f"{self.name!r}: the store gives the attempt; leave it out")
        if (parsed.role, parsed.set, parsed.step) != (self.role, self.set, self.step):
            raise BadInput(
                f"{self.name!r} does not name {self.role} {self.set!r} step {self.step}; "
                "build names with gradstore.format.names.GenerationName"
            )
        self._check_types()
        if not self.run_id:
            raise BadInput("run_id is empty; give an id that stays the same when the run resumes")
        rate = self.learning_rate
        fits = rate is None or (isinstance(rate, SupportsFloat) and not isinstance(rate, str))
        expect(fits, "learning_rate", rate, "a number or None")
        plain(vars(self), "record")

    def _check_types(self) -> None:
        """Raise BadInput where a field could be written and not be read, or not be worked with."""
        for name in ("run_id", "adapter_hash", "feature", "autocast", "attention"):
            expect(isinstance(getattr(self, name), str), name, getattr(self, name), "a text")
        digest = self.optimizer_hash
        expect(
            digest is None or isinstance(digest, str), "optimizer_hash", digest, "a text or None"
        )
        for name in ("step", "effective_seed"):
            expect_whole(getattr(self, name), name, least=None)
        for name in ("projection", "feature_options", "libraries"):
            expect(isinstance(getattr(self, name), Mapping), name, getattr(self, name), "a mapping")
        for name in ("curvature", "share"):
            told = self.feature_options.get(name) or {}
            expect(isinstance(told, Mapping), f"feature_options.{name}", told, "a mapping")
        if self.curvature:
            digest = self.curvature.get("sha256")
            fits = isinstance(digest, str) and _SHA256.fullmatch(digest) is not None
            expect(fits, "feature_options.curvature.sha256", digest, "a sha256 in hex")
            damping = self.curvature.get("damping")
            fits = isinstance(damping, SupportsFloat) and not isinstance(damping, str)
            expect(fits, "feature_options.curvature.damping", damping, "a number")

    @property
    def parsed(self) -> GenerationName:
        """The parts of the name."""
        return GenerationName.parse(self.name)

    @property
    def run(self) -> str:
        """Prefix of this run's generations, "" by default."""
        return self.parsed.run

    @property
    def is_sample(self) -> bool:
        """Flag for a set sampled from the training rows: nothing to score others against."""
        return self.feature_options.get("sample_of") == "train"

    @property
    def curvature(self) -> Mapping[str, Any]:
        """The metric that gradients were put into (`KroneckerFactors.options`); {} for none."""
        found: Mapping[str, Any] = self.feature_options.get("curvature") or {}
        return found

    def to_dict(self) -> dict[str, Json]:
        """Return the record as plain JSON values."""
        return {each.name: plain(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Json]) -> GenerationRecord:
        """Read the output of `to_dict()`; raise BadInput when a field is missing or unknown."""
        known = {each.name for each in fields(cls)}
        if set(document) != known:
            odd = ", ".join(sorted(set(document) ^ known))
            raise BadInput(f"a generation's record has missing or unknown fields: {odd}")
        return cls(**document)

    def identity(self) -> dict[str, Json]:
        """Return the fields that must be equal for features of an earlier attempt to be reused."""
        found = {key: value for key, value in self.to_dict().items() if key not in _NOT_IDENTITY}
        if share := self.feature_options.get("share"):
            told = {key: value for key, value in share.items() if key not in _ESTIMATES}
            found["feature_options"] = plain({**self.feature_options, "share": told}, "options")
        return found


def row_hash(input_ids: Sequence[int], labels: Sequence[int]) -> bytes:
    """Compute the 16-byte blake2b of one row's token ids and labels.

    Args:
        input_ids: (t,) token ids, without padding.
        labels: (t,) labels, -100 where there is no target.

    Raises:
        BadInput: they are no whole numbers (t,).
    """
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for values in (input_ids, labels):
        given = np.asarray(values)
        whole = given.ndim == 1 and (given.dtype.kind in "iu" or given.size == 0)
        expect(whole, "token ids or labels", values, "whole numbers (t,)")
        ids = np.ascontiguousarray(given, dtype="<i8")
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.tobytes())
    return digest.digest()


@dataclass(frozen=True, eq=False, init=False)
class RowSet:
    """The rows of a data set, in order.

    Attributes:
        hashes: (n, 16) uint8, `row_hash` of each row; equal rows are legitimate.
        sources: (data set name, index in its file) of each row, or None.
    """

    hashes: np.ndarray
    sources: Sources | None

    def __init__(
        self, hashes: np.ndarray, sources: Sequence[tuple[str, int]] | None = None
    ) -> None:
        wanted = "uint8 (n, 16); RowSet.from_hashes makes it of the values of row_hash"
        expect(isinstance(hashes, np.ndarray), "hashes", hashes, wanted)
        if hashes.dtype != np.uint8 or hashes.ndim != 2 or hashes.shape[1] != HASH_BYTES:
            raise BadInput(f"row hashes are {hashes.dtype} {hashes.shape}; give uint8 (n, 16)")
        if len(hashes) == 0:
            raise BadInput("the data set has no rows; nothing to export; give at least one")
        if sources is not None:
            check_sources(sources, len(hashes))
        object.__setattr__(self, "hashes", hashes)
        object.__setattr__(self, "sources", None if sources is None else Sources.of(sources))

    @classmethod
    def from_hashes(
        cls, hashes: Sequence[bytes], sources: Sequence[tuple[str, int]] | None = None
    ) -> RowSet:
        """Build a row set from the values of `row_hash`."""
        hashes = tuple(hashes)
        fits = all(isinstance(one, bytes) and len(one) == HASH_BYTES for one in hashes)
        expect(fits, "hashes", hashes, "a list of the 16 bytes that row_hash returns for each row")
        flat = np.frombuffer(b"".join(hashes), dtype=np.uint8)
        return cls(flat.reshape(-1, HASH_BYTES), sources)

    def __len__(self) -> int:
        return len(self.hashes)

    @cached_property
    def sha256(self) -> str:
        """Hash of the ordered rows; the sources do not count."""
        return hashlib.sha256(np.ascontiguousarray(self.hashes).data).hexdigest()

    @property
    def duplicates(self) -> int:
        """Number of rows that repeat an earlier row."""
        kept = self.hashes[~self.forgotten]
        return len(kept) - len(np.unique(_keys(kept)))

    @cached_property
    def forgotten(self) -> np.ndarray:
        """(n,) bool, True where a row was removed on request: it has `NO_HASH` and no source."""
        return np.asarray(_keys(self.hashes) == NO_HASH)

    def held_once(self, others: Iterable[RowSet]) -> RowSet:
        """Return the same rows with the same sources among `others`, else these."""
        for other in others:
            if np.array_equal(self.hashes, other.hashes) and self.sources == other.sources:
                return other
        return self

    def without(self, rows: np.ndarray) -> RowSet:
        """Return the same rows, without hash and source where `rows` (n,) bool is True."""
        if not rows.any():
            return self
        hashes = np.where(rows[:, None], _NO_HASH, self.hashes)
        sources = self.sources
        return RowSet(hashes, None if sources is None else sources.replaced(rows, NO_SOURCE))

    def difference(self, stored: RowSet) -> str:
        """Describe how these rows differ from the stored ones; "" when they do not."""
        if self.sha256 == stored.sha256:
            return ""
        if len(self) == len(stored):
            ours, theirs = _keys(self.hashes), _keys(stored.hashes)
            if np.array_equal(np.sort(ours), np.sort(theirs)):
                return "same rows, different order"
            places = np.flatnonzero(ours != theirs)
            return (
                f"{len(places):,} of {len(self):,} rows differ, first {self._spell(int(places[0]))}"
            )
        ours, theirs = _keys(self.hashes), _keys(stored.hashes)
        common = (Counter(ours.tolist()) & Counter(theirs.tolist())).total()
        return f"{len(stored):,} rows are stored, this run has {len(self):,}; {common:,} in common"

    def _spell(self, row: int) -> str:
        source = "" if self.sources is None else " ({} {})".format(*self.sources[row])
        return f"row {row}{source}"


_NO_HASH = np.frombuffer(NO_HASH, np.uint8)


def _keys(hashes: np.ndarray) -> np.ndarray:
    """View (n, 16) uint8 as (n,) 16-byte keys that compare as a whole."""
    return np.ascontiguousarray(hashes).view(f"S{HASH_BYTES}").reshape(-1)


def embedding_record(
    name: GenerationName,
    *,
    space: str,
    run_id: str,
    model_hash: str,
    options: Mapping[str, Any] | None = None,
    autocast: str = "off",
    attention: str = "eager",
    libraries: Mapping[str, Any] | None = None,
) -> GenerationRecord:
    """Give the record of a generation of embeddings.

    Args:
        name: role, set, step of the training model (0 for a model that is not trained) and the
            run's prefix (`gradstore_run`), to which the space is added.
        space: name of the space.
        run_id: id of the training run. Of a model that is not trained, the model's hash does, so
            that other runs find its embeddings again.
        model_hash: the training model's adapter hash, or the hash of the model that is not trained.
        options: pooling, layer and the like; other values are another generation.
        autocast: dtype of autocast, or "off".
        attention: attention implementation.
        libraries: versions, which only warn.
    """
    return GenerationRecord(
        name=str(replace(name, run=space_run(space, name.run))),
        role=name.role,
        step=name.step,
        set=name.set,
        run_id=run_id,
        adapter_hash=model_hash,
        effective_seed=0,
        projection={},
        feature=EMBEDDING,
        feature_options=options or {},
        autocast=autocast,
        attention=attention,
        libraries=libraries or {},
    )
