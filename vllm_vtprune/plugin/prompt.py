"""Extract a prompt's text, and the token ids of its nouns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

ROLE_MARKER = re.compile(
    r"\b(?:USER|ASSISTANT|SYSTEM|HUMAN)\s*:"  # Vicuna
    r"|\[/?INST\]"  # Mistral
    r"|^(?:user|assistant|system)$",  # ChatML, without its special tokens
    re.MULTILINE,
)


def text_of(prompt: Sequence[int], tokenizer: Any, image_token_id: int) -> str:
    """Decode a prompt without image placeholders, special tokens and role names."""
    tokens = [token for token in prompt if token != image_token_id]
    return ROLE_MARKER.sub(" ", tokenizer.decode(tokens, skip_special_tokens=True))


def text_without_system(prompt: Sequence[int], tokenizer: Any, image_token_id: int, *, turn: str) -> str:
    """Decode a prompt of turns without image placeholders, role names and the system message.

    Args:
        prompt: token ids.
        tokenizer: the model's tokenizer.
        image_token_id: id of the placeholder token.
        turn: token that begins each turn; the role, a line feed and the message follow.
    """
    turn_id = tokenizer.get_vocab().get(turn)
    turns: list[list[int]] = [[]]
    for token in prompt:
        if token == turn_id:
            turns.append([])
        elif token != image_token_id:
            turns[-1].append(token)
    before, *texts = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in turns)
    messages = [message for role, _, message in (text.partition("\n") for text in texts) if role.strip() != "system"]
    return "\n".join([before, *messages])


def noun_ids(noun: str, tokenizer: Any) -> list[int]:
    """Token ids of a noun inside a sentence, that is with its leading space."""
    article = tokenizer.encode("the", add_special_tokens=False)
    phrase = tokenizer.encode(f"the {noun}", add_special_tokens=False)
    if phrase[: len(article)] == article:
        return list(phrase[len(article) :])
    return list(tokenizer.encode(noun, add_special_tokens=False))
