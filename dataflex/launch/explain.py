"""Questions about an answer: the training rows that taught a model to give it.

```
explainer = dataflex.open_model("runs/less/gradstore")
answer = explainer.explain("sort 3 1 2", "1 2 3", top=5)
why = explainer.why(answer.helped[0].row, "sort 3 1 2", "1 2 3")
```

Letters: n training rows, d projected dimensions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gradkernels import ProjectionSpec

from dataflex.bridge.questions import Encoded, QuestionModel, load_for_questions
from dataflex.bridge.quiet import choose_verbosity
from dataflex.checkpoints.weights import checkpoint_moments, load_adapter
from dataflex.features.loaded_from import find_checkpoint, loading_arguments, newest_at_hand
from dataflex.features.question_rows import generated_answer, padded, question_row, train_row
from dataflex.features.same_model import another_model, model_differences
from dataflex.launch.explained import Explanation, Why, combined, found_rows, tokens_of
from dataflex.models.precision import autocast
from gradstore.capture.per_sample import GradientCapture
from gradstore.errors import BadInput, expect, expect_whole
from gradstore.export.features import FeatureSpec
from gradstore.export.gradient_space import adapter_hash
from gradstore.export.moments import AdamMoments
from gradstore.export.projected import export_features
from gradstore.export.share import StepShare
from gradstore.format.codec import decode, encode
from gradstore.format.layout import RowStatus, dtype_of_role
from gradstore.format.provenance import Difference
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.contributions import Contributions, contributions
from gradstore.scoring.pairing import Which, checkpoint_features
from gradstore.scoring.query import query_influence
from gradstore.storage.location import Place
from gradstore.store.generation import Generation
from gradstore.store.reader import Store, open_store

#: Tokens of an answer that the model is asked for, at most.
MAX_NEW_TOKENS = 128


def open_model(
    store: Place,
    generation: str | None = None,
    *,
    checkpoints: Which = "last",
    run: str = "",
    model: Path | str | None = None,
    checkpoint: Path | str | None = None,
    changes: Mapping[str, Any] | None = None,
    verbose: bool = False,
) -> Explainer:
    """Load the model that a store's features were made with, to ask it about answers.

    Base weights, adapter, tokenizer, template, cut, attention and precision are compared with what
    the store says.

    Args:
        store: the store's folder, s3://BUCKET/PREFIX, or https://HOST.
        generation: a train generation, such as "train/20"; None takes the newest whose checkpoint
            is there.
        checkpoints: to combine, up to that one: the last, all, or how many.
        run: prefix of the generations (`gradstore_run`).
        model: where the base model is now; None for where it was.
        checkpoint: where the checkpoint, or the folder of checkpoints, is now.
        changes: LlamaFactory's keys that take the place of recorded ones (`dataset_dir`,
            `trust_remote_code`, ...).
        verbose: show what LlamaFactory and transformers say, too.

    Returns:
        An explainer that answers question after question without loading anything again.

    Raises:
        BadInput: no such generation, or model or checkpoint are not where they were.
        ProvenanceMismatch: the model is another one; lists every difference.
    """
    choose_verbosity(verbose)
    opened = open_store(store)
    until = None
    if generation is not None:
        asked = opened.generation(generation)
        if asked.role != "train":
            raise BadInput(f"{generation!r} has target rows; name a train generation.")
        until, run = asked.step, asked.record.run
    named = None if checkpoint is None else Path(checkpoint)
    if generation is None and checkpoints == "last":
        until = newest_at_hand(opened, run, named)
    pairs = checkpoint_features(opened, checkpoints, run=run, until=until)
    folders = [find_checkpoint(_train(pair), opened.path, named) for pair in pairs]
    first = None if None in folders else folders[0]
    keys = {**(changes or {}), **({} if model is None else {"model_name_or_path": str(model)})}
    loaded = load_for_questions(loading_arguments(_train(pairs[0]), first, keys))
    return Explainer(opened, pairs, folders, loaded)


class Explainer:
    """A loaded model and the generations to ask; threads take turns.

    Attributes:
        generations: names of the train generations that are combined, oldest first.
    """

    def __init__(
        self,
        store: Store,
        pairs: list[CheckpointFeatures],
        folders: list[Path | None],
        loaded: QuestionModel,
    ) -> None:
        """Take a model loaded with the adapter of `folders[0]`, and compare it; see `open_model`.

        Raises:
            ProvenanceMismatch: it is not the one that the generations were made with.
        """
        self.generations = tuple(_train(pair).name for pair in pairs)
        self._store, self._pairs, self._folders, self._loaded = store, pairs, folders, loaded
        self._texts = store.texts(_train(pairs[-1]))
        self._lock = threading.RLock()
        args = loaded.training_args
        self._precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "off"
        with GradientCapture(loaded.model) as capture:
            self._slots = capture.slots
        trained = {slot.name for slot in self._slots}
        self._trained = {n: p for n, p in loaded.model.named_parameters() if n in trained}
        self._states: list[dict[str, torch.Tensor]] = []
        differences = model_differences(_train(pairs[0]), loaded, self._slots, self._precision)
        for number, pair in enumerate(pairs):
            folder, train = folders[number], _train(pair)
            if number > 0 and folder is not None:
                load_adapter(loaded.model, folder)
            self._states.append({n: p.detach().clone() for n, p in self._trained.items()})
            found = adapter_hash(loaded.model, trained)
            if found != train.record.adapter_hash:
                field = f"adapter_hash of {train.name}"
                differences.append(Difference(field, train.record.adapter_hash, found))
        if differences:
            raise another_model(str(store.path), differences)

    def answer(self, prompt: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """Return the model's own answer to a prompt, greedy, at the newest checkpoint asked.

        Raises:
            BadInput: the prompt leaves no room for an answer, or the answer is empty.
        """
        expect_whole(max_new_tokens, "max_new_tokens")
        with self._lock:
            self._load(len(self._pairs) - 1)
            return generated_answer(
                self._loaded, prompt, max_new_tokens=max_new_tokens, autocast=self._precision
            )

    def features(self, prompt: str, response: str) -> dict[str, npt.NDArray[np.float32]]:
        """Compute the target features of an answer, rounded as the store would keep them.

        Args:
            prompt: content of the user's turn.
            response: content of the answer.

        Returns:
            Train generation -> (1, d) float32.

        Raises:
            BadInput: text that is longer than cutoff_len, or has no gradient.
        """
        with self._lock:
            row = self._question(prompt, response)
            found = {}
            for number, pair in enumerate(self._pairs):
                train = _train(pair)
                self._load(number)
                parts = export_features(
                    self._loaded.model,
                    [(np.array([0]), padded(self._loaded, row))],
                    features=self._target_features(pair),
                    projection=ProjectionSpec.from_dict(train.record.projection),
                )
                with autocast(self._loaded.model, self._precision):
                    (made,) = list(parts)
                if made.status[0] != RowStatus.OK:
                    reason = RowStatus(int(made.status[0])).name.lower()
                    raise BadInput(
                        f"the gradient of the answer at {train.name} cannot be used: {reason}."
                    )
                stored = dtype_of_role(train.dtype, "target")
                kept = encode(made.features, np.array([True]), stored)
                found[train.name] = decode(*kept, stored)
            return found

    def explain(
        self,
        prompt: str,
        response: str | None = None,
        top: int = 10,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        on_rows: Callable[[int], None] | None = None,
    ) -> Explanation:
        """Find the training rows that helped and that hurt an answer.

        Args:
            prompt: content of the user's turn.
            response: content of the answer; None lets the model answer.
            top: rows to name on each side.
            max_new_tokens: length of the model's own answer, at most.
            on_rows: called with the number of training rows just scored.

        Raises:
            BadInput: text that is longer than cutoff_len, empty, or has no gradient; top < 1.
        """
        expect_whole(top, "top")
        generated = response is None and self._loaded.stage != "pt"
        with self._lock:
            said = self.answer(prompt, max_new_tokens=max_new_tokens) if generated else response
            said = said or ""
            made = self.features(prompt, said)
            pairs = [
                CheckpointFeatures(pair.train, [made[_train(pair).name]], pair.weight)
                for pair in self._pairs
            ]
            found = query_influence(pairs, 0, top=top, on_rows=on_rows)
            helped, hurt = (
                found_rows(rows, found.values, _train(self._pairs[-1]), self._texts)
                for rows in (found.helped, found.hurt)
            )
        return Explanation(
            prompt, said, generated, self.generations, found.values, helped, hurt, found.skipped
        )

    def why(self, row: int, prompt: str, response: str) -> Why:
        """Take the influence of one training row on an answer apart: modules and tokens, exactly.

        Args:
            row: position of the training row.
            prompt: content of the user's turn.
            response: content of the answer.

        Raises:
            BadInput: no such row, or its tokens cannot be made again; as for `features`.
            ProvenanceMismatch: the row's data set has changed, or the optimizer's moments have.
        """
        row = expect_whole(row, "row", None)
        with self._lock:
            train = _train(self._pairs[-1])
            theirs = train_row(self._loaded, train, self._texts, row)
            ours = self._question(prompt, response)
            parts = {
                _train(pair).name: (pair.weight, self._contributions(number, theirs, ours))
                for number, pair in enumerate(self._pairs)
            }
            made = self.features(prompt, response)
            score = sum(pair.weight * _cosine(_train(pair), row, made) for pair in self._pairs)
            values = np.full(train.rows, np.nan, dtype=np.float32)
            values[row] = score
            exact, modules, row_parts, query_parts, momentum = combined(parts)
            return Why(
                found_rows([row], values, train, self._texts)[0],
                exact,
                parts,
                modules,
                tokens_of(self._loaded.tokenizer, theirs, row_parts),
                tokens_of(self._loaded.tokenizer, ours, query_parts),
                momentum,
            )

    def _contributions(self, number: int, theirs: Encoded, ours: Encoded) -> Contributions:
        """Take the pair apart at one checkpoint."""
        pair, loaded = self._pairs[number], self._loaded
        spec = self._spec(_train(pair))
        moments = self._moments(number) if spec.needs_moments else None
        self._load(number)
        with autocast(loaded.model, self._precision):
            return contributions(
                loaded.model,
                padded(loaded, theirs),
                padded(loaded, ours),
                features=spec,
                query_features=self._target_features(pair),
                moments=moments,
            )

    def _spec(self, generation: Generation) -> FeatureSpec:
        """Return the specification that a generation's features were made by."""
        options = generation.record.feature_options
        named = {key: options[key] for key in ("adam_eps_mode", "bias_correction")
                 if key in options}  # fmt: skip
        if "share" in options:
            named["share"] = StepShare(**options["share"])
        if (factors := self._store.factors(generation)) is not None:
            named["curvature"] = factors.to(next(self._loaded.model.parameters()).device)
        return FeatureSpec(generation.record.feature, **named)  # type: ignore[arg-type]

    def _target_features(self, pair: CheckpointFeatures) -> FeatureSpec:
        return self._spec(pair.targets[0])  # type: ignore[arg-type]

    def _moments(self, number: int) -> AdamMoments:
        """Read the moments that a generation's features were made with."""
        train, folder = _train(self._pairs[number]), self._folders[number]
        if folder is None:
            raise BadInput(
                f"{train.name} has features of an optimizer that had not stepped, which no "
                "checkpoint keeps: name a later generation."
            )
        moments = checkpoint_moments(folder, self._loaded.model)
        found, stored = moments.sha256(), train.record.optimizer_hash
        if found != stored:
            difference = Difference(f"optimizer_hash of {train.name}", stored, found)
            raise another_model(str(self._store.path), [difference])
        return moments

    def _question(self, prompt: str, response: str) -> Encoded:
        expect(isinstance(prompt, str), "prompt", prompt, "text")
        expect(isinstance(response, str), "response", response, "text")
        if not response.strip() and self._loaded.stage != "pt":
            raise BadInput("the response is empty: give one, or leave it out for the model's own.")
        return question_row(self._loaded, prompt, response)

    def _load(self, number: int) -> None:
        """Put a checkpoint's adapter into the model; nothing is read from disk."""
        with torch.no_grad():
            for name, value in self._states[number].items():
                self._trained[name].copy_(value)


def _train(pair: CheckpointFeatures) -> Generation:
    return pair.train  # type: ignore[return-value]


def _cosine(train: Generation, row: int, made: Mapping[str, npt.NDArray[np.float32]]) -> float:
    """Compute the store's cosine of one row to the answer's features; NaN for an unusable row."""
    ours, theirs = made[train.name][0].astype(np.float64), train.take([row])[0]
    return float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs.astype(np.float64))))
