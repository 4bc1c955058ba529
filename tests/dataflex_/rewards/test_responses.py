"""Sampling: prompts recovered from processed rows; a response depends on its own numbers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.data.rows import Rows
from dataflex.models.generate import InverseTransform, continuations
from dataflex.rewards.responses import Exchange, Policy, SamplingSettings
from dataflex.run.ranks import Ranks
from gradstore.errors import BadInput

TINY = str(Path(__file__).resolve().parents[3] / "examples" / "tiny" / "model")
SETTINGS = SamplingSettings(
    mc_samples=3, max_new_tokens=12, temperature=1.5, max_prompt_length=4096, prompt_template=None,
    batch_size=32, seed=7, model_path=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(TINY)
    base.generation_config.repetition_penalty = 3.0  # must not reach the samples
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], lora_dropout=0.5)
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return model.train(), AutoTokenizer.from_pretrained(TINY)


def run_of(tiny: tuple[Any, Any], ranks: Any = None) -> Any:
    model, tokenizer = tiny
    return SimpleNamespace(model=model, data=SimpleNamespace(tokenizer=tokenizer), autocast="off",
                           shows_progress=False, ranks=ranks or Ranks())  # fmt: skip


def rows_of(tokenizer: Any, texts: list[tuple[str, str]], name: str = "t") -> Rows:
    from datasets import Dataset

    found = []
    for prompt, answer in texts:
        before, after = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        ids = [*before, *after, 2]
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids),
                      "labels": [-100] * len(before) + [*after, 2]})  # fmt: skip
    return Rows(name, Dataset.from_list(found))


TEXTS = [("Reverse the word.\nabcdef", "fedcba"), ("Add the numbers.\n12 and 30", "42"),
         ("Spell it.\nrun", "r-u-n"), ("Shout this.\nquiet", "QUIET"),
         ("Sort the letters of this much longer line.\ncab dab", "abc abd")]  # fmt: skip


def test_prompt_and_reference_are_what_labels_say() -> None:
    row = {"input_ids": [1, 2, 3, 4, 5, 6, 7], "labels": [-100, 2, -100, -100, 5, 6, -100]}
    assert Exchange.of(row) == Exchange([1, 2, 3, 4], [5, 6])
    assert Exchange.of({"input_ids": [1, 2], "labels": [-100, -100]}) == Exchange([], [])
    assert Exchange.of({"input_ids": [1, 2], "labels": [1, 2]}) == Exchange([], [])


def test_uniform_numbers_draw_from_the_tempered_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).repeat(4000, 1)
    uniforms = np.random.default_rng(0).random((4000, 1))
    draw = InverseTransform(uniforms, 2.0, 5, torch.device("cpu"))
    chosen = draw(torch.zeros(4000, 5, dtype=torch.long), logits)
    assert (chosen.isfinite().sum(1) == 1).all()
    shares = np.bincount(chosen.argmax(1).numpy(), minlength=4) / 4000
    expected = (logits[0] / 2).softmax(0).numpy()
    assert shares == pytest.approx(expected, abs=0.03)
    assert shares[3] == 0


def test_a_response_is_the_same_in_any_batch_and_on_any_rank(tiny: tuple[Any, Any]) -> None:
    sets = [rows_of(tiny[1], TEXTS[:3]), rows_of(tiny[1], TEXTS[3:], "u")]
    state = torch.get_rng_state()
    whole = Policy(run_of(tiny), SETTINGS).sample(sets)
    single = Policy(run_of(tiny), replace(SETTINGS, batch_size=1)).sample(sets)
    assert whole == single
    parts: list[Any] = []

    class Two(Ranks):
        def gather(self, work: Any) -> list[Any]:
            parts.append(work())
            return list(parts)

    small = replace(SETTINGS, batch_size=6)
    Policy(run_of(tiny, Two(0, 2)), small).sample(sets)
    shared = Policy(run_of(tiny, Two(1, 2)), small).sample(sets)
    assert shared == whole
    assert 0 < len(parts[0]) < 5
    assert torch.equal(state, torch.get_rng_state())
    assert tiny[0].training
    assert tiny[0].get_base_model().generation_config.repetition_penalty == 3.0


def test_responses_follow_seed_draw_and_model(tiny: tuple[Any, Any]) -> None:
    sets = [rows_of(tiny[1], TEXTS)]
    first = Policy(run_of(tiny), SETTINGS).sample(sets)[0]
    assert len({tuple(ids) for row in first for ids in row.responses}) > 5
    assert all(1 <= len(ids) <= 12 for row in first for ids in row.responses)
    assert first != Policy(run_of(tiny), replace(SETTINGS, seed=8)).sample(sets)[0]
    weight = next(p for n, p in tiny[0].named_parameters() if "lora_B" in n)
    with torch.no_grad():
        weight.mul_(-1)
        assert first != Policy(run_of(tiny), SETTINGS).sample(sets)[0]
        weight.mul_(-1)
    twice = Policy(run_of(tiny), SETTINGS).sample([rows_of(tiny[1], TEXTS[:1] * 2)])[0]
    assert twice[0].prompt == twice[1].prompt
    assert twice[0].responses == first[0].responses != twice[1].responses
    assert first[0].prompt_text == TEXTS[0][0]
    assert first[0].reference_text == TEXTS[0][1]


def test_a_models_own_generation_settings_have_no_say(tiny: tuple[Any, Any]) -> None:
    model, prompt = tiny[0], tiny[1](TEXTS[3][0])["input_ids"]
    (plain,) = continuations(model, [prompt], max_new_tokens=4, stops=[2], pad=0)
    held = model.get_base_model().generation_config
    held.suppress_tokens = plain[:1]
    try:
        assert continuations(model, [prompt], max_new_tokens=4, stops=[2], pad=0) == [plain]
    finally:
        held.suppress_tokens = None


def test_the_first_token_follows_the_models_probabilities(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prompt = tokenizer(TEXTS[3][0])["input_ids"]
    with torch.no_grad():
        model.eval()
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        model.train()
    expected = (logits / 1.5).softmax(0).numpy()
    uniforms = np.random.default_rng(1).random((600, 1))
    answers = continuations(model, [prompt] * 600, max_new_tokens=1, stops=[2], pad=0,
                            uniforms=uniforms, temperature=1.5)  # fmt: skip
    shares = np.bincount([ids[0] for ids in answers], minlength=len(expected)) / 600
    assert np.abs(shares - expected).max() < 0.08


def test_long_prompts_lose_their_beginning_and_rows_without_one_are_left_out(
    tiny: tuple[Any, Any],
) -> None:
    rows = rows_of(tiny[1], TEXTS[:2])
    from datasets import Dataset, concatenate_datasets

    none = Dataset.from_list([{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [5, 6]}])
    rows = Rows("t", concatenate_datasets([rows.dataset, none.cast(rows.dataset.features)]))
    found = Policy(run_of(tiny), replace(SETTINGS, max_prompt_length=4)).sample([rows])[0]
    full = rows.dataset[0]["input_ids"]
    at = Exchange.of(rows.dataset[0])
    assert found[0].prompt == at.prompt[-4:] == full[len(at.prompt) - 4 : len(at.prompt)]
    assert found[2].responses == ()
    row = found[0].row(found[0].responses[0])
    assert row["labels"] == [-100] * 4 + found[0].responses[0]
    with pytest.raises(BadInput, match="max_new_tokens is 256, but the model has 256 positions"):
        Policy(run_of(tiny), replace(SETTINGS, max_new_tokens=256))


def test_a_fixed_policy_and_a_template_change_what_is_asked(tiny: tuple[Any, Any]) -> None:
    sets = [rows_of(tiny[1], TEXTS[:2])]
    fixed = Policy(run_of(tiny), replace(SETTINGS, model_path=TINY)).sample(sets)[0]
    weight = next(p for n, p in tiny[0].named_parameters() if "lora_B" in n)
    with torch.no_grad():
        weight.mul_(-1)
        assert fixed == Policy(run_of(tiny), replace(SETTINGS, model_path=TINY)).sample(sets)[0]
        weight.mul_(-1)
    assert fixed[0].prompt == Exchange.of(sets[0].dataset[0]).prompt
    tokenizer = tiny[1]
    assert all(
        tokenizer.decode(ids, skip_special_tokens=True).strip() == text
        for row in fixed
        for ids, text in zip(row.responses, row.texts, strict=True)
        if len(ids) < SETTINGS.max_new_tokens
    )
    template = replace(SETTINGS, prompt_template="Q: {prompt} A:")
    asked = Policy(run_of(tiny), template).sample(sets)[0][0]
    assert tokenizer.decode(asked.prompt) == f"Q: {TEXTS[0][0]} A:"
    assert asked.prompt_text == TEXTS[0][0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"prompt_template": "Q"}, "never shows"),
     ({"prompt_template": "{question}"}, "cannot be filled")],
)  # fmt: skip
def test_bad_sampling_settings_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(SETTINGS, **changes)
