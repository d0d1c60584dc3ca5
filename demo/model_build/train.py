"""Trains the demonstration model from scratch on synthetic chats; loss on the answers only.

Shapes: B rows, T tokens, D hidden size, A answer tokens of the whole batch.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from demo.model_build.rows import EARLY, LATE, Mix, Row, rows
from demo.model_build.tokenizer import END

POOL_BATCHES = 16  # rows of this many batches are sorted by length together, so that little is padding


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights, besides library versions and thread count."""

    seed: int = 0
    steps: int = 3500
    early_share: float = 0.3  # of the steps, on the mix that teaches copying
    batch_rows: int = 64
    lr: float = 2e-3
    warmup_steps: int = 60
    weight_decay: float = 0.05
    clip: float = 1.0
    vocab_size: int = 2176
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    head_dim: int = 32
    ffn: int = 256
    threads: int = 2


def make_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A fresh Qwen3. Untied, widely spread embeddings keep the words apart, which copying needs."""
    torch.manual_seed(config.seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            head_dim=config.head_dim,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            dtype="float32",
        )
    )
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row; the last `answer_tokens` of them (end of turn included) carry the loss."""

    ids: list[int]
    answer_tokens: int


def encode(tokenizer: PreTrainedTokenizerFast, row: Row) -> Encoded:
    """The chat template up to the answer, then the answer and the end of the turn."""
    prompt = tokenizer.apply_chat_template(row.messages, add_generation_prompt=True, tokenize=False)
    answer = tokenizer(row.answer + END, add_special_tokens=False).input_ids
    return Encoded(tokenizer(prompt, add_special_tokens=False).input_ids + answer, len(answer))


def batches(stream: Iterator[Encoded], batch_rows: int, seed: int) -> Iterator[list[Encoded]]:
    """Endless batches of rows of similar length, in random order within each pool."""
    rng = random.Random(f"batches {seed}")  # noqa: S311 - not for secrets
    while True:
        pool = sorted(itertools.islice(stream, batch_rows * POOL_BATCHES), key=lambda e: len(e.ids))
        cut = [pool[i : i + batch_rows] for i in range(0, len(pool), batch_rows)]
        rng.shuffle(cut)
        yield from cut


def answer_loss(model: Qwen3ForCausalLM, batch: list[Encoded]) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens. Rows are padded on the right, where causality hides the padding."""
    longest = max(len(e.ids) for e in batch)
    pad = model.config.pad_token_id
    ids_BT = torch.tensor([e.ids + [pad] * (longest - len(e.ids)) for e in batch])
    where = [(b, t) for b, e in enumerate(batch) for t in range(len(e.ids) - e.answer_tokens, len(e.ids))]
    row_A, col_A = torch.tensor(where).T
    hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    logits_AV = model.lm_head(hidden_BTD[row_A, col_A - 1])
    return functional.cross_entropy(logits_AV, ids_BT[row_A, col_A])


def _schedule(config: TrainConfig) -> Callable[[int], float]:
    """Factor of the learning rate: linear warm-up, then cosine to 1 %."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


def _mixes(config: TrainConfig) -> Callable[[int], Mix]:
    early_rows = int(config.steps * config.early_share) * config.batch_rows
    return lambda index: EARLY if index < early_rows else LATE


def train(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerFast,
    on_step: Callable[[int, float, Qwen3ForCausalLM], None],
) -> Qwen3ForCausalLM:
    """Train to the end of the schedule; `on_step(step, loss, model)` is called after every step."""
    torch.set_num_threads(config.threads)
    model = make_model(config, tokenizer).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(config))
    encoded = (encode(tokenizer, row) for row in rows(config.seed, _mixes(config)))
    for step, batch in enumerate(itertools.islice(batches(encoded, config.batch_rows, config.seed), config.steps)):
        loss = answer_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        on_step(step, loss.item(), model)
    return model.eval()


def progress_printer(every: int = 50) -> Callable[[int, float, Qwen3ForCausalLM], None]:
    """An `on_step` that prints the mean loss of the last `every` steps."""
    losses: list[float] = []
    began = time.perf_counter()

    def on_step(step: int, loss: float, model: Qwen3ForCausalLM) -> None:  # noqa: ARG001
        losses.append(loss)
        if (step + 1) % every == 0:
            mean = sum(losses[-every:]) / every
            print(f"step {step + 1} loss {mean:.4f} {time.perf_counter() - began:.0f} s", flush=True)

    return on_step
