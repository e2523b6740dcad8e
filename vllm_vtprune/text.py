"""The words of a prompt that point at something in the image (ResPrune, sections III-E and IV-A).

Two steps: drop answer-format instructions by patterns, then keep the nouns. The paper reads nouns off spaCy's
``en_core_web_sm``; it is used when it is installed (it is never downloaded), else an embedded pipeline: spaCy's
tokeniser, the parts of speech each word can have (lemminflect's tables), and rules that look at its neighbours.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from threading import Lock
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from spacy.tokens import Doc, Token

SPACY_MODEL = "en_core_web_sm"
EMBEDDED = "embedded"
MAX_CHARS = 8_000  # of a prompt that are looked at

TextFallback: TypeAlias = Literal["no_nouns", "not_english"]
"""Why a selection that may look at the text is made without it."""

_lock = Lock()


class Reading(NamedTuple):
    """What was found in a prompt: ``nouns``, or why there are none."""

    nouns: tuple[str, ...]
    fallback: TextFallback | None


def read_prompt(prompt: str, clean: bool = True) -> Reading:
    """As `extract_nouns`, with the reason where it finds nothing to condition on.

    What was read last is remembered: several images of a message are conditioned on one text.
    """
    return _read(prompt[:MAX_CHARS], clean)


@lru_cache(maxsize=64)
def _read(prompt: str, clean: bool) -> Reading:
    nouns = tuple(extract_nouns(prompt, clean))
    if nouns:
        return Reading(nouns, None)
    return Reading(nouns, "not_english" if clean and not is_english(prompt) else "no_nouns")


def extract_nouns(prompt: str, clean: bool = True) -> list[str]:
    """The nouns of ``prompt``, in order, as written there, each once (letter case aside).

    Answer-format instructions are dropped first. A quoted string counts as one noun, whole: it is what a question about
    text in the image asks for. Compounds come word by word. A prompt that is not English gives ``[]``, which means
    text-agnostic pruning. Only the first 8,000 characters are looked at.

    With ``clean=False`` every word is returned, in any language (setting 1 of the paper's ablation).
    """
    if not clean:
        return _once(re.findall(r"\w+(?:['’-]\w+)*", prompt[:MAX_CHARS]))
    prompt = _readable(prompt)
    with _lock:  # spaCy pipelines share a vocabulary that grows as they run
        doc = _pipeline()(prompt)
        if not _is_english(doc):
            return []
        found = [
            (token.idx, token.text) for token in doc if token.pos_ in ("NOUN", "PROPN") and token.text[0].isalnum()
        ]
    quotes = [(match.start(), match.end(), match[match.lastindex or 0]) for match in _QUOTED.finditer(prompt)]
    found = [noun for noun in found if not any(start <= noun[0] < end for start, end, _ in quotes)]
    found += [(start, text.strip()) for start, _, text in quotes if text.strip()]
    return _once([text for _, text in sorted(found)])


def is_english(prompt: str) -> bool:
    """Whether `extract_nouns` reads ``prompt``: it is in Latin script, and most of its words are English ones."""
    with _lock:
        return _is_english(_pipeline()(_readable(prompt)))


def clean_instruction(prompt: str) -> str:
    """``prompt`` without what tells the model how to answer, chat markers and option letters."""
    prompt = _single_spaced(prompt)
    for pattern in _INSTRUCTIONS:
        prompt = pattern.sub(" ", prompt)
    return _single_spaced(prompt).strip(" \t\n,;:")


@cache
def text_pipeline_name() -> str:
    """Which pipeline finds the nouns: ``en_core_web_sm`` where it is installed, else ``embedded``."""
    try:
        distribution(SPACY_MODEL)  # as spaCy looks for it: a folder of that name is no model
    except PackageNotFoundError:
        return EMBEDDED
    return SPACY_MODEL


@cache
def _pipeline() -> Callable[[str], Doc]:
    import spacy  # a second of imports, paid by the first prompt
    from spacy.language import Language

    if text_pipeline_name() == SPACY_MODEL:
        return spacy.load(SPACY_MODEL, exclude=["parser", "ner", "lemmatizer"])
    Language.component("vtprune_nouns", func=_tag_nouns)
    embedded = spacy.blank("en")
    embedded.add_pipe("vtprune_nouns")
    return embedded


def _readable(prompt: str) -> str:
    """What is looked at of a prompt.

    spaCy's tokeniser takes quadratic time in the length of what stands between two spaces, so long strings are cut.
    """
    return re.sub(r"(\S{64})(?=\S)", r"\1 ", clean_instruction(prompt[:MAX_CHARS]))


def _single_spaced(text: str) -> str:
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text))


def _once(words: list[str]) -> list[str]:
    first: dict[str, str] = {}
    for word in words:
        first.setdefault(word.casefold(), word)
    return list(first.values())


# --- answer-format instructions -------------------------------------------------------------------------------------

_START = r"(?:^|(?<=[\n.?!:;,]))[ \t]*(?:please[ \t]+|just[ \t]+|then[ \t]+)*"
_REST = r"[^.?!:\n]*[.?!:]*"
_FORMAT = (
    r"(?=[^.?!:\n]*\b(?:words?|phrases?|letters?|options?|choices?|yes|sentences?|numbers?|digits?|short|brief|single|"
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
        r"<\|?[^<>\s|]{1,40}\|?>",
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
        _START
        + r"(?:select|choose|pick) (?:the|one|an?) (?:correct|best|right|appropriate|single|option|answer)\b"
        + _REST,
        _START + r"(?:your|the|final) (?:final )?(?:answer|response) (?:should|must|needs?)\b" + _REST,
        _START + r"(?:provide|give|write|return|output)[ \t]+(?:me[ \t]+)?(?:only |just )?(?:an?|the|your)?[ \t]*"
        r"(?:[\w-]+[ \t]+){0,3}(?:answers?|explanation|reasoning|letter|json)\b" + _REST,
        # captions
        _START + r"(?:(?:provide|give|write|generate|create)[ \t]+)?(?:me[ \t]+)?an?[ \t]+(?:[\w-]+[ \t]+){0,3}"
        r"(?:caption|description|summary)(?:[ \t]+(?:of|for|about)[ \t]+"
        + _PICTURE
        + r")?"
        + _MANNER
        + r"[ \t]*(?:[.!?:]|$)",
        _START + r"(?:describe|caption|summarize)[ \t]+" + _PICTURE + _MANNER + r"[ \t]*(?:[.!?:]|$)",
        # manner
        r",?[ \t]*\b(?:in|with|using) (?:at most |no more than )?(?:one|1|two|three|a single|a few|a short) "
        r"(?:short )?(?:words?|phrases?|sentences?|letters?)"
        r"(?: or (?:a )?(?:short )?(?:phrases?|words?|sentences?))?\b",
        _START + r"(?:let'?s )?think (?:about it )?step[ -]by[ -]step\b" + _REST,
        _START + r"(?:be|keep (?:it|your (?:answer|response)|the answer)) (?:very )?(?:concise|brief|short)\b" + _REST,
        _START + r"(?:do not|don'?t)? ?explain (?:your (?:reasoning|answer)|anything|why)\b" + _REST,
        _START + r"(?:no explanations?|without (?:any )?explanations?)\b" + _REST,
    )
)

_QUOTED = re.compile(
    r'"([^"\n]{1,200})"|“([^”\n]{1,200})”|‘([^’\n]{1,200})’(?!\w)|(?<![\w\'])\'(?!\s)([^\'\n]{0,200}[^\'\s])\'(?!\w)'
)

# --- the embedded pipeline ------------------------------------------------------------------------------------------


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_DETERMINERS = _set(
    "the a an this that these those my your his her its our their 's any some each every no another both"
)
_DO = _set("do does did")
_MODALS = _set("can could will would shall should may might must to ca wo")
_BE_HAVE = _set("is are was were be been being am 's 're 'm has have had having 've")
_SUBJECTS = _set("i you he she it we they who that")
_WH = _set("what which who whom whose where when why how what's")
_QUANTITIES = _set(
    "many much more most few several all other same such one two three four five six seven eight nine ten"
)
_FUNCTION_WORDS = (
    _DETERMINERS | _DO | _MODALS | _BE_HAVE | _SUBJECTS | _WH | _QUANTITIES
    | _set(
        "me him us them mine yours hers ours theirs myself yourself himself herself itself ourselves "
        "themselves in on at of for from by with without within to into onto upon over under below above "
        "beneath beside besides behind between among across through throughout during before after against "
        "along around near off out up down about as than like per via toward towards inside outside next and "
        "or but nor so yet if then because while whether though although until since unless not n't there "
        "here now just only also too very quite really still ever never always often already again else even "
        "maybe perhaps rather almost yes ok okay please something anything nothing everything someone anyone "
        "everyone nobody anybody somebody everybody least less enough either neither own first second third "
        "last ago away together apart well got getting get gets doing done let lets 'll 'd etc"
    )
)  # fmt: skip
_STRICTLY_ENGLISH = _set(
    "the this that these those is are was were does did what which who where when why how many of there and with "
    "any can could would should please you your it its from by for describe read find count show list name"
)

# words with a noun reading in the tables that questions use as adjectives, and as verbs
_ADJECTIVES = _set(
    "red orange yellow green blue purple pink brown black white gray grey beige tan silver golden violet "
    "turquoise young old new small little big large huge tiny tall short long high low wide narrow thick "
    "thin deep fat slim heavy left right upper lower main different similar visible empty full open "
    "closed hot cold warm cool wet dry dark bright clean dirty round square flat sharp smooth rough hard "
    "soft loud quiet happy sad angry real fake good bad better best worse worst nice pretty fresh sweet "
    "raw ripe correct wrong possible likely available total entire whole modern ancient professional male "
    "female live dead free busy safe alive asleep present public private formal casual famous elderly "
    "adult blond blonde bald major minor average normal regular special common favorite favourite "
    "electric domestic wild native natural human medium clear plain curly straight solid broken tasty "
    "current recent final overall able well-known transparent following average fast slow quick"
)
# of those adjectives, the ones that name a thing too
_THINGS_TOO = _set("square orange human adult male female professional native")
_VERBS = _set(
    "say see do go come wear hold eat drink look use play ride stand sit lie run walk fly catch throw hit "
    "kick jump read write show tell indicate mean make take give get put keep find know think want need "
    "seem appear become happen contain cover carry pull push drive travel watch feed reach touch describe "
    "identify list count name explain state provide determine estimate compare locate translate "
    "transcribe believe expect guess suggest depict represent face point belong exist occur work live fit "
    "move stop sell buy cost spell advertise celebrate grow swim sleep smile talk speak call hang lean "
    "face cook cut prepare wait pose perform visit enjoy like love help try start begin end answer"
)
_IMPERATIVES = _VERBS | _set("answer tell detect point zoom summarize caption focus check verify complete note")
_ING_NOUNS = _set(
    "building buildings painting paintings clothing ceiling ceilings wedding morning evening railing "
    "railings awning lightning string king ring thing things wing wings swing spring sling sibling "
    "earring earrings writing drawing parking dining swimming living shopping skiing surfing snowboarding "
    "skateboarding bowling fishing boxing wrestling washing vending landing lettering wording siding "
    "stuffing frosting icing topping toppings dressing pudding dumpling flooring lighting seating housing "
    "crossing meeting training racing sewing cutting rating opening ending"
)
_KNOWN_NOUNS = _set("top bottom front back side end color colour kind type sort way people")
_ADJECTIVE_ENDING = re.compile(r"(?:al|ic|ous|ive|ful|less|able|ible|ern|ary|ish|ian)$")
_SENTENCE_END = frozenset(".?!:;\n")


def _tag_nouns(doc: Doc) -> Doc:
    """Set ``pos_`` to NOUN, PROPN, VERB, ADJ or X for each token of ``doc``."""
    shouting = sum(t.is_upper for t in doc if t.is_alpha) * 2 > sum(t.is_alpha for t in doc)
    verb_due = False  # "does the sign ...", "can the dog ...": a bare verb is still to come
    first = True  # in its sentence
    for token in doc:
        if not token.is_alpha and not _is_compound(token):
            token.pos_ = "X"
            if token.text[0] in _SENTENCE_END:
                first, verb_due = True, False
            continue
        word = token.lower_
        if word in _FUNCTION_WORDS or len(word) == 1:
            token.pos_ = "X"
            verb_due = (verb_due or word in _DO | _MODALS - {"to"}) and word not in _BE_HAVE - {"'s"}
        else:
            token.pos_ = _part_of_speech(token, verb_due, first, proper=not (shouting or first))
            verb_due = verb_due and token.pos_ != "VERB"
        first = False
    return doc


def _part_of_speech(token: Token, verb_due: bool, first: bool, proper: bool) -> str:
    word, doc = token.lower_, token.doc
    before = doc[token.i - 1].lower_ if token.i else ""
    after_noun = token.i > 0 and doc[token.i - 1].pos_ in ("NOUN", "PROPN")
    after_determiner = before in _DETERMINERS | _QUANTITIES | {"what", "which", "whose"}
    next_word = doc[token.i + 1].lower_ if token.i + 1 < len(doc) else ""
    beside = next_word in ("left", "right") and [t.lower_ for t in doc[token.i + 2 : token.i + 3]] == ["of"]
    next_is_nominal = _may_be_noun(next_word) and not beside

    if proper and (token.is_title or token.is_upper):
        return "PROPN"
    possible = _possible(word) | ({"NOUN"} if word in _ING_NOUNS else set())
    if not possible or possible == {"NOUN"}:
        return "ADJ" if word in _ADJECTIVES else "ADV" if word.endswith("ly") and not possible else "NOUN"
    if "NOUN" not in possible and word not in _ADJECTIVES:
        return "VERB" if "VERB" in possible else "ADJ"

    if word in _ADJECTIVES:
        after_adjective = token.i > 0 and doc[token.i - 1].pos_ == "ADJ" and word in _THINGS_TOO
        stands_alone = before in _DETERMINERS - {"'s", "that"} or after_adjective
        return "NOUN" if stands_alone and not next_is_nominal else "ADJ"
    if "ADJ" in possible and _ADJECTIVE_ENDING.search(word) and (next_is_nominal or not after_determiner):
        return "ADJ"
    if "VERB" not in possible:
        return "NOUN"

    if word.endswith("ing"):
        stands_alone = after_determiner and not next_is_nominal
        return "NOUN" if stands_alone or (word in _ING_NOUNS and (not after_noun or next_is_nominal)) else "VERB"
    lemma = _verb_lemma(word)
    inverted = token.i < 2 or doc[token.i - 2].lower_ in _WH or not doc[token.i - 2].is_alpha  # "can dogs sleep"
    if before == "to" or (before in _MODALS and not inverted) or (before in _SUBJECTS and before != "that"):
        return "VERB"
    if first and word in _IMPERATIVES and next_word and (next_word in _FUNCTION_WORDS or next_is_nominal):
        return "VERB"
    if verb_due and after_noun and (lemma in _VERBS or not (next_is_nominal or next_word in _VERBS)):
        return "VERB"
    if before in ("who", "that") and next_word in _FUNCTION_WORDS and lemma in _VERBS:
        return "VERB"
    if lemma in _VERBS and not after_determiner and word not in _KNOWN_NOUNS:
        previous_describes = token.i > 0 and doc[token.i - 1].pos_ == "ADJ"
        return "NOUN" if previous_describes or before in ("of", "for", "in", "on", "at", "by", "with") else "VERB"
    return "NOUN"


def _is_compound(token: Token) -> bool:
    return len(token.text) > 1 and token.text[0].isalpha() and all(c.isalnum() or c in "-'’&." for c in token.text)


def _possible(word: str) -> frozenset[str]:
    """The parts of speech that ``word`` can have; empty for a word that is not in the tables."""
    from lemminflect import getAllLemmas

    if word in _KNOWN_NOUNS:
        return frozenset({"NOUN"})
    return frozenset(getAllLemmas(word)) - {"AUX"}


def _verb_lemma(word: str) -> str:
    from lemminflect import getAllLemmas

    lemmas: tuple[str, ...] = getAllLemmas(word, upos="VERB").get("VERB", (word,))
    return lemmas[0]


def _may_be_noun(word: str) -> bool:
    if not word or not word[0].isalpha() or word in _FUNCTION_WORDS or word in _VERBS:
        return False
    possible = _possible(word)
    return not possible or "NOUN" in possible or word in _ADJECTIVES


def _is_english(doc: Doc) -> bool:
    """Latin script, mostly known words and, from four words on, a word that only English has."""
    letters = [c for c in doc.text if c.isalpha()]
    if sum(c < "\u0250" for c in letters) * 2 < len(letters):
        return False
    words = [t.lower_ for t in doc if t.is_alpha and not t.is_upper]
    known = sum(word in _FUNCTION_WORDS or bool(_possible(word)) for word in words)
    return known * 2 >= len(words) and (len(words) < 4 or any(word in _STRICTLY_ENGLISH for word in words))
