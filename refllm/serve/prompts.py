"""The prompt of a request as token ids: text and messages are encoded, long prompts truncated.

| prompt   | its tokens                                                                    |
|----------|-------------------------------------------------------------------------------|
| ids      | as given                                                                      |
| text     | as the tokenizer's file specifies, with the BOS token if it adds one          |
| messages | by the checkpoint's chat template, up to where the assistant's answer begins  |

``truncate_prompt_tokens`` keeps the last tokens, as in vLLM.
"""

from __future__ import annotations

from dataclasses import replace

from refllm.decode.output_params import truncate_prompt
from refllm.decode.speculative.interface import ModelLike
from refllm.errors import InputError
from refllm.serve.request import Request


def encode_prompt(request: Request, model: ModelLike) -> Request:
    """The request with token ids as its prompt. InputError for a text without tokens,
    and for messages where the model has no chat template.
    """
    prompt = request.prompt
    if request.is_encoded:
        if request.truncate_prompt_tokens is None:
            return request
        ids = list(request.prompt_ids)
    elif isinstance(prompt, str):
        ids = model.tokenizer.encode(prompt, special=True)
    else:
        chat = getattr(model, "chat_tokenizer", None)
        if chat is None:
            raise InputError(
                f"request {request.request_id!r}: messages need a model with a chat template, "
                "such as refllm.load returns: this one takes text or token ids"
            )
        ids = chat.encode(prompt, add_generation_prompt=True)
    keep = request.truncate_prompt_tokens
    context = max(1, model.config.max_position_embeddings - request.max_tokens)
    ids = truncate_prompt(ids, keep, context)
    if not ids:
        raise InputError(f"request {request.request_id!r}: its prompt has no tokens")
    return replace(request, prompt=ids, truncate_prompt_tokens=None)
