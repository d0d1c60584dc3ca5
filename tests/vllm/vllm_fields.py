"""Prints the fields of vLLM's own requests as JSON. Run by vLLM's interpreter: nothing of ours is imported."""

import json
from dataclasses import fields
from typing import get_args

from vllm.entrypoints.generate.base import protocol
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionToolsParam
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.sampling_params import RepetitionDetectionParams

efforts = get_args(get_args(ChatCompletionRequest.model_fields["reasoning_effort"].annotation)[0])
found = {
    "chat": list(ChatCompletionRequest.model_fields),
    "text": list(CompletionRequest.model_fields),
    "stream_options": list(protocol.StreamOptions.model_fields),
    "tool": list(ChatCompletionToolsParam.model_fields),
    "function": list(protocol.FunctionDefinition.model_fields),
    "repetition_detection": [f.name for f in fields(RepetitionDetectionParams)],
    "reasoning_effort": list(efforts),
}
print(json.dumps(found))
