"""The model's tokenizer, as far as chats need it: prompt in, text out, and the tokens that end an answer."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from worker.engine.errors import BadRequestError, UnsupportedModelError


class ChatTokenizer:
    """Wraps the tokenizer of a model directory.

    `decode` may run on another thread than `prompt_ids`: it has a copy of the tokenizer for itself.
    """

    def __init__(self, path: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if not self._tokenizer.is_fast:
            raise UnsupportedModelError("The model directory needs a tokenizer.json (a fast tokenizer).")
        self._copy = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        self.eos_token_id: int | None = self._tokenizer.eos_token_id
        self.longest_token = max(len(token) for token in self._tokenizer.get_vocab())
        """Characters of the longest token: a text has at least its length divided by this tokens."""

    def prompt_ids(self, messages: Sequence[Mapping[str, str]], *, generation_prompt: bool = True) -> list[int]:
        """Token ids of the rendered chat template, ready for the assistant's answer unless told otherwise.

        Raises BadRequestError where the template refuses the messages.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRequestError(f"The chat template refused the messages: {error}", param="messages") from error
        return self.text_ids(text, special=False)

    def text_ids(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a plain text; `special` adds what the tokenizer puts around every text, if anything."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        text: str = self._copy.decode(list(ids), skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """A single token as text; a part of a character gives the replacement character, as in vLLM."""
        text: str = self._copy.decode([token_id], skip_special_tokens=False)
        return text


def generation_defaults(path: Path) -> dict[str, Any]:
    """What generation_config.json of the model says, or nothing. vLLM takes sampling defaults from it too."""
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    loaded = json.loads(file.read_text(encoding="utf-8"))
    return loaded if isinstance(loaded, dict) else {}
