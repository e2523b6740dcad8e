"""Which words of a tagged prompt point at something: its nouns and, where they are wanted, what describes them.

Rules about neighbours, over (text, part of speech) pairs alone: spaCy's tags and the embedded tagger's serve alike, and
no parser is needed. Parts of speech are those of Universal Dependencies; X says no more than that a word is none of
NOUN, PROPN, ADJ, NUM and VERB.
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
    """The places, in ``words``, of the nouns and proper nouns.

    With ``modifiers`` also of

    - adjectives and participles before a noun, a number or "one(s)" of the same chunk ("the small red circle");
    - adjectives after a form of "be" or the like ("Which shape is red?");
    - numbers, "one" only where it counts something.

    Never of determiners, quantifiers ("many", "other"), pronouns, the "tall" of "How tall ...", and the "left" and
    "right" of "left of".
    """
    if not modifiers:
        return [place for place in range(len(words)) if _is_noun(words, place)]
    chunk_goes_on = _goes_on(words)
    found = []
    linked = False  # to the subject, by a verb earlier in the sentence
    for place, (text, _) in enumerate(words):
        if text[:1] in SENTENCE_END:
            linked = False
        linked = linked or text.lower() in _LINKING
        if _is_noun(words, place) or _modifies(words, place, chunk_goes_on[place + 1], linked):
            found.append(place)
    return found


def _is_noun(words: Sequence[Tagged], place: int) -> bool:
    text, tag = words[place]
    return tag in ("NOUN", "PROPN") and text[:1].isalnum()


def _goes_on(words: Sequence[Tagged]) -> list[bool]:
    """For each place, and for the end, whether a chunk that reaches it has a noun or a number there or later."""
    goes_on = [False] * (len(words) + 1)
    for place in reversed(range(len(words))):
        text, tag = words[place]
        if _is_noun(words, place) or tag == "NUM" or text.lower() == "ones":
            goes_on[place] = True
        elif tag == "ADJ" or text.lower() in _WITHIN or _is_participle(text, tag):
            goes_on[place] = goes_on[place + 1]
    return goes_on


def _modifies(words: Sequence[Tagged], place: int, before_noun: bool, linked: bool) -> bool:
    text, tag = words[place]
    word = text.lower()
    last, last_tag = (words[place - 1][0].lower(), words[place - 1][1]) if place else ("", "")
    following = words[place + 1][0].lower() if place + 1 < len(words) else ""
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
