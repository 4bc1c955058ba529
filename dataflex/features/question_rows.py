"""Rows of a question: a request and its answer, or a training row made again, checked by hash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dataflex.bridge.questions import Encoded, QuestionModel
from dataflex.data.rows import IGNORED
from dataflex.models.generate import continuations, pad_id
from gradstore.capture.limits import max_positions
from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.format.records import NO_HASH, row_hash

if TYPE_CHECKING:
    from gradstore.store.generation import Generation
    from gradstore.store.texts import RowTexts

#: Stands for bytes that are not yet a whole character.
_HALF = "\N{REPLACEMENT CHARACTER}"


def question_row(loaded: QuestionModel, prompt: str, response: str) -> Encoded:
    """Tokenise a question with its answer; a row that training would cut is refused.

    Raises:
        BadInput: more tokens than `cutoff_len` or the model takes, or no target token.
    """
    whole = loaded.encode(prompt, response, cut=False)
    tokens, cutoff = len(whole["input_ids"]), int(loaded.data_args.cutoff_len)
    if tokens > cutoff:
        raise BadInput(
            f"prompt and response have {tokens:,} tokens, but the store's rows were cut at "
            f"cutoff_len {cutoff:,}: shorten them."
        )
    longest = max_positions(loaded.model)
    if longest is not None and tokens > longest:
        raise BadInput(
            f"prompt and response have {tokens:,} tokens, the model takes {longest:,}: shorten "
            "them."
        )
    row = loaded.encode(prompt, response)
    if all(label == IGNORED for label in row["labels"][1:]):
        raise BadInput("prompt and response have no token to learn; give a response.")
    return row


def generated_answer(
    loaded: QuestionModel, prompt: str, *, max_new_tokens: int, autocast: str
) -> str:
    """Let the model answer a request, greedily.

    Args:
        loaded: the model.
        prompt: the request.
        max_new_tokens: length of the answer, at most; what cutoff_len leaves, if that is less.
        autocast: dtype name of mixed precision, or "off".

    Raises:
        BadInput: the request leaves no room for an answer, or the answer is empty.
    """
    request, cutoff = loaded.request(prompt), int(loaded.data_args.cutoff_len)
    longest = min(cutoff, max_positions(loaded.model) or cutoff)
    # One for the end of the answer, which the template adds.
    room = longest - len(request) - 1
    if room < 1:
        raise BadInput(
            f"the prompt has {len(request):,} tokens and leaves no room for an answer: the store's "
            f"rows were cut at cutoff_len {cutoff:,}. Shorten it."
        )
    (ids,) = continuations(
        loaded.model,
        [request],
        max_new_tokens=min(max_new_tokens, room),
        stops=loaded.stops,
        pad=pad_id(loaded.tokenizer),
        autocast=autocast,
    )
    answer = str(loaded.tokenizer.decode(ids, skip_special_tokens=True)).strip()
    if not answer:
        raise BadInput("the model's own answer to the prompt is empty; give one with --response.")
    return answer


def train_row(
    loaded: QuestionModel, train: Generation, texts: RowTexts | None, row: int
) -> Encoded:
    """Make the tokens of a training row again; their hash must be the stored one.

    From the store's text, where that and the template make the row; else from the data set's file,
    which has turns, system text and tools apart.

    Args:
        loaded: tokenizer, template and where the data sets are.
        train: generation of the training rows.
        texts: text of its rows, if the store keeps it.
        row: position of the row.

    Raises:
        BadInput: no such row, or it can be made of neither, or it has images, videos or audio.
        ProvenanceMismatch: the file has another row there now.
    """
    if not 0 <= row < train.rows:
        raise BadInput(f"row {row} requested, {train.name} has rows 0 to {train.rows - 1}")
    wanted = bytes(train.row_hash[row])
    if wanted == NO_HASH:
        raise BadInput(f"row {row} was removed from the store on request; ask about another row")
    if texts is not None:
        text = texts.read([row])[0]
        try:
            made = loaded.encode(text.prompt, text.response)
            if row_hash(made["input_ids"], made["labels"]) == wanted:
                return made
        except BadInput:
            pass  # text with placeholders of images, which the template cannot hold alone
    source = None if train.sources is None else train.sources[row]
    where = f"row {row}" + ("" if source is None else f" ({source[0]}[{source[1]}])")
    if source is None:
        raise BadInput(
            f"{where} cannot be made again: the store does not know its data set, and its text "
            "does not make it (packed rows cannot be taken apart)."
        )
    try:
        found = loaded.source_row(*source)
    except BadInput as error:
        lacks = "the store keeps no text" if texts is None else "its text alone does not make it"
        raise BadInput(
            f"{where} cannot be made again: {lacks}, and {error} Name the folder of the data sets "
            "with dataset_dir=DIR, or build the store again with store_text: true."
        ) from error
    if found is not None and loaded.has_media(found):
        raise BadInput(f"{where} has images, videos or audio, which cannot be taken apart yet.")
    if found is None or row_hash(found["input_ids"], found["labels"]) != wanted:
        line = f"{where} differs: the data set has another row there than the store was made of"
        raise ProvenanceMismatch(
            f"{line}. Restore the data set's file, or build the store again.", [line]
        )
    return found


def padded(loaded: QuestionModel, row: Encoded) -> dict[str, Any]:
    """Collate one row on the model's device, as the export of its generation did."""
    kept = {key: row[key] for key in ("input_ids", "attention_mask", "labels") if key in row}
    if loaded.stage == "pt":
        kept.pop("labels")  # the collator makes them
    device = next(loaded.model.parameters()).device
    batch = loaded.collate([kept])
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:  # noqa: ANN401
    """Decode tokens one by one so that they read as the whole text when joined.

    A character of several tokens appears with its last one.
    """
    shown, before = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False))
        if text.endswith(_HALF) and end < len(ids):
            shown.append("")
            continue
        shown.append(text[len(before) :])
        before = text
    return shown
