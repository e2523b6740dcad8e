"""Part-of-speech tagging without a model: lemminflect's tables of possible tags, and rules about neighbouring words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spacy.tokens import Doc, Token


def word_set(words: str) -> frozenset[str]:
    """The words of a string."""
    return frozenset(words.split())


DETERMINERS = word_set(
    "the a an this that these those my your his her its our their 's any some each every no another both"
)
_DO = word_set("do does did")
_MODALS = word_set("can could will would shall should may might must to ca wo")
_BE_HAVE = word_set("is are was were be been being am 's 're 'm has have had having 've")
_SUBJECTS = word_set("i you he she it we they who that")
_WH = word_set("what which who whom whose where when why how what's")
QUANTITIES = word_set(
    "many much more most few several all other same such one two three four five six seven eight nine ten"
)
FUNCTION_WORDS = (
    DETERMINERS | _DO | _MODALS | _BE_HAVE | _SUBJECTS | _WH | QUANTITIES
    | word_set(
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

# words that are nouns in the tables, but adjectives or verbs in questions
COLOURS = word_set(
    "red orange yellow green blue purple pink brown black white gray grey beige tan silver golden violet turquoise"
)
_ADJECTIVES = COLOURS | word_set(
    "young old new small little big large huge tiny tall short long high low wide narrow thick "
    "thin deep fat slim heavy left right upper lower main different similar visible empty full open "
    "closed hot cold warm cool wet dry dark bright clean dirty round square flat sharp smooth rough hard "
    "soft loud quiet happy sad angry real fake good bad better best worse worst nice pretty fresh sweet "
    "raw ripe correct wrong possible likely available total entire whole modern ancient professional male "
    "female live dead free busy safe alive asleep present public private formal casual famous elderly "
    "adult blond blonde bald major minor average normal regular special common favorite favourite "
    "electric domestic wild native natural human medium clear plain curly straight solid broken tasty "
    "current recent final overall able well-known transparent following average fast slow quick"
)
# of these adjectives, those that are also nouns
_THINGS_TOO = word_set("square orange human adult male female professional native")
_VERBS = word_set(
    "say see do go come wear hold eat drink look use play ride stand sit lie run walk fly catch throw hit "
    "kick jump read write show tell indicate mean make take give get put keep find know think want need "
    "seem appear become happen contain cover carry pull push drive travel watch feed reach touch describe "
    "identify list count name explain state provide determine estimate compare locate translate "
    "transcribe believe expect guess suggest depict represent face point belong exist occur work live fit "
    "move stop sell buy cost spell advertise celebrate grow swim sleep smile talk speak call hang lean "
    "face cook cut prepare wait pose perform visit enjoy like love help try start begin end answer"
)
_IMPERATIVES = _VERBS | word_set("answer tell detect point zoom summarize caption focus check verify complete note")
_ING_NOUNS = word_set(
    "building buildings painting paintings clothing ceiling ceilings wedding morning evening railing "
    "railings awning lightning string king ring thing things wing wings swing spring sling sibling "
    "earring earrings writing drawing parking dining swimming living shopping skiing surfing snowboarding "
    "skateboarding bowling fishing boxing wrestling washing vending landing lettering wording siding "
    "stuffing frosting icing topping toppings dressing pudding dumpling flooring lighting seating housing "
    "crossing meeting training racing sewing cutting rating opening ending"
)
_KNOWN_NOUNS = word_set("top bottom front back side end color colour kind type sort way people")
_ADJECTIVE_ENDING = re.compile(r"(?:al|ic|ous|ive|ful|less|able|ible|ern|ary|ish|ian)$")
_NUMBERS = word_set("one two three four five six seven eight nine ten")
_RANKS = word_set("first second third last next")
SENTENCE_END = frozenset(".?!:;\n")


def tag_words(doc: Doc) -> Doc:
    """Set ``pos_`` to NOUN, PROPN, VERB, ADJ, ADV, NUM or X for each token of ``doc``."""
    shouting = sum(t.is_upper for t in doc if t.is_alpha) * 2 > sum(t.is_alpha for t in doc)
    verb_due = False  # after "does the sign ...", "can the dog ...": a bare verb follows
    first = True  # first word of a sentence
    for token in doc:
        if not token.is_alpha and not _is_compound(token):
            token.pos_ = "X"
            if token.text[0] in SENTENCE_END:
                first, verb_due = True, False
            continue
        word = token.lower_
        if word in FUNCTION_WORDS or len(word) == 1:
            token.pos_ = "X"
            verb_due = (verb_due or word in _DO | _MODALS - {"to"}) and word not in _BE_HAVE - {"'s"}
        else:
            token.pos_ = _part_of_speech(token, verb_due, first, proper=not (shouting or first))
            verb_due = verb_due and token.pos_ != "VERB"
        first = False
    _tag_modifiers(doc)
    return doc


def _tag_modifiers(doc: Doc) -> None:
    """Tag numbers and ranks, which are X so far, and adverbs among the adjectives. Does not change nouns."""
    next_in_chunk = False
    for token in reversed(doc):
        word = token.lower_
        if token.pos_ == "X" and (word[0].isdigit() or word in _NUMBERS):
            token.pos_ = "NUM"
        elif token.pos_ == "X" and word in _RANKS and next_in_chunk:  # "next to" is none
            token.pos_ = "ADJ"
        elif token.pos_ == "ADJ" and word not in _ADJECTIVES and "ADJ" not in readings(word):
            token.pos_ = "ADV"
        next_in_chunk = token.pos_ in ("ADJ", "NUM", "NOUN", "PROPN")


def _part_of_speech(token: Token, verb_due: bool, first: bool, proper: bool) -> str:
    word, doc = token.lower_, token.doc
    before = doc[token.i - 1].lower_ if token.i else ""
    after_noun = token.i > 0 and doc[token.i - 1].pos_ in ("NOUN", "PROPN")
    after_adjective = token.i > 0 and doc[token.i - 1].pos_ == "ADJ"
    after_determiner = before in DETERMINERS | QUANTITIES | {"what", "which", "whose"}
    next_word = doc[token.i + 1].lower_ if token.i + 1 < len(doc) else ""
    beside = next_word in ("left", "right") and [t.lower_ for t in doc[token.i + 2 : token.i + 3]] == ["of"]
    next_is_nominal = _may_be_noun(next_word) and not beside

    if proper and (token.is_title or token.is_upper):
        return "PROPN"
    possible = readings(word) | ({"NOUN"} if word in _ING_NOUNS else set())
    if not possible or possible == {"NOUN"}:
        return "ADJ" if word in _ADJECTIVES else "ADV" if word.endswith("ly") and not possible else "NOUN"
    if word.endswith("s") and before in DETERMINERS | QUANTITIES and possible == {"VERB"}:
        return "NOUN"  # "the two bars": the tables lack some plurals
    if "NOUN" not in possible and word not in _ADJECTIVES:
        return "VERB" if "VERB" in possible else "ADJ"

    if word in _ADJECTIVES:
        stands_alone = before in DETERMINERS - {"'s", "that"} or (after_adjective and word in _THINGS_TOO)
        return "NOUN" if stands_alone and not next_is_nominal else "ADJ"
    described = after_determiner or after_adjective
    if "ADJ" in possible and _ADJECTIVE_ENDING.search(word) and (next_is_nominal or not described):
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
    if first and word in _IMPERATIVES and next_word and (next_word in FUNCTION_WORDS or next_is_nominal):
        return "VERB"
    if verb_due and after_noun and (lemma in _VERBS or not (next_is_nominal or next_word in _VERBS)):
        return "VERB"
    if before in ("who", "that") and next_word in FUNCTION_WORDS and lemma in _VERBS:
        return "VERB"
    if lemma in _VERBS and not after_determiner and word not in _KNOWN_NOUNS:
        return "NOUN" if after_adjective or before in ("of", "for", "in", "on", "at", "by", "with") else "VERB"
    return "NOUN"


def _is_compound(token: Token) -> bool:
    return len(token.text) > 1 and token.text[0].isalpha() and all(c.isalnum() or c in "-'’&." for c in token.text)


def readings(word: str) -> frozenset[str]:
    """The possible parts of speech of ``word``; empty for an unknown word."""
    from lemminflect import getAllLemmas

    if word in _KNOWN_NOUNS:
        return frozenset({"NOUN"})
    return frozenset(getAllLemmas(word)) - {"AUX"}


def _verb_lemma(word: str) -> str:
    from lemminflect import getAllLemmas

    lemmas: tuple[str, ...] = getAllLemmas(word, upos="VERB").get("VERB", (word,))
    return lemmas[0]


def _may_be_noun(word: str) -> bool:
    if not word or not word[0].isalpha() or word in FUNCTION_WORDS or word in _VERBS:
        return False
    possible = readings(word)
    return not possible or "NOUN" in possible or word in _ADJECTIVES
