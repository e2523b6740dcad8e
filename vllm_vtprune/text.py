"""Extract the words of a prompt to condition on (ResPrune, sections III-E and IV-A).

First drop answer-format instructions by patterns, then keep the nouns and, optionally, their modifiers. Uses spaCy's
``en_core_web_sm``, like the paper, if it is installed (never downloads it); else an embedded pipeline: spaCy's
tokeniser and the rules of `vllm_vtprune.tagger`. Both support English; in other languages, every word is kept.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from threading import Lock
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from vllm_vtprune.chunks import Tagged, pointing_words
from vllm_vtprune.fields import IDENTIFIER, NAMED_FIELDS, Span, find_instructions, quote_keys, tag_fields, tag_object
from vllm_vtprune.tagger import FUNCTION_WORDS, readings, tag_words, word_set

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spacy.language import Language
    from spacy.tokens import Doc

SPACY_MODEL = "en_core_web_sm"
EMBEDDED = "embedded"
MAX_CHARS = 8_000  # most characters of a prompt to read: half at its beginning, half at its end
MAX_PIECES = 256  # most pieces of these to read: marks, and up to 8 letters of a word

TextFallback: TypeAlias = Literal["no_nouns", "not_english_all_words"]
"""Why a selection is not conditioned on nouns: there are none (no conditioning), or the text is not English
(conditioned on every word)."""

_lock = Lock()


class Reading(NamedTuple):
    """The words of a prompt to condition on, and the fallback if they are not its nouns."""

    nouns: tuple[str, ...]
    fallback: TextFallback | None


def read_prompt(prompt: str, clean: bool = True, modifiers: bool = True) -> Reading:
    """The words to condition on: the nouns of ``prompt``, in order, without duplicates (ignoring case).

    Drops answer-format instructions, code and the verbs of instructions first. A quoted string, a snake_case or
    camelCase name, and a key of a JSON template each count as one noun. Compounds are split into words. A prompt that
    is not English gives every word.

    Reads at most 256 words and marks: of a longer prompt, half at its beginning and half at its end. Takes at most tens
    of milliseconds. Results are memoised.

    Args:
        prompt: any text; an unpaired surrogate counts as a mark.
        clean: False: every word, in any language (setting 1 of the paper's ablation).
        modifiers: with ``clean``, also adjectives and numbers of the same chunks ("the red circle", "two dogs"), and
            adjectives after a form of "be"; see `vllm_vtprune.chunks.pointing_words`.
    """
    if len(prompt) > MAX_CHARS:
        prompt = f"{prompt[: MAX_CHARS // 2]}\n{prompt[-MAX_CHARS // 2 :]}"
    return _read(prompt, clean, clean and modifiers)


@lru_cache(maxsize=1024)
def _read(prompt: str, clean: bool, modifiers: bool) -> Reading:
    prompt = _SURROGATES.sub("\ufffd", prompt)
    if not clean:
        nouns = _every_word(_shortened(prompt))
        return Reading(nouns, None if nouns else "no_nouns")
    prompt = _readable(prompt)
    tagged = _tagged(prompt)
    if tagged is None:
        return Reading(_every_word(prompt), "not_english_all_words")
    nouns = _pointing(prompt, *tagged, modifiers)
    return Reading(nouns, None if nouns else "no_nouns")


def _tagged(prompt: str) -> tuple[list[int], list[Tagged]] | None:
    """Start of each word of a prompt, and the words with their parts of speech; None if it is not English."""
    pipeline = _pipeline()
    with _lock, pipeline.memory_zone():  # otherwise spaCy's vocabulary grows with every new word
        doc = pipeline(prompt)
        if not _is_english(doc):
            return None
        return [token.idx for token in doc], [(token.text, token.pos_) for token in doc]


def _pointing(prompt: str, starts: list[int], words: list[Tagged], modifiers: bool) -> tuple[str, ...]:
    """The words of an English prompt to condition on, without duplicates.

    Args:
        prompt: the result of `_readable`.
        starts: start of each word.
        words: words with their parts of speech.
        modifiers: see `read_prompt`.
    """
    instructions = find_instructions(prompt)
    silent = _covered(instructions.silent, len(prompt))
    names = [(*match.span(), match[match.lastindex or 0].strip()) for match in _QUOTED.finditer(prompt)]
    quoted = _covered([(start, end) for start, end, _ in names], len(prompt))
    names += [(*match.span(), match[0]) for match in IDENTIFIER.finditer(prompt) if not quoted[match.start()]]
    names = [name for name in names if name[2] and not silent[name[0]]]
    named = _covered([(start, end) for start, end, _ in names], len(prompt))
    words = [
        ("", "X") if silent[start] else (text, "PROPN" if named[start] else tag)
        for start, (text, tag) in zip(starts, words, strict=True)
    ]
    for _, end in instructions.verbs:
        object_words = slice(bisect_left(starts, end), bisect_left(starts, end) + 4)
        words[object_words] = tag_object(words[object_words])
    for start, end in instructions.lists:
        field_words = slice(bisect_left(starts, start), bisect_left(starts, end))
        words[field_words] = tag_fields(words[field_words])
    selected = [(starts[index], words[index][0]) for index in pointing_words(words, modifiers)]
    selected = [word for word in selected if not named[word[0]]] + [(start, text) for start, _, text in names]
    return _once(text for _, text in sorted(selected))


def _every_word(text: str) -> tuple[str, ...]:
    """The words of a text in any language, without duplicates; split at spaces and marks."""
    plain = "".join(char if char in _IN_WORDS or unicodedata.category(char)[0] in "LMN" else " " for char in text)
    return _once(word for part in plain.split() if (word := part.strip(_IN_WORDS)))


def _covered(spans: Iterable[Span], length: int) -> bytearray:
    """For each of ``length`` characters, whether a span covers it."""
    covered = bytearray(length)
    for start, end in spans:
        covered[start:end] = b"\1" * (end - start)
    return covered


def clean_instruction(prompt: str) -> str:
    """Remove answer-format instructions, code, chat markers and option letters from ``prompt``."""
    prompt = _single_spaced(_FENCED.sub(_keys_alone, prompt).strip() or prompt)
    for pattern in _INSTRUCTIONS:
        prompt = pattern.sub(" ", prompt)
    return _single_spaced(prompt).strip(" \t\n,;:")


@cache
def text_pipeline_name() -> str:
    """The pipeline that finds the nouns: ``en_core_web_sm`` if it is installed, else ``embedded``."""
    try:
        distribution(SPACY_MODEL)  # spaCy's own check; a folder of that name is no model
    except PackageNotFoundError:
        return EMBEDDED
    return SPACY_MODEL


@cache
def _pipeline() -> Language:
    import spacy  # takes about a second
    from spacy.language import Language

    if text_pipeline_name() == SPACY_MODEL:
        return spacy.load(SPACY_MODEL, exclude=["parser", "ner", "lemmatizer"])
    Language.component("vtprune_nouns", func=tag_words)
    embedded = spacy.blank("en")
    embedded.add_pipe("vtprune_nouns")
    return embedded


def _readable(prompt: str) -> str:
    """Clean and shorten a prompt. Split long words, because spaCy's tokeniser takes quadratic time in their length."""
    return re.sub(r"(\S{64})(?=\S)", r"\1 ", _shortened(clean_instruction(quote_keys(prompt))))


def _shortened(text: str) -> str:
    """Cut the middle out of a text of more than `MAX_PIECES` pieces."""
    ends = [piece.end() for piece in _PIECE.finditer(text)]
    half = MAX_PIECES // 2
    return text if len(ends) <= MAX_PIECES else f"{text[: ends[half - 1]]}\n{text[ends[-half - 1] :]}"


def _keys_alone(code: re.Match[str]) -> str:
    """Replace fenced code by a line break, unless it holds only quoted keys of a template."""
    return f"\n{code[1]}\n" if _ONLY_QUOTED.fullmatch(code[1]) else "\n"


def _single_spaced(text: str) -> str:
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text))


