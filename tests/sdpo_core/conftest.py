"""A tiny random chat model for the tests of the algorithm library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from sdpo_core import LoraPolicy, LoraSpec, attach_lora

TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with three merges so that text joins across the ends of messages."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("Ċ", "Ċ")]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *letters, *("".join(m) for m in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def tiny_model(vocab: int = 64, seed: int = 0) -> Qwen3ForCausalLM:
    """A random Qwen3 with an opinion: a large embedding scale keeps its distributions away from uniform."""
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()


def adapter(base: nn.Module) -> LoraPolicy:
    """Trained a little: both factors are random."""
    policy = attach_lora(base, LoraSpec(rank=4, alpha=8, seed=1))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)
    return policy


@pytest.fixture
def base() -> Qwen3ForCausalLM:
    return tiny_model()


@pytest.fixture
def chat_base(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    return tiny_model(vocab=len(tokenizer))
