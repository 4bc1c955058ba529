"""Rows whose rule only the answer tells: the same questions, answered under one of eight rules.

A question is a made-up word of five to seven letters under one of four wordings that all rules
share; the answer is a permutation of its letters, letter by letter. Bags of letters are therefore
equal, and neither the question nor the vocabulary says which rule a row follows. A fifth of the
training rows are wrong: an order that none of the rules gives.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "tiny"))

from make import _word as made_up_word  # type: ignore[import-not-found]

Row = dict[str, str]
Letters = list[str]

TRAIN_PER_RULE, WRONG_ROWS, TARGET_ROWS, HELDOUT_ROWS = 100, 200, 32, 64
WORDINGS = ("Put it in order.", "Write it anew.", "Answer in letters.", "Move the letters.")
LONGEST = 10
VOWELS = frozenset("aeiou")


def _swap_pairs(word: Letters) -> Letters:
    out = word[:]
    out[0 : len(word) // 2 * 2 : 2] = word[1::2]
    out[1::2] = word[0 : len(word) // 2 * 2 : 2]
    return out


RULES: dict[str, Callable[[Letters], Letters]] = {
    "reverse": lambda word: word[::-1],
    "rising": lambda word: sorted(word),
    "falling": lambda word: sorted(word, reverse=True),
    "left": lambda word: word[1:] + word[:1],
    "right": lambda word: word[-1:] + word[:-1],
    "pairs": _swap_pairs,
    "odds": lambda word: word[::2] + word[1::2],
    "vowels": lambda word: sorted(word, key=lambda letter: letter not in VOWELS),
}
WRONG = "wrong"


def make_rows(seed: int) -> dict[str, list[Row]]:
    """Rows by data set: `rules_train`, and of every rule `rules_target_*`, `rules_heldout_*`.

    No word occurs twice, and every rule orders each word in its own way.
    """
    rng, seen = random.Random(seed), set[str]()

    def fresh() -> Letters:
        while True:
            word = list(made_up_word(rng))
            orders = {tuple(rule(word)) for rule in RULES.values()} | {tuple(word)}
            if "".join(word) not in seen and len(orders) == len(RULES) + 1:
                seen.add("".join(word))
                return word

    def row(kind: str) -> Row:
        word = fresh()
        answer = _wrong_order(word, rng) if kind == WRONG else RULES[kind](word)
        return {
            "instruction": rng.choice(WORDINGS),
            "input": "-".join(word),
            "output": "-".join(answer),
            "skill": kind,
        }

    train = [row(rule) for rule in RULES for _ in range(TRAIN_PER_RULE)]
    train += [row(WRONG) for _ in range(WRONG_ROWS)]
    rng.shuffle(train)
    made = {"rules_train": train}
    for rule in RULES:
        made[f"rules_target_{rule}"] = [row(rule) for _ in range(TARGET_ROWS)]
        made[f"rules_heldout_{rule}"] = [row(rule) for _ in range(HELDOUT_ROWS)]
    return made


def _wrong_order(word: Letters, rng: random.Random) -> Letters:
    right = {tuple(rule(word)) for rule in RULES.values()} | {tuple(word)}
    while True:
        order = word[:]
        rng.shuffle(order)
        if tuple(order) not in right:
            return order


def write_data(folder: Path, seed: int) -> None:
    """Write the rows of a seed as a LlamaFactory `dataset_dir`."""
    info = {}
    for name, rows in make_rows(seed).items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        info[name] = {"file_name": f"{name}.json"}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