def _once(words: Iterable[str]) -> tuple[str, ...]:
    unique: dict[str, str] = {}
    for word in words:
        unique.setdefault(word.casefold(), word)
    return tuple(unique.values())


_SURROGATES = re.compile("[\ud800-\udfff]")
_IN_WORDS = "'’-_"
_PIECE = re.compile(r"\w{1,8}|[^\w\s]|\n")
_FENCED = re.compile(r"```[ \t]*[\w+-]*((?:(?!```).)*+)```", re.DOTALL)
_ONLY_QUOTED = re.compile(r'(?:"[^"\n]*"|[\s,\[\]])*+')

# --- answer-format instructions -------------------------------------------------------------------------------------

_START = r"(?:^|(?<=[\n.?!:;,]))[ \t]*(?:please[ \t]+|just[ \t]+|then[ \t]+)*"
_REST = rf"(?:(?!{NAMED_FIELDS}|(?<=json )with\b|(?<=json object )with\b)[^.?!:\n])*[.?!:]*"
_FORMAT = (
    r"(?=[^.?!:\n]{0,120}\b(?:words?|phrases?|letters?|options?|choices?|yes|sentences?|numbers?|digits?|short|brief|single|"
    r"json|format|unanswerable|paragraphs?|briefly|concisely|directly|only|step)\b)"
)
_PICTURE = r"(?:the|this|a|an|each)[ \t]+(?:(?:provided|given|following|above)[ \t]+)?(?:image|picture|photo|scene)\b"
_MANNER = (
    r"(?:[ \t]*,?[ \t]*(?:in (?:detail|brief|short|one sentence|a sentence|a few words)|briefly|concisely|shortly))?"
)

