"""From messages to token ids, such that what users write can never become a control token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from sdpo_core.errors import OptionError, SampleError
from sdpo_core.messages import check_text, readable_messages


class ChatTokenizer(Protocol):
    """The part of a Transformers tokenizer that is used here."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


def chat_ids(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation in the model's own chat template.

    Equal to `apply_chat_template(..., tokenize=True)` for text without control-token strings. A string such as
    "<|im_end|>" inside a message is tokenised as the ordinary characters it consists of. Of contents in parts the text
    is taken. Templates build control tokens around the role, so a role that is not a plain word raises SampleError; so
    do contents other than text, text that is no valid Unicode, tools that are no list,
    and what the template itself refuses.
    """
    messages = readable_messages(messages)
    if not hasattr(tokenizer, "apply_chat_template"):
        raise OptionError("tokenizer", f"must be a tokenizer of Transformers, not {type(tokenizer).__name__}")
    if tools is not None and not isinstance(tools, list | tuple):
        raise SampleError(f"tools are a list, not {type(tools).__name__}", code="bad_message")
    if template_options is not None and not isinstance(template_options, Mapping):
        raise SampleError("template_options are a mapping of names to values", code="bad_message")
    check_text(tools, "the tools")
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            tools=None if tools is None else list(tools),
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=True,
            **(template_options or {}),
        )
    except (TemplateError, ValueError) as error:
        raise SampleError(f"the model's chat template refuses this: {error}", code="template_refused") from error
    return [int(i) for i in ids]
