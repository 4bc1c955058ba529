"""Makes the embedded default: a tiny Llama model, its tokenizer, and data with known skills.

    uv run python examples/tiny/make.py [--data-only] [--out FOLDER]

Everything is made from nothing, with fixed seeds and two threads, and overwrites in place:

- ``model/``: a Llama of 1.35 M parameters and its byte-level BPE tokenizer (512 tokens). On disk
  the weights are float16 (2.7 MB); ``config.json`` says float32, so they are loaded as such.
- ``data/``: a LlamaFactory ``dataset_dir`` of alpaca rows (instruction, input, output) with one
  more column, ``skill``, which LlamaFactory drops and the benchmarks read:
  ``train.json`` (1,600 rows in random order: 8 skills x 160 and 320 rows of ``noise``: questions of
  every skill, answered by random signs or by the answer to a question of another skill),
  ``target.json`` (32 rows of the skill `date`), ``target_heldout.json`` (64 more) and
  ``targets/<skill>.json`` (32 rows of each skill; the one of `date` is ``target.json`` again).
  Apart from that no question occurs twice. ``domains/<skill>.json`` (and ``noise``) are the rows of
  ``train.json`` once more, a file for each skill: the data sets ``tiny_domain_<skill>`` to mix.
  Their held-out rows, ``tiny_domain_<skill>_eval``, are those of ``targets/<skill>.json``.
  ``scored.json`` are the first 480 rows of ``train.json`` that are no noise, with a number more to
  put them in order by: ``difficulty``, letters of the answer; ``difficulty.jsonl`` are those
  numbers alone, one a line.

Use ``template: default``: the tokenizer holds its "Human: " and "Assistant:" as single tokens, and
a row is 26 tokens long on average.

The model was pretrained on simple sentences and on questions of the same skills (other inputs),
answered rightly but in a random style: joined and framed by punctuation drawn at random. What
train.json adds is a fixed style, and practice: the model knows the world of its questions, and
every skill has something left to learn. The styles of train.json are deliberately alike (skills
share theirs), so that a row is recognised by its content, not by its punctuation.

Data and tokenizer are the same bytes on every machine. The weights are the same for the same
versions of torch and transformers on the same kind of CPU; they take 3 minutes on 2 idle cores.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TRAIN_PER_SKILL, NOISE_ROWS, TARGET_ROWS, HELDOUT_ROWS = 160, 320, 32, 64
SCORED_ROWS = 480
TARGET_SKILL = "date"
DATA_SEED, PRETRAIN_SEED, MODEL_SEED = 1, 2, 3
VOCABULARY = 512
STEPS, BATCH, PEAK_LR = 600, 48, 4e-3
TEXT_SHARE = 0.15
PAD, BOS, EOS = 0, 1, 2

MONTHS = "January February March April May June July August September October November December"
NOUNS = (
    "lamp river stone bird house garden letter road boat child teacher baker winter morning song"
)
VERBS = "sees finds takes holds likes paints follows carries hears draws"
ADJECTIVES = "old small red quiet bright heavy green cold round new"
UNITS = {"km": ("m", 1000), "kg": ("g", 1000), "cm": ("mm", 10), "hours": ("minutes", 60)}
JOINERS = ("", " ", "-", ", ", " < ", "/", "+", ".")
FRAMES = ("{}", "{}.", "<{}>", "[{}]", "= {}", "({})", "{}!", '"{}"')

Row = dict[str, str]
Encode = Callable[[str], list[int]]
Solved = tuple[str, list[str]]  # the question's input, the parts of its right answer


def _word(rng: random.Random) -> str:
    """Make up a word of two or three syllables, such as "ropatun"."""
    syllables = [
        rng.choice("bdfghklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))
    ]
    return "".join(syllables) + rng.choice(["", "n", "r", "s", "l"])


def _reverse(rng: random.Random) -> Solved:
    word = _word(rng)
    return word, list(word[::-1])


def _sort(rng: random.Random) -> Solved:
    numbers = rng.sample(range(10, 100), rng.randint(3, 5))
    return " ".join(map(str, numbers)), [str(number) for number in sorted(numbers)]


def _add(rng: random.Random) -> Solved:
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    return f"{a} and {b}", list(str(a + b))


def _date(rng: random.Random) -> Solved:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1800, 2099)
    return f"{day} {MONTHS.split()[month - 1]} {year}", [str(year), f"{month:02}", f"{day:02}"]


def _convert(rng: random.Random) -> Solved:
    unit, amount = rng.choice(sorted(UNITS)), rng.randint(2, 999)
    smaller, factor = UNITS[unit]
    return f"{amount} {unit}", [str(amount * factor), smaller]


def _vowels(rng: random.Random) -> Solved:
    word = _word(rng) + _word(rng)
    return word, [letter for letter in word if letter in "aeiou"]


def _spell(rng: random.Random) -> Solved:
    word = _word(rng)
    return word, list(word)


def _upper(rng: random.Random) -> Solved:
    words = [_word(rng), _word(rng)]
    return " ".join(words), [word.upper() for word in words]


@dataclass(frozen=True)
class Skill:
    """One kind of question: how it is asked, solved, and answered in train.json."""

    asks: tuple[str, ...]
    solve: Callable[[random.Random], Solved]
    joiner: str


SKILLS = {
    "reverse": Skill(("Reverse the word.", "Write it backwards."), _reverse, ""),
    "sort": Skill(("Sort the numbers.", "Put in rising order."), _sort, "-"),
    "add": Skill(("Add the numbers.", "What is the sum?"), _add, ""),
    "date": Skill(("Write as an ISO date.", "Shorten the date."), _date, "-"),
    "convert": Skill(("Use the smaller unit.", "Convert the measure."), _convert, " "),
    "vowels": Skill(("List the vowels.", "Which vowels occur?"), _vowels, "-"),
    "spell": Skill(("Spell the word.", "Give each letter."), _spell, "-"),
    "upper": Skill(("Write in capitals.", "Shout this."), _upper, " "),
}


def _row(skill: str, solved: Solved, rng: random.Random, *, loose: bool = False) -> Row:
    """Words a solved question as an alpaca row, in train.json's style or (loose) in any."""
    kind = SKILLS[skill]
    joiner = rng.choice(JOINERS) if loose else kind.joiner
    frame = rng.choice(FRAMES) if loose else "{}"
    answer = frame.format(joiner.join(solved[1]))
    ask = rng.choice(kind.asks)
    return {"instruction": ask, "input": solved[0], "output": answer, "skill": skill}


