"""A byte-level tokenizer with the control tokens of the tests' chat templates."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Inner

from chat_templates import ADDED, SPECIAL, SPECIAL_TOKENS
from conftest import oracle
from refllm.checkpoints.tokenizer import Tokenizer
from tiny_models import byte_tokenizer


@cache
def chat_tokenizer(strips: bool = False) -> Tokenizer:
    """300 tokens of bytes and merges, then special and other added tokens.

    With ``strips``, ``<|im_end|>`` takes the white space after it, as Phi-3's tokens do, and
    ``<|im_start|>`` that before it.
    """
    inner = Inner.from_str(byte_tokenizer(300).inner.to_str())
    for token in SPECIAL:
        inner.add_special_tokens(
            [
                AddedToken(
                    token,
                    normalized=False,
                    special=True,
                    rstrip=strips and token == "<|im_end|>",
                    lstrip=strips and token == "<|im_start|>",
                )
            ]
        )
    inner.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED])
    return Tokenizer(inner)


def transformers_tokenizer(strips: bool = False) -> Any:
    """The same tokenizer in transformers."""
    transformers = oracle("transformers")
    inner = Inner.from_str(chat_tokenizer(strips).inner.to_str())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL_TOKENS)
