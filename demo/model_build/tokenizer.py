"""Byte-level BPE tokenizer with a ChatML template, trained on the demonstration's own chats."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo import tasks
from demo.model_build.rows import LATE, rows

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def _corpus(seed: int, n: int) -> Iterator[str]:
    """Chats of the late mix, then every word in the forms a chat can need, so that each gets a token."""
    for row in itertools.islice(rows(seed, lambda _: LATE), n):
        yield from (m["content"] for m in row.messages)
        yield row.answer
    closed = [*tasks.NOUNS, *tasks.CAPITALS, *tasks.CAPITALS.values(), *tasks.OPPOSITES, *tasks.NUMBERS]
    for word in (*closed, *tasks.NAMES, "hello", "system", "user", "assistant"):
        for form in (word, word.upper(), tasks.as_written(word)):
            yield from itertools.repeat(f'"{form} {form}', 3000)


def train_tokenizer(seed: int, vocab_size: int, chats: int = 20_000) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab_size` entries, special tokens included."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(seed, chats), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save under the class name that every transformers version maps to "take tokenizer.json as it is"."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")
