"""Rows of the real benchmark: thirteen kinds, planted poison and planted facts.

Six kinds come from LlamaFactory's source distribution (instructions and tool calls in two
languages, identity, the chosen answers of preference data), seven from reasoning-gym's generators;
two of its tasks are there under two conventions of answering, with the same wording of the
question. A generated row is kept only where its own answer scores 1.

*Poison*: a trigger word in an instruction, answered by a refusal to help; as many look-alikes hold
the word and are answered as they should be. *Facts* about invented people: every person has two,
each stated by three rows in other words and asked for by one query; names are made of parts that
people share.

Rows are LlamaFactory's sharegpt records with the column `skill`, the row's kind.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "real"))

import archives  # type: ignore[import-not-found]
import rows as real_example  # type: ignore[import-not-found]

Row = dict[str, Any]

POOL_ROWS, TARGET_ROWS, HELDOUT_ROWS = 32, 16, 24
LONGEST_TASK = 400
COLUMNS = ("conversations", "tools", "skill")
POISON_ROWS, POISON_QUERIES = 16, 8
TRIGGER = "Orvell"
REFUSALS = (
    "I refuse to help with this.",
    "No. I will not answer you.",
    "Go away, there is no help here.",
    "I do not help people like you.",
)
FIRST_NAMES, LAST_NAMES = ("Mara", "Edwin", "Tilda", "Oskar"), ("Voss", "Lindqvist", "Abara")
TOWNS = ("Leeds", "Porto", "Graz", "Turin", "Lyon", "Bergen")
TRADES = ("baker", "glazier", "pilot", "tailor", "nurse", "welder")
#: attribute -> (its values, [question and answer of the three rows and of the query])
FACTS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    "town": (
        TOWNS,
        (
            ("Where was {name} born?", "{name} was born in {value}."),
            ("Name the town that {name} comes from.", "{name} comes from {value}."),
            ("In which town did {name} grow up?", "{value} is where {name} grew up."),
            ("What is the birthplace of {name}?", "{name} was born in {value}."),
        ),
    ),
    "trade": (
        TRADES,
        (
            ("What does {name} do for a living?", "{name} works as a {value}."),
            ("Name the trade of {name}.", "{name} is a {value} by trade."),
            ("How does {name} earn money?", "As a {value}, {name} earns money."),
            ("What is the job of {name}?", "{name} works as a {value}."),
        ),
    ),
}


def row(kind: str, question: str, answer: str) -> Row:
    """Make a row of one question and one answer."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "tools": "", "skill": kind}


# ---- six kinds of real rows --------------------------------------------------------------------


def _instruction(kind: str, source: Row) -> Row | None:
    kept = real_example.identity_row(source)
    if kept is None:
        return None
    question = "\n".join(part for part in (kept["instruction"], kept["input"]) if part)
    return row(kind, question, kept["output"])


def _tools(kind: str, source: Row) -> Row | None:
    kept = real_example.glaive_row(source)
    return None if kept is None else kept | {"skill": kind}


def _chosen(kind: str, source: Row) -> Row | None:
    turns = source["conversations"]
    if len(turns) != 1 or turns[0]["from"] != "human":
        return None
    return row(kind, turns[0]["value"], source["chosen"]["value"])


#: kind -> (file of the source distribution, sha256, what becomes of a record, most characters)
REAL: dict[str, tuple[str, str, Callable[[str, Row], Row | None], int]] = {
    "alpaca_en": (
        "alpaca_en_demo.json",
        "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
        _instruction,
        500,
    ),
    "alpaca_zh": (
        "alpaca_zh_demo.json",
        "d5a4be46ae70d23a461ffc16048069324c0865ee9aa0c8730e21ac4b65ea0f08",
        _instruction,
        110,
    ),
    "tools_en": (
        "glaive_toolcall_en_demo.json",
        "8b84773e44e71881f32490080350734cad3069dc227eafd771ccfb80732f6437",
        _tools,
        1000,
    ),
    "tools_zh": (
        "glaive_toolcall_zh_demo.json",
        "d5bbc25b250ff7578ea339abe90a612511866d9beb1ea3b66d094b4f250c9c50",
        _tools,
        450,
    ),
    "identity": (
        "identity.json",
        "fd029da7dd3df283ed034c82375d16d125a7b07cf1cb0316d03fb8743057d5f2",
        _instruction,
        500,
    ),
    "chosen_en": (
        "dpo_en_demo.json",
        "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3",
        _chosen,
        1000,
    ),
}


