"""What the teacher writes."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from sdpo_core import ContextTooLong, LoraSpec, Sample, attached, chat_ids, teacher_prompt, teacher_written


def test_greedy_writing_is_the_bare_models_argmax(chat_base: Qwen3ForCausalLM) -> None:
    """Prompts of different lengths together, against one at a time without a cache; it ends with an end of turn."""
    prompts = [[5, 9, 40, 7], [11], [30, 31]]
    want: list[tuple[int, ...]] = []
    for prompt in prompts:
        row = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                row.append(int(chat_base(torch.tensor([row])).logits[0, -1].argmax()))
        want.append(tuple(row[len(prompt) :]))
    end = want[0][2]
    cut = [w[: w.index(end) + 1] if end in w else w for w in want]
    with attached(chat_base, LoraSpec()) as policy:
        with torch.no_grad():
            for _, parameter in policy.trainable():
                parameter.add_(0.1)
        chat_base.generation_config.eos_token_id = None
        assert policy.write(prompts, 5) == want
        for ends in (end, [end, 3]):
            chat_base.generation_config.eos_token_id = ends
            assert policy.write(prompts, 5) == cut


def test_nothing_is_written_beyond_the_window(chat_base: Qwen3ForCausalLM) -> None:
    """A long prompt's answer ends with its room, and cuts no other answer short; without room it is refused by name."""
    chat_base.generation_config.eos_token_id = None
    window = chat_base.config.max_position_embeddings
    long, full = [5] * (window - 3), [5] * window
    with attached(chat_base, LoraSpec()) as policy:
        assert len(policy.write([long], 8)[0]) == 3
        together = policy.write([[7, 9], long, [11]], 8)
        assert [len(answer) for answer in together] == [8, 3, 8]
        assert together == [policy.write([prompt], 8)[0] for prompt in ([7, 9], long, [11])]
        for write in (
            lambda: policy.write([[7, 9], full], 8),
            lambda: teacher_written(policy, [Sample((1,), (2,), (7, 9)), Sample((1,), (2,), full)], 8),
        ):
            with pytest.raises(ContextTooLong) as caught:
                write()
            assert (caught.value.code, caught.value.length, caught.value.limit) == (
                "context_too_long", window + 1, window,
            )  # fmt: skip


def test_teacher_written_samples_hold_the_told_models_answer(
    chat_base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = [{"role": "user", "content": "hello"}]
    prompt, told = chat_ids(tokenizer, chat), teacher_prompt(tokenizer, chat, "shout", limit=200)
    own = Sample(tuple(prompt), (7, 8), told.ids, behaviour_logprobs=(-1.0, -1.0), taught=False)
    with attached(chat_base, LoraSpec()) as policy:
        (written,) = teacher_written(policy, [own], 4)
        assert written.response_ids == policy.write([told.ids], 4)[0]
    assert (written.prompt_ids, written.teacher_prompt_ids) == (own.prompt_ids, own.teacher_prompt_ids)
    assert written.teacher_written
    assert not written.taught
    assert written.behaviour_logprobs is None
