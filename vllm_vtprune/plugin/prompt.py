"""What is read off a prompt: its text, and its nouns as tokens."""

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
    """The text of a prompt, without image placeholders, special tokens and the names of the speakers."""
    tokens = [token for token in prompt if token != image_token_id]
    return ROLE_MARKER.sub(" ", tokenizer.decode(tokens, skip_special_tokens=True))


def said_in_turns(prompt: Sequence[int], tokenizer: Any, image_token_id: int, *, turn: str) -> str:
    """The text of a prompt in turns, without image placeholders, names of speakers and what the system says.

    Args:
        prompt: its tokens.
        tokenizer: of the model.
        image_token_id: stands for images.
        turn: the token that begins each turn: the speaker, a line feed, what was said.
    """
    turn_id = tokenizer.get_vocab().get(turn)
    turns: list[list[int]] = [[]]
    for token in prompt:
        if token == turn_id:
            turns.append([])
        elif token != image_token_id:
            turns[-1].append(token)
    before, *texts = (tokenizer.decode(said, skip_special_tokens=True) for said in turns)
    spoken = [said for speaker, _, said in (text.partition("\n") for text in texts) if speaker.strip() != "system"]
    return "\n".join([before, *spoken])


def noun_ids(noun: str, tokenizer: Any) -> list[int]:
    """Token ids of a noun as the model would read it inside a sentence, with its leading space."""
    before = tokenizer.encode("the", add_special_tokens=False)
    within = tokenizer.encode(f"the {noun}", add_special_tokens=False)
    if within[: len(before)] == before:
        return list(within[len(before) :])
    return list(tokenizer.encode(noun, add_special_tokens=False))