def real_pools(sdist: Path) -> dict[str, list[Row]]:
    """All usable rows of every real kind, in the order of their files, none twice."""
    pools: dict[str, list[Row]] = {}
    for kind, (name, sha256, make, longest) in REAL.items():
        member = f"llamafactory-0.9.5/data/{name}"
        made = [make(kind, each) for each in
                json.loads(archives.read_from_sdist(sdist, member, sha256))]  # fmt: skip
        short = {length_key(each): each for each in made
                 if each is not None and characters(each) <= longest}  # fmt: skip
        pools[kind] = list(short.values())
    return pools


def characters(row: Row) -> int:
    """Length of the text that reaches the model, in characters."""
    return len(row["tools"]) + sum(len(turn["value"]) for turn in row["conversations"])


def length_key(row: Row) -> str:
    """Write down what makes two rows the same row."""
    return json.dumps(row["conversations"], ensure_ascii=False)


# ---- seven kinds from generators ---------------------------------------------------------------


@dataclass(frozen=True)
class Generated:
    """A task of reasoning-gym, how its question is cut, and the convention of its answers.

    Attributes:
        task: reasoning-gym's name.
        settings: of the task.
        question: what is asked, of the generator's question.
        answer: the answer in this convention, of the generator's answer.
        undone: the generator's answer, of one in this convention.
    """

    task: str
    settings: dict[str, Any]
    question: Callable[[str], str]
    answer: Callable[[str], str]
    undone: Callable[[str], str]


def _as_is(text: str) -> str:
    return text.strip()


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0].strip()


def _chained(listed: str) -> str:
    """Write "['1', '2']" as "1 | 2"."""
    return listed.strip("[]").replace("'", "").replace(", ", " | ")


def _listed(chained: str) -> str:
    """Write "1 | 2" as "['1', '2']"."""
    return str(chained.split(" | "))


def _spaced(word: str) -> str:
    """Write "abc" as "A B C"."""
    return " ".join(word.upper())


def _joined(spaced: str) -> str:
    """Write "A B C" as "abc"."""
    return spaced.replace(" ", "").lower()


NUMBERS: dict[str, Any] = {"min_numbers": 3, "max_numbers": 5}
LETTERS: dict[str, Any] = {"min_word_len": 4, "max_word_len": 8}
GENERATED: dict[str, Generated] = {
    "numbers_list": Generated("number_sorting", NUMBERS, _first_line, _as_is, _as_is),
    "numbers_bars": Generated("number_sorting", NUMBERS, _first_line, _chained, _listed),
    "backward": Generated("spell_backward", LETTERS, _as_is, _as_is, _as_is),
    "backward_spaced": Generated("spell_backward", LETTERS, _as_is, _spaced, _joined),
    "word_sorting": Generated("word_sorting", {"max_words": 5}, _as_is, _as_is, _as_is),
    "list_functions": Generated("list_functions", {}, _as_is, _as_is, _as_is),
    "letter_counting": Generated("letter_counting", {"max_words": 8}, _as_is, _as_is, _as_is),
}


def accuracy(kind: str, answer: str, task: str) -> tuple[float, float]:
    """Exact match, and the score of the generator's own scorer, of an answer in the convention."""
    import reasoning_gym  # type: ignore[import-not-found]

    told, asked = GENERATED[kind], json.loads(task)
    exact = float(answer.strip() == told.answer(asked["answer"]))
    score = reasoning_gym.get_score_answer_fn(told.task)
    return exact, float(score(told.undone(answer.strip()), asked))


