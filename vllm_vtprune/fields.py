"""Separate, in instructions, the words about the task and the answer's format from the names of document fields.

"Extract the due date and total as JSON" asks for a date and a total. The verb, the format, and phrases such as "the
following fields" refer to nothing in the image; nor do the verb of "Count apples" and "bounding box".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from vllm_vtprune.chunks import Tagged
from vllm_vtprune.tagger import COLOURS, DETERMINERS, FUNCTION_WORDS, QUANTITIES, readings, word_set

Span = tuple[int, int]
"""Start and end in a prompt, in characters."""


class Instructions(NamedTuple):
    """The instructions of a prompt.

    Attributes:
        silent: spans about the task and the answer's format.
        lists: instructions that name document fields.
        verbs: spans of ``silent`` that the object of an instruction follows.
    """

    silent: list[Span]
    lists: list[Span]
    verbs: list[Span]


IDENTIFIER = re.compile(r"(?<!\w)(?:[A-Za-z][^\W_]*(?:_[^\W_]+)+|[a-z]{2,}\d*(?:[A-Z][a-z0-9]*)+)(?!\w)")
"""A name in snake_case or camelCase."""

# --- templates ------------------------------------------------------------------------------------------------------

_PIECE = re.compile(
    r'"(?P<double>[^"\\\n]{1,200})"(?=\s{0,8}:)'
    r"|'(?P<single>[^'\\\n]{1,200})'(?=\s{0,8}:)"
    r"|(?<!\w)(?P<bare>[A-Za-z_]\w{1,63})(?=[ \t]{0,8}:)"
    r'|"(?:[^"\\\n]|\\.){0,200}+"'
    r"|[{}]"
)
_PLACE = re.compile(
    r"(?:b?box|bounding_?box|polygon)(?:es|s)?_?[23]d|bbox(?:es)?|bounding_?box(?:es)?|polygons?|point(?:s?_[23]d)?|"
    r"coord(?:inate)?s|[xy](?:_?(?:\d|min|max|c|center|centre))?|c[xy]",
    re.IGNORECASE,
)
_BESIDE_PLACE = word_set("label labels class category confidence score text_content width height w h")


def quote_keys(prompt: str) -> str:
    """Replace every JSON template in ``prompt`` by its keys in quotes, and a JSON schema by the keys of its properties.

    ``{"total": "", "items": [{"price": 0}]}`` becomes ``"total", "items", "price"``. A template need not be valid JSON.
    Braces without a key are left unchanged. Keys of templates for locations ("bbox_2d", "label") are removed.
    """
    text, done = "", 0
    start, open_under, last = 0, list[str](), ""  # open_under: the parent key of each open brace
    keys: list[tuple[str, str]] = []  # (parent key, key)
    for piece in _PIECE.finditer(prompt):
        if piece[0] == "{":
            if not open_under:
                start, keys = piece.start(), []
            open_under.append(last)
            last = ""
        elif piece[0] == "}" and open_under:
            open_under.pop()
            last = ""
            if not open_under and keys:
                names = [key for under, key in keys if under == "properties"] or [key for _, key in keys]
                if any(_PLACE.fullmatch(name) for name in names):
                    names = [name for name in names if not _PLACE.fullmatch(name) and name not in _BESIDE_PLACE]
                text += prompt[done:start] + ", ".join(f'"{name}"' for name in names)
                done = piece.end()
        elif piece.lastgroup and open_under:
            last = piece[piece.lastgroup]
            keys.append((open_under[-1], last))
    return text + prompt[done:]


# --- what says how to answer ----------------------------------------------------------------------------------------

_POLITE = (
    r"(?:(?:please|kindly|now|next|just|then|first|finally|also|carefully|only|your task is to|help me(?: to)?|let'?s|"
    r"(?:i|we) (?:want|need|would like|'d like) (?:you )?to|you (?:must|should|need to|have to|will|are to)|"
    r"(?:can|could|would|will) you),?[ \t]+){0,4}"
)
_OFF_DOCUMENTS = r"(?:extract|return|output|parse|retrieve|capture|fetch|convert|fill(?: in| out)?)"
_ASK = rf"(?:{_OFF_DOCUMENTS}|give|list|read|provide|report|print|get|collect)"
_NAMES = r"(?:fields?|keys?|attributes?|properties|columns?)"
_HAVING = r"(?:with|containing|including|having|that (?:has|have|contains?|includes?))"
_WHICH = r"(?:the|these|only|exactly|all|following|required|requested)"

NAMED_FIELDS = rf"\b{_HAVING}(?:[ \t]+{_WHICH})*[ \t]+{_NAMES}\b"
"""The beginning of a list of fields: "with the following keys"."""

_SENTENCE = r"(?:\A|(?<=[^\W\d][.?!])\s|(?<=[)\]\"'][.?!])\s)[ \t]*"
_LINE = r"^[ \t]*(?:(?:[-*•]|\d{1,3}[.)])[ \t]+)?"
_REQUEST = re.compile(
    rf"{_SENTENCE}{_POLITE}{_ASK}\b(?![ \t]+(?:is|are|was|were|of)\b)"
    # elsewhere, "list" and "return" may be nouns
    rf"|(?:{_LINE}|(?<=[,:;])[ \t]*|\b(?:and|then|to)[ \t]+){_POLITE}(?:(?:extract|give|provide|retrieve|parse)\b|"
    rf"{_ASK}(?=[ \t]+(?:the|an?|all|only|it|them|me|each|every|any|this|that|these|those|its|their|your|just|json|as|"
    r"in|out|from)\b))"
    # an instruction whose beginning was removed
    rf"|{_SENTENCE}(?:{NAMED_FIELDS}|{_HAVING}\b)",
    re.IGNORECASE | re.MULTILINE,
)
_ASKS_POLITELY = re.compile(r"\b(?:can|could|would|will) you\b", re.IGNORECASE)
_ITEM = r"\n(?=[ \t]*(?:[-*•]|\(?\d{1,3}[.)])[ \t])"  # the line break before an item of a list
_TO_THE_END = re.compile(
    rf"(?:[^.?!\n]|[.?!](?=\S)|{_ITEM}|(?<=\n\d)[.]|(?<=\n\d\d)[.]|(?<=,)\n)*(?:(?<=:)\n(?:[^.?!]|[.?!](?=\S)|(?<=\n\d)[.])*)?"
)
_ABOUT_DOCUMENTS = re.compile(
    rf"{_OFF_DOCUMENTS}\b|\b(?:json|fields?|invoices?|receipts?|forms?|documents?|statements?|contracts?|passports?|pages?|"
    r"bills?|totals?|amounts?|currency|tax)\b|\w_\w",
    re.IGNORECASE,
)

_AS = r"(?:as|in|into|to|using|with|via)"
_SUCH = (
    r"(?:(?:an?|the|this|one|single|valid|strict|raw|plain|pure|flat|nested|structured|proper|well-formed|only|just|"
    r"following|given|requested|required|specified|expected)[ \t]+){0,5}"
)
_SHAPE = (
    r"(?:[ \t]+(?:objects?|formats?|arrays?|lists?|strings?|schemas?|templates?|dictionar(?:y|ies)|structures?|output|"
    r"code|blocks?|tables?|files?|only))*"
)
_CONTENTS = rf"(?:{_NAMES}|values?|information|info|details?|data|entit(?:y|ies)|items?|elements?|entries)"
_IN_REQUESTS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b(?:{_AS}[ \t]+)?{_SUCH}json\b{_SHAPE}(?:[ \t]+{_HAVING}\b(?:[ \t]+{_WHICH}\b)*(?:[ \t]+{_NAMES}\b)?)?",
        rf"\b{_AS}[ \t]+{_SUCH}(?:xml|yaml|csv|tsv|html|markdown|latex)\b{_SHAPE}",
        rf"\bas[ \t]+{_SUCH}(?:(?:numbered|bulleted|bullet|comma-separated|key-value|python)[ \t]+)?(?:objects?|lists?|"
        r"tables?|arrays?|dictionar(?:y|ies)|strings?|tuples?|pairs?|points?|text|rows?)\b",
        rf"\b{_AS}[ \t]+{_SUCH}(?:[\w/-]{{1,24}}[ \t]+)?(?:formats?|schemas?|templates?|order|structures?)\b",
        r"\bformat(?:s|ted)?\b",
        rf"\b(?:outputs?|results?|responses?)(?=[ \t]+(?:only[ \t]+)?{_AS}[ \t]+{_SUCH}(?:json|xml|yaml|csv|format)\b)",
        rf"\b(?:{_HAVING}[ \t]+)?(?:{_WHICH}[ \t]+)*(?:(?:key|main|data|form)[ \t]+)?fields?\b",
        rf"\bfollowing[ \t]+(?:(?:key|main|important|data|structured)[ \t]+)?{_CONTENTS}\b",
        rf"\b(?:{_NAMES}|values?|information|info|details?|data|schemas?|templates?)(?=[ \t]*:)",
    )
]
_COORDINATE = r"[\[(]?(?:[xy][ _]?(?:\d|min|max|c|center|centre|left|right|top|bottom)?|c[xy]|[wh]|width|height)[\])]?"
_ANYWHERE = [
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for pattern in (
        rf"[\[({{](?=[\[(]?c?[xy]){_COORDINATE}(?:[ \t]*,[ \t]*{_COORDINATE}){{1,7}}[ \t]*[\])}}]",
        r"^[ \t]*(?:[-*•][ \t]|\(?\d{1,3}[.)](?=\s))",  # what an item of a list begins with
        r"\b(?:bounding[ -]box(?:es)?|b-?box(?:es)?)(?:[ \t]+coordinates?)?\b",
    )
]

_ORDERS = (
    r"(?:describe|locate|find|identify|transcribe|summari[sz]e|tell|translate|detect|classify|recogni[sz]e|analy[sz]e|"
    r"compare|explain|calculate|compute|determine|verify|solve|predict|write|generate|choose|select)"
)
_ORDERS_OR_THINGS = (  # "Point at the cup", "Point of sale"
    r"(?:count|point|label|name|caption|segment|mark|crop|outline|order|group|sort|rank|rate|match|spot|ground|type|copy|"
    r"click|zoom|focus|search|pick|repeat|state|check|show|look|ocr|draw|trace|note|guess|answer|respond|reply|"
    r"estimate|highlight)"
)
_OBJECTS_FOLLOW = (
    r"(?:the|an?|all|every|each|any|both|this|that|these|those|its|his|her|their|your|my|me|us|it|them|out|up|down|how|"
    r"what|which|who|where|whether|if|on|at|in|to|for|as|only|just|two|three|four|five|people|men|women|children|visible|"
    rf"{'|'.join(sorted(COLOURS))}|\w+(?<!s)s)\b"
)
_ORDER = re.compile(
    rf"(?:{_SENTENCE}|{_LINE}){_POLITE}(?:{_ORDERS}\b(?![ \t]+(?:is|are|was|were|of)\b)"
    rf"|{_ORDERS_OR_THINGS}(?=[ \t]+{_OBJECTS_FOLLOW}))(?=[ \t]|$)",
    re.IGNORECASE | re.MULTILINE,
)


def find_instructions(prompt: str) -> Instructions:
    """Find the instructions in a single-spaced ``prompt``. A question counts only if it is a polite request.

    An instruction without document vocabulary ("Read the sign.") has silent words but lists no fields.
    """
    instructions = Instructions([match.span() for pattern in _ANYWHERE for match in pattern.finditer(prompt)], [], [])
    end = question = 0  # ends of the last instruction and the last question
    for request in _REQUEST.finditer(prompt):
        start = request.start()
        if start >= end:
            polite = _ASKS_POLITELY.search(request[0])
            if start < question and not polite:
                continue
            remainder = _TO_THE_END.match(prompt, request.end())
            end = remainder.end() if remainder else request.end()
            if prompt[end : end + 1] == "?" and not polite:
                question = end
                end = prompt.rfind("\n", request.end(), end)  # the question may be on its own line
                if end < 0:
                    continue
            for pattern in _IN_REQUESTS:
                instructions.silent.extend(match.span() for match in pattern.finditer(prompt, start, end))
            if _ABOUT_DOCUMENTS.search(prompt, start, end):
                instructions.lists.append((start, end))
        instructions.silent.append(request.span())
        instructions.verbs.append(request.span())
    for order in _ORDER.finditer(prompt):
        if not any(start < order.start() < end for start, end in instructions.lists):  # a field: "order details"
            instructions.silent.append(order.span())
            instructions.verbs.append(order.span())
    return instructions


# --- the names in a list of fields ----------------------------------------------------------------------------------

_OPENS = word_set(", : ; ( [ { / - * • & and or of the a an this these all each every any both first last next me only")
_CLOSES = word_set(", : ; . ! ) ] } / & and or of from in as for on with at by per to into using")
_DESCRIBING = COLOURS | word_set("present visible available possible readable legible")


def tag_fields(words: Sequence[Tagged]) -> list[Tagged]:
    """Tag the field names in the words of a list of fields as nouns.

    Between two separators ("and", a comma, a preposition, a silent word with empty text), a word that may be a noun is
    one: "total" and "name" in "name, date, total". A preceding adjective stays an adjective ("total amount").
    """
    tagged = list(words)
    start = 0
    for end in range(len(words) + 1):
        if end < len(words) and _is_content(words[end][0]):
            continue
        opened = start == 0 or _separates(words[start - 1][0], _OPENS)
        closed = end == len(words) or _separates(words[end][0], _CLOSES)
        if opened and closed:
            for index in range(start, end):
                text, tag = words[index]
                compound = text.endswith("ing") and index < end - 1  # "billing address"
                may_name = tag not in ("ADV", "PROPN") and (compound or _may_name(text.lower()))
                if may_name and (tag == "VERB" or index == end - 1):
                    tagged[index] = (text, "NOUN")
            if 0 < start < end and words[start - 1][0].lower() in ("first", "last"):
                tagged[start - 1] = (words[start - 1][0], "ADJ")
        start = end + 1
    return tagged


def tag_object(words: Sequence[Tagged]) -> list[Tagged]:
    """Tag the object, in the words after the verb of an instruction, as a noun: "faces" in "Detect all faces"."""
    tagged = list(words)
    index = next((i for i, (text, _) in enumerate(tagged) if text.lower() not in DETERMINERS | QUANTITIES), len(words))
    if index < len(words) and tagged[index][1] == "VERB" and _may_name(tagged[index][0].lower()):
        tagged[index] = (tagged[index][0], "NOUN")
    return tagged


def _is_content(text: str) -> bool:
    return text[:1].isalpha() and text.lower() not in FUNCTION_WORDS


def _separates(text: str, marks: frozenset[str]) -> bool:
    return not text.strip() or text.lower() in marks


def _may_name(word: str) -> bool:
    possible = readings(word)
    return word not in _DESCRIBING and ("NOUN" in possible or not possible)
