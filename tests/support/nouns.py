"""The words of a prompt alone."""

from vllm_vtprune.text import read_prompt


def extract_nouns(prompt: str, clean: bool = True, modifiers: bool = True) -> list[str]:
    """The words of `read_prompt`, without the fallback."""
    return list(read_prompt(prompt, clean, modifiers).nouns)