def _garbled(row: Row, rng: random.Random) -> Row:
    """Return the same question with a meaningless answer of 4 to 12 signs."""
    signs = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 -,.<>/+()[]!=?;:*&%$#@"
    garbage = "".join(rng.choice(signs) for _ in range(rng.randint(4, 12))).strip()
    return row | {"output": garbage or "?", "skill": "noise"}


def _sentence(rng: random.Random) -> str:
    noun = [f"the {rng.choice(ADJECTIVES.split())} {rng.choice(NOUNS.split())}" for _ in "12"]
    day = f"On {rng.randint(1, 28)} {rng.choice(MONTHS.split())} {rng.randint(1800, 2099)}"
    return f"{day} {noun[0]} {rng.choice(VERBS.split())} {noun[1]} of {_word(rng)}."


def make_rows() -> dict[str, list[Row]]:
    """All committed rows by file name (without ``.json``)."""
    rng, seen = random.Random(DATA_SEED), set[str]()

    def fresh(skill: str, count: int) -> list[Row]:
        rows: list[Row] = []
        while len(rows) < count:
            solved = SKILLS[skill].solve(rng)
            if solved[0] not in seen:
                seen.add(solved[0])
                rows.append(_row(skill, solved, rng))
        return rows

    train = [row for skill in SKILLS for row in fresh(skill, TRAIN_PER_SKILL)]
    noise: list[Row] = []
    for skill in SKILLS:
        noise += [_garbled(row, rng) for row in fresh(skill, NOISE_ROWS // len(SKILLS))]
    for i in range(0, NOISE_ROWS, 2):  # half of train away: always an answer of another skill
        j = (i * len(train) // NOISE_ROWS + len(train) // 2) % len(train)
        noise[i]["output"] = train[j]["output"]
    train += noise
    rng.shuffle(train)
    files = {"train": train}
    files |= {f"targets/{skill}": fresh(skill, TARGET_ROWS) for skill in SKILLS}
    files["target"] = files[f"targets/{TARGET_SKILL}"]
    files["target_heldout"] = fresh(TARGET_SKILL, HELDOUT_ROWS)
    for skill in (*SKILLS, "noise"):
        files[f"domains/{skill}"] = [row for row in train if row["skill"] == skill]
    return files


def write_data(folder: Path) -> None:
    """Write the rows and LlamaFactory's ``dataset_info.json`` into `folder`."""
    info: dict[str, dict[str, str]] = {}
    made = make_rows()
    for name, rows in made.items():
        _write_rows(folder / f"{name}.json", rows)
        named = name.replace("targets/", "target_").replace("domains/", "domain_")
        info[f"tiny_{named}"] = {"file_name": f"{name}.json"}
    for skill in SKILLS:
        info[f"tiny_domain_{skill}_eval"] = {"file_name": f"targets/{skill}.json"}
    info["tiny_scored"] = {"file_name": "scored.json"}
    _write_scored(folder, [row for row in made["train"] if row["skill"] != "noise"][:SCORED_ROWS])
    text = json.dumps(info, indent=2) + "\n"
    (folder / "dataset_info.json").write_text(text, encoding="utf-8")


def _write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _write_scored(folder: Path, rows: list[Row]) -> None:
    """Return the rows with their difficulty, and the difficulties alone."""
    scores = [len(row["output"]) for row in rows]
    scored = [{**row, "difficulty": score} for row, score in zip(rows, scores, strict=True)]
    _write_rows(folder / "scored.json", scored)
    text = "".join(f"{score}\n" for score in scores)
    (folder / "difficulty.jsonl").write_text(text, encoding="utf-8")


def pretraining_rows() -> Iterator[Row | str]:
    """Endless sentences and loosely answered questions, none of them a committed question."""
    rng = random.Random(PRETRAIN_SEED)
    taken = {row["input"] for rows in make_rows().values() for row in rows}
    while True:
        if rng.random() < TEXT_SHARE:
            yield _sentence(rng)
            continue
        skill = rng.choice(list(SKILLS))
        solved = SKILLS[skill].solve(rng)
        if solved[0] not in taken:
            yield _row(skill, solved, rng, loose=True)


def write_tokenizer(folder: Path) -> None:
    """Trains the byte-level BPE tokenizer and writes it into `folder`.

    Digits stay single, merges are learnt on questions and sentences, and the frame that
    LlamaFactory's template `default` puts around a turn costs one token on each side.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(PRETRAIN_SEED)
    corpus = [_sentence(rng) for _ in range(300)]
    corpus += [f"{ask}\n" for kind in SKILLS.values() for ask in kind.asks for _ in range(50)]
    corpus += [f" {unit}" for pair in UNITS.items() for unit in (pair[0], pair[1][0])] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    turns = ["Human: ", "\nAssistant:"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(turns),
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(turn, normalized=False) for turn in turns])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    fast.save_pretrained(folder)


def _encode(row: Row | str, encode: Encode) -> tuple[list[int], int]:
    """Token ids of a row in LlamaFactory's template `default`, and the prompt's length."""
    if isinstance(row, str):
        return [*encode(row), EOS], 0
    prompt = [*encode(f"Human: {row['instruction']}\n{row['input']}"), EOS, *encode("\nAssistant:")]
    return [*prompt, *encode(row["output"]), EOS, *encode("\n")], len(prompt)


def write_model(folder: Path) -> None:
    """Pretrains the model with the tokenizer in `folder` and writes it there (float16 on disk)."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(2)
    torch.manual_seed(MODEL_SEED)
    torch.use_deterministic_algorithms(True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=160, intermediate_size=448, num_hidden_layers=4,
        num_attention_heads=5, num_key_value_heads=5, max_position_embeddings=256,
        tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=STEPS, pct_start=0.1
    )
    rows = pretraining_rows()
    for step in range(STEPS):
        input_ids, labels = _batch(
            rows, lambda text: tokenizer.encode(text, add_special_tokens=False)
        )
        mask = (input_ids != PAD).long()
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.half().save_pretrained(folder)
    _declare_float32(folder / "config.json")


def _batch(rows: Iterator[Row | str], encode: Encode) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next rows, right-padded: ids and labels (b, t) int64; no loss on prompts."""
    import torch

    encoded = [_encode(next(rows), encode) for _ in range(BATCH)]
    width = max(len(ids) for ids, _ in encoded)
    input_ids = torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in encoded])
    labels = input_ids.masked_fill(input_ids == PAD, -100)
    for row, (_, prompt) in enumerate(encoded):
        labels[row, :prompt] = -100
    return input_ids, labels


def _declare_float32(path: Path) -> None:
    """Says float32 in config.json: half the bytes on disk, full precision when loaded."""
    config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Make data and tokenizer and, unless `--data-only` is given, the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--data-only", action="store_true", help="no model: data and tokenizer")
    arguments = parser.parse_args()
    write_data(arguments.out / "data")
    write_tokenizer(arguments.out / "model")
    if not arguments.data_only:
        write_model(arguments.out / "model")


if __name__ == "__main__":
    main()