_INSTRUCTIONS = tuple(
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for pattern in (
        # chat markup and LLaVA's system prompt
        r"<\|im_start\|>[ \t]*(?:user|assistant|system)\b",
        r"<\|?[^<>\s|]{1,40}\|?>|\[/?INST\]|```[ \t]*\w*",
        r"^[ \t]*(?:#{1,6}[ \t]*)?(?:user|assistant|system|human|ai|bot|instructions?|response|input)[ \t]*(?::|$)",
        r"\byou are an? (?:[\w-]+[ \t]+){0,4}(?:assistant|chatbot|model|ai)\b[^.?!:\n]*[.?!:]*",
        r"a chat between a curious (?:human|user) and an artificial intelligence assistant\.?",
        r"the assistant gives helpful, detailed, and polite answers to the (?:human|user)'s questions\.?",
        r"(?-i:\b(?:USER|ASSISTANT|SYSTEM|HUMAN)[ \t]*:)",
        # labels and option letters of multiple-choice prompts
        r"^[ \t]*(?:(?:short[ \t]+)?answer|question|context|hint|options?|choices?|caption|q|a|"
        r"reference ocr tokens?)[ \t]*:",
        r"\b(?:short[ \t]+)?answer[ \t]*:[ \t]*$",
        r"\bN/A\b",
        r"^[ \t]*\(?[A-H][.):](?=\s)",
        r"\([A-H]\)",
        r"there are several options[:.]?",
        # "Answer the question using a single word or phrase.", "Please answer yes or no."
        _START + r"(?:directly |briefly |only )?(?:answer|respond|reply)\b(?:[ \t]+to)?"
        r"(?:[ \t]+(?:the|this|each|my)[ \t]+(?:following[ \t]+)?questions?)?(?:[ \t]+(?:using|with|by|in|as)\b)?"
        + _FORMAT
        + r"(?:(?<=using|.with|...by|...in|...as)|[ \t]+(?:yes|briefly|concisely|directly|only|shortly)\b)"
        + _REST,
        _START + r"answer the (?:following )?questions?[ \t]*(?:below)?[ \t]*(?:[.!:]|$)",
        _START + r"when the provided information is insufficient" + _REST,
        _START + r"(?:select|choose|pick) (?:the|one|an?) (?:(?:correct|best|right|appropriate|single)[ \t]+){0,3}"
        r"(?:options?|answers?|choices?|responses?|letters?|one)\b" + _REST,
        _START + r"(?:your|the|final) (?:final )?(?:answer|response) (?:should|must|needs?)\b" + _REST,
        _START + r"(?:provide|give|write|return|output)[ \t]+(?:me[ \t]+)?(?:only |just )?(?:an?|the|your)?[ \t]*"
        r"(?:[\w-]+[ \t]+){0,3}(?:answers?|explanation|reasoning|letter)\b" + _REST,
        _START
        + r"(?:provide|give|write|return|output)[ \t]+(?:me[ \t]+)?(?:(?:only|just|an?|the|valid|raw|strict)[ \t]+)*"
        r"json\b(?:[ \t]+(?:objects?|format|only))*[ \t]*(?=[.,!:\n]|$)[.!:]*",
        # captions
        _START + r"(?:(?:provide|give|write|generate|create)[ \t]+)?(?:me[ \t]+)?an?[ \t]+(?:[\w-]+[ \t]+){0,3}"
        r"(?:caption|description|summary)(?:[ \t]+(?:of|for|about)[ \t]+"
        + _PICTURE
        + r")?"
        + _MANNER
        + r"[ \t]*(?:[.!?:]|$)",
        _START + r"(?:describe|caption|summarize)[ \t]+" + _PICTURE + _MANNER + r"[ \t]*(?:[.!?:]|$)",
        # manner
        r"(?:,[ \t]*)?\b(?:in|with|using) (?:at most |no more than )?(?:one|1|two|three|a single|a few|a short) "
        r"(?:short )?(?:words?|phrases?|sentences?|letters?)"
        r"(?: or (?:a )?(?:short )?(?:phrases?|words?|sentences?))?\b",
        _START + r"(?:let'?s )?think (?:about it )?step[ -]by[ -]step\b" + _REST,
        _START + r"(?:be|keep (?:it|your (?:answer|response)|the answer)) (?:very )?(?:concise|brief|short)\b" + _REST,
        _START
        + r"(?:do not|don'?t)? ?explain (?:your (?:reasoning|answer)\b|anything\b|why[ \t]*(?=[.?!\n]|$))"
        + _REST,
        _START + r"(?:no explanations?|without (?:any )?explanations?)\b" + _REST,
    )
)

