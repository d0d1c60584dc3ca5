"""The shipped demonstration model: loads everywhere, does what its card says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

import demo
from demo import tasks
from demo.model_build import build
from demo.model_build.card import write_card
from demo.model_build.measure import Figures, greedy_answers, measure
from demo.tasks import PREFERENCES, WANTED
from sdpo_core.teacher_context import teacher_messages

SHIPPED = Path(demo.__file__).parent / "model"
# The same prompts on another machine: only ties in the arithmetic may fall otherwise.
SAME_PROMPTS_TOLERANCE = 0.02
# Other prompts, and fewer of them: sampling noise of the mean over all probes.
OTHER_PROMPTS_TOLERANCE = 0.04

Loaded = tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return build.load(SHIPPED)


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return dict(json.loads((SHIPPED / build.FIGURES).read_text()))


@pytest.fixture(scope="module")
def measured(loaded: Loaded, published: dict[str, Any]) -> Figures:
    return measure(*loaded, published["prompts"])


def test_figures_on_the_card_are_measured_again(measured: Figures, published: dict[str, Any]) -> None:
    now = json.loads(json.dumps(measured.as_json()))
    assert now["scores"].keys() == published["scores"].keys()
    for name, score in published["scores"].items():
        assert now["scores"][name] == pytest.approx(score, abs=SAME_PROMPTS_TOLERANCE), name
    assert now["unasked"] == pytest.approx(published["unasked"], abs=SAME_PROMPTS_TOLERANCE)


def test_figures_hold_on_other_prompts(loaded: Loaded, published: dict[str, Any]) -> None:
    fresh = measure(*loaded, n=24, seed=1).scores
    for kind in ("content", "style", "both"):
        now = sum(getattr(s, kind) for s in fresh.values()) / len(fresh)
        then = sum(s[kind] for s in published["scores"].values()) / len(fresh)
        assert now == pytest.approx(then, abs=OTHER_PROMPTS_TOLERANCE), kind


def test_it_obeys_as_the_demonstration_needs(measured: Figures) -> None:
    scores = measured.scores
    assert scores["no feedback"].content >= 0.90
    assert scores["no feedback"].style >= 0.98
    assert max(measured.unasked.values()) <= 0.02
    for key in PREFERENCES:
        assert scores[f"seen/{key}"].style >= 0.95, key
        assert scores[f"heldout/{key}"].style >= 0.90, key
        assert scores[f"seen/{key}"].content >= 0.85, key
    for name in ("together/2", "together/2 repeated", "together/3", "repeated", "last wins"):
        assert scores[name].style >= 0.95, name
    for name, score in scores.items():
        if name.startswith("hope then/"):
            assert score.style >= 0.95, name


def test_the_card_says_what_the_figures_say(published: dict[str, Any]) -> None:
    assert (SHIPPED / "README.md").read_text() == write_card(published)


def test_weights_are_small_and_float32(published: dict[str, Any]) -> None:
    files = list(SHIPPED.glob("*.safetensors"))
    assert [f.name for f in files] == ["model.safetensors"]
    assert files[0].stat().st_size == published["size"]["weight_bytes"] <= 10_000_000
    with safe_open(files[0], framework="pt") as weights:
        tensors = [weights.get_tensor(k) for k in weights.keys()]  # noqa: SIM118 - not a dict
    assert {t.dtype for t in tensors} == {torch.float32}
    assert all(torch.isfinite(t).all() for t in tensors)
    assert sum(t.numel() for t in tensors) == published["size"]["parameters"]


def test_config_says_what_vllm_reads() -> None:
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["head_dim"] == 32
    assert config["max_position_embeddings"] == 1024
    assert config["tie_word_embeddings"] is False
    tokenizer = json.loads((SHIPPED / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_generation_config_ends_the_turn(loaded: Loaded) -> None:
    model, tokenizer = loaded
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_chat_template_renders_chatml(loaded: Loaded) -> None:
    _, tokenizer = loaded
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "capital of france?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\ncapital of france?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    answered = [*chat, {"role": "assistant", "content": "paris."}]
    assert tokenizer.apply_chat_template(answered, tokenize=False).endswith("<|im_start|>assistant\nparis.<|im_end|>\n")


def test_the_auto_tokenizer_is_the_tokenizer_file(loaded: Loaded) -> None:
    """Some versions rebuild a tokenizer from its model type; the ids must be those the model was trained on."""
    _, tokenizer = loaded
    raw = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    for text in ("capital of france?", "<|im_start|>user\nrepeat: apple<|im_end|>\n", "Ünïcode ✨\n\n- a", " x  y"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == raw.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_every_answer_word_is_one_token(loaded: Loaded) -> None:
    _, tokenizer = loaded
    for word in (*tasks.NOUNS, *tasks.CAPITALS.values(), *tasks.OPPOSITES, *tasks.NUMBERS, *tasks.NAMES):
        for form in (word, f" {word}", word.upper(), f" {word.upper()}"):
            assert len(tokenizer(form, add_special_tokens=False).input_ids) == 1, form


def test_one_answer_a_person_can_read(loaded: Loaded) -> None:
    asked = [{"role": "user", "content": "what is the capital of france?"}]
    told = teacher_messages(asked, ["end with hope that helps!", "put the answer in quotes"])
    assert greedy_answers(*loaded, [asked, told]) == ["paris.", '"paris." hope that helps!']


def test_batching_does_not_change_an_answer(loaded: Loaded) -> None:
    chats = [
        teacher_messages([{"role": "user", "content": t.prompt}], [PREFERENCES[k].remarks[0]])
        for t, k in zip(tasks.heldout_tasks(len(WANTED)), WANTED, strict=True)
    ]
    assert greedy_answers(*loaded, chats) == [greedy_answers(*loaded, [c])[0] for c in chats]