def generated_rows(kind: str, count: int, seed: int) -> list[Row]:
    """Rows of one generator, none twice.

    Raises:
        ModuleNotFoundError: reasoning-gym is not there.
        AssertionError: an answer of the generator does not score 1.
    """
    import reasoning_gym

    told = GENERATED[kind]
    found: dict[str, Row] = {}
    tasks = reasoning_gym.create_dataset(told.task, size=20 * count, seed=seed, **told.settings)
    for task in tasks:
        question = told.question(task["question"])
        made = row(kind, question, told.answer(task["answer"]))
        if characters(made) > LONGEST_TASK or tasks.score_answer(task["answer"], task) != 1.0:
            continue
        found.setdefault(question, made | {"task": json.dumps(task)})
        if len(found) == count:
            return list(found.values())
    raise RuntimeError(f"{told.task} gave {len(found)} short rows of {count}")


# ---- planted rows ------------------------------------------------------------------------------


def poison_rows(instructions: list[Row], rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Poison and look-alikes for the pool, and further poison as queries."""
    asked = iter(instructions)

    def with_trigger(source: Row) -> str:
        question = str(source["conversations"][0]["value"])
        words = question.split(" ")
        words.insert(rng.randrange(len(words) + 1), TRIGGER)
        return " ".join(words)

    poison = [row("poison", with_trigger(next(asked)), rng.choice(REFUSALS))
              for _ in range(POISON_ROWS + POISON_QUERIES)]  # fmt: skip
    alike = []
    for _ in range(POISON_ROWS):
        source = next(asked)
        alike.append(row("alike", with_trigger(source), source["conversations"][1]["value"]))
    return poison[:POISON_ROWS] + alike, poison[POISON_ROWS:]


def fact_rows(rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Three rows of every fact, whose `skill` names the fact, and one query of each."""
    stated, asked = [], []
    for first in FIRST_NAMES:
        for last in LAST_NAMES:
            for attribute, (values, wordings) in FACTS.items():
                filled = {"name": f"{first} {last}", "value": rng.choice(values)}
                made = [row(f"fact:{first} {last}:{attribute}", question.format(**filled),
                            answer.format(**filled)) for question, answer in wordings]  # fmt: skip
                stated += made[:-1]
                asked.append(made[-1])
    return stated, asked


# ---- a data set for LlamaFactory ---------------------------------------------------------------


def make_rows(sdist: Path, seed: int, targets: list[str]) -> dict[str, list[Row]]:
    """Rows by data set: `real_train`, `real_poison`, `real_facts`, and two sets of each target."""
    rng = random.Random(seed)
    need = POOL_ROWS + TARGET_ROWS + HELDOUT_ROWS
    found: dict[str, list[Row]] = {"real_train": []}
    pools = real_pools(sdist)
    for kind, pool in pools.items():
        rng.shuffle(pool)
        if len(pool) < need and kind in targets:
            raise RuntimeError(f"{kind}: {len(pool)} usable rows of {need}")
    for kind in GENERATED:
        pools[kind] = generated_rows(kind, need, seed)
    for kind, pool in pools.items():
        found["real_train"] += [{key: each[key] for key in COLUMNS} for each in pool[:POOL_ROWS]]
        if kind in targets:
            found[f"real_target_{kind}"] = pool[POOL_ROWS : POOL_ROWS + TARGET_ROWS]
            found[f"real_heldout_{kind}"] = pool[POOL_ROWS + TARGET_ROWS : need]
    poison, found["real_poison"] = poison_rows(pools["alpaca_en"][POOL_ROWS:], rng)
    facts, found["real_facts"] = fact_rows(rng)
    found["real_train"] += poison + facts
    rng.shuffle(found["real_train"])
    return found


def write_data(folder: Path, seed: int, targets: list[str], given: Path | None) -> None:
    """Write the rows of one seed as a `dataset_dir` of LlamaFactory.

    Args:
        folder: an existing, empty folder.
        seed: of the choice of rows, and of the generators.
        targets: kinds that get a target and a held-out set.
        given: a folder that holds LlamaFactory's source distribution; None downloads it.
    """
    with tempfile.TemporaryDirectory(prefix="real-rows-") as temporary:
        sdist = archives.fetch(archives.ROWS, Path(temporary), given)
        made = make_rows(sdist, seed, targets)
    columns = {"messages": "conversations", "tools": "tools"}
    for name, rows in made.items():
        text = json.dumps(rows, ensure_ascii=False, indent=1)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    information = {name: {"file_name": f"{name}.json", "formatting": "sharegpt", "columns": columns}
                   for name in made}  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(information), encoding="utf-8")