_QUOTED = re.compile(
    r'"([^"\n]{1,200})"|“([^”\n]{1,200})”|‘([^’\n]{1,200})’(?!\w)|`([^`\n]{1,200})`|'
    r"(?<![\w'])'(?!\s)([^'\n]{0,200}[^'\s])'(?!\w)"
)

# --- English --------------------------------------------------------------------------------------------------------

_STRICTLY_ENGLISH = word_set(
    "the this that these those is are was were does did what which who where when why how many of there and with "
    "any can could would should please you your it its from by for describe read find count show list name extract "
    "return output provide retrieve"
)


def _is_english(doc: Doc) -> bool:
    """Latin script, and at least half known words including a strictly English one, or 75 % known words.

    Up to three ASCII words need not be known: names and misspellings are nouns, too.
    """
    letters = [c for c in doc.text if c.isalpha()]
    if sum(c < "\u0250" for c in letters) * 2 < len(letters):
        return False
    words = [t.lower_ for t in doc if t.is_alpha and not t.is_upper]
    known = sum(word in FUNCTION_WORDS or bool(readings(word)) for word in words)
    if len(words) < 4:
        return doc.text.isascii() or known * 2 >= len(words)
    least_share = 0.5 if any(word in _STRICTLY_ENGLISH for word in words) else 0.75
    return known >= least_share * len(words)
