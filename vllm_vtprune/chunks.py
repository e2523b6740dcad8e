"""Select the words of a tagged prompt to condition on: nouns and, optionally, their modifiers.

Uses only (text, part of speech) pairs and neighbours, no parser, so spaCy's tags and the embedded tagger's both work.
Parts of speech are those of Universal Dependencies; X means none of NOUN, PROPN, ADJ, NUM and VERB.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_vtprune.tagger import DETERMINERS, SENTENCE_END, word_set

Tagged = tuple[str, str]
"""A word and its part of speech."""

_LINKING = word_set(
    "is are was were be been being am 's 're look looks looked seem seems seemed appear appears appeared "
    "become becomes became stay stays stayed"
)
_QUANTIFIERS = word_set(
    "many much more most few fewer fewest several all other others same such own enough less least any some both "
    "another either neither various certain following able"
)
_WITHIN = frozenset(", and or but - / \" ' “ ” ‘ ’".split())  # between the adjectives of a chunk
_BEFORE_PARTICIPLES = word_set("in on at of by with near behind beside under above below between and or")


def pointing_words(words: Sequence[Tagged], modifiers: bool) -> list[int]:
    """Indices, in ``words``, of the nouns and proper nouns.

    With ``modifiers`` also of

    - adjectives and participles before a noun, a number or "one(s)" of the same chunk ("the small red circle");
    - adjectives after a form of "be" or another linking verb ("Which shape is red?");
    - numbers, but "one" only if it counts something.

    Never of determiners, quantifiers ("many", "other"), pronouns, the "tall" of "How tall ...", and the "left" and
    "right" of "left of".
    """
    if not modifiers:
        return [index for index in range(len(words)) if _is_noun(words, index)]
    chunk_has_noun = _chunk_has_noun(words)
    selected = []
    linked = False  # a linking verb precedes in the sentence
    for index, (text, _) in enumerate(words):
        if text[:1] in SENTENCE_END:
            linked = False
        linked = linked or text.lower() in _LINKING
        if _is_noun(words, index) or _modifies(words, index, chunk_has_noun[index + 1], linked):
            selected.append(index)
    return selected


def _is_noun(words: Sequence[Tagged], index: int) -> bool:
    text, tag = words[index]
    return tag in ("NOUN", "PROPN") and text[:1].isalnum()


def _chunk_has_noun(words: Sequence[Tagged]) -> list[bool]:
    """For each index, and the end: whether the chunk there has a noun or a number at this index or later."""
    has_noun = [False] * (len(words) + 1)
    for index in reversed(range(len(words))):
        text, tag = words[index]
        if _is_noun(words, index) or tag == "NUM" or text.lower() == "ones":
            has_noun[index] = True
        elif tag == "ADJ" or text.lower() in _WITHIN or _is_participle(text, tag):
            has_noun[index] = has_noun[index + 1]
    return has_noun


def _modifies(words: Sequence[Tagged], index: int, before_noun: bool, linked: bool) -> bool:
    text, tag = words[index]
    word = text.lower()
    last, last_tag = (words[index - 1][0].lower(), words[index - 1][1]) if index else ("", "")
    following = words[index + 1][0].lower() if index + 1 < len(words) else ""
    if not word[:1].isalnum() or word in _QUANTIFIERS or last == "how":
        return False
    if word in ("left", "right") and following == "of":
        return False
    if tag == "ADJ":
        return before_noun or linked
    if tag == "NUM":
        return before_noun or word != "one"
    described = last in DETERMINERS or last_tag in ("ADJ", "NUM")
    inside = described or ((last_tag == "VERB" or last in _BEFORE_PARTICIPLES) and not word.endswith("ing"))
    return _is_participle(text, tag) and before_noun and inside


def _is_participle(text: str, tag: str) -> bool:
    return tag == "VERB" and text.lower().endswith(("ed", "en", "wn", "ing"))
