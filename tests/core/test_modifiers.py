"""Adjectives, numbers and quotes beside the nouns, and the fields that instructions about documents ask for."""

import pytest

from tests.support.nouns import extract_nouns
from vllm_vtprune.chunks import pointing_words
from vllm_vtprune.fields import quote_keys, tag_fields
from vllm_vtprune.policy import LLAVA, PolicyError, PruningPolicy, TextOptions
from vllm_vtprune.text import MAX_CHARS, clean_instruction, read_prompt
from vllm_vtprune_evaluation.scenes.layout import COLOURS, make_scene
from vllm_vtprune_evaluation.scenes.questions import KINDS, ask

# prompt -> its nouns, and what describes them; the first are of the nine kinds of question about scenes
DESCRIBED = {
    "Is there a handwritten 7?": "handwritten 7",
    "How many red shapes are there?": "red shapes",
    "What color is the shape with a blue dot?": "color shape blue dot",
    "Which shape is red?": "shape red",
    "Where is the orange square?": "orange square",
    "Is the red circle left of the blue square?": "red circle blue square",
    "Which green word is there?": "green word",
    "What color is the dot on the red circle?": "color dot red circle",
    "Which red digit is handwritten?": "red digit handwritten",
    "Is there a handwritten 7 but no yellow cross?": "handwritten 7 yellow cross",
    # numbers and ranks
    "Are there two dogs and 3 cats?": "two dogs 3 cats",
    "Read the third word.": "third word",
    "What is the 3rd item?": "3rd item",
    "What is the number 42 bus doing at gate 12?": "number 42 bus gate 12",
    "What is next to the second red car?": "second red car",
    "What is the price of 2 large coffees?": "price 2 large coffees",
    "Is the third square blue?": "third square blue",
    # predicates
    "Is the cat black or white?": "cat black white",
    "Are the traffic lights green?": "traffic lights green",
    "Does the stop sign look old?": "stop sign old",
    "Is the dog that lies on the wooden floor asleep?": "dog wooden floor asleep",
    "How many dogs are larger than the three small cats?": "dogs larger three small cats",
    # chunks
    "What does the small white sign say?": "small white sign",
    "Is there a bird with a long, thin, red beak?": "bird long thin red beak",
    "Is the parked car near the striped awning?": "parked car striped awning",
    "Is someone wearing dotted socks?": "socks dotted",
    "Describe the black-and-white photo.": "black white photo",
    'Does "Main St" stand on the green sign?': "Main-St green sign",
    "What color is the left mitten?": "color left mitten",
    # neither determiners nor quantifiers, pronouns and adverbs
    "Are there many other people?": "people",
    "Did the man see any of these few dogs?": "man dogs",
    "Which one is larger, the red one or the blue one?": "larger red blue",
    "One of them is tall.": "tall",
    "How tall is the man currently standing?": "man",
    "Is it to the left of the apple?": "left apple",
    "1. What is it?\n2. Is it red?": "red",
}


@pytest.mark.parametrize(("prompt", "words"), DESCRIBED.items())
def test_words_that_describe_come_with_the_nouns(prompt: str, words: str) -> None:
    terms = extract_nouns(prompt, modifiers=True)
    wanted = [word.replace("-", " ") for word in words.split()]
    assert sorted(terms) == sorted(wanted)
    assert terms == sorted(terms, key=prompt.index), "in the order of the prompt"
    nouns = extract_nouns(prompt, modifiers=False)
    assert nouns == [word for word in terms if word in nouns], "every noun stays"


def test_each_word_comes_once() -> None:
    assert extract_nouns("Is the Red dog left of the red cat and 2 dogs or 2 cats?", modifiers=True) == [
        "Red", "dog", "cat", "2", "dogs", "cats",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_sets_things_apart_in_scenes_is_read(kind: str) -> None:
    questions = [question.text for seed in range(40) for question in ask(make_scene("test", seed), kinds=[kind])]
    assert questions
    for question in questions:
        terms = extract_nouns(question, modifiers=True)
        telling = [word for word in question.rstrip("?").split() if word in {*COLOURS, "handwritten"} or word.isdigit()]
        assert set(telling) <= set(terms), question
        assert not {"is", "there", "a", "an", "the", "how", "many", "no"} & {word.lower() for word in terms}, question


def words_of(tagged: str) -> list[tuple[str, str]]:
    """Words with their tags."""
    return [(word, tag) for word, _, tag in (pair.rpartition("/") for pair in tagged.split())]


@pytest.mark.parametrize(
    ("tagged", "nouns", "described"),
    [
        (  # by Universal Dependencies, as spaCy's model tags
            "Is/AUX the/DET small/ADJ ,/PUNCT red/ADJ car/NOUN next/ADV to/ADP two/NUM very/ADV old/ADJ buses/NOUN",
            "car buses",
            "small red car two old buses",
        ),
        ("Which/DET shape/NOUN is/AUX red/ADJ ?/PUNCT", "shape", "shape red"),
        ("Which/PRON one/NOUN of/ADP the/DET many/ADJ other/ADJ dogs/NOUN ?/PUNCT", "one dogs", "one dogs"),
        ("How/ADV tall/ADJ is/AUX one/NUM ?/PUNCT", "", ""),
        ("How/ADV tall/ADJ is/AUX one/NUM red/ADJ dog/NOUN ?/PUNCT", "dog", "one red dog"),
        ("It/PRON 's/AUX full/ADJ ./PUNCT Something/PRON blue/ADJ moved/VERB ./PUNCT", "", "full"),
        ("the/DET parked/VERB car/NOUN of/ADP men/NOUN holding/VERB bags/NOUN", "car men bags", "parked car men bags"),
        ("with/ADP broken/VERB glass/NOUN", "glass", "broken glass"),
        # as the embedded tagger does
        ("Is/X the/X red/ADJ circle/NOUN left/ADJ of/X 7/NUM ?/X", "circle", "red circle 7"),
    ],
)  # fmt: skip
def test_the_rule_needs_words_and_tags_alone(tagged: str, nouns: str, described: str) -> None:
    words = words_of(tagged)
    assert [words[place][0] for place in pointing_words(words, modifiers=False)] == nouns.split()
    assert [words[place][0] for place in pointing_words(words, modifiers=True)] == described.split()


def test_where_every_word_counts_modifiers_change_nothing() -> None:
    prompt = "Is the small dog's bowl red?"
    assert extract_nouns(prompt, clean=False, modifiers=True) == extract_nouns(prompt, clean=False)
    assert read_prompt(prompt, clean=False, modifiers=True) == read_prompt(prompt, clean=False)


def test_an_adjective_alone_is_read() -> None:
    assert read_prompt("Is it red?", modifiers=True) == (("red",), None)
    assert read_prompt("Is it red?", modifiers=False) == ((), "no_nouns")


SCHEMA = (
    '{"type": "object", "properties": {"vendor": {"type": "string", "description": "who sells"}, "lineItems": '
    '{"type": "array", "items": {"properties": {"price": {"type": "number"}}}}}, "required": ["vendor"]}'
)
# instruction -> its nouns; "+word" for what describes them
INSTRUCTIONS = {
    "Extract invoice_number, date, total as JSON": "invoice_number date total",
    "Extract the following fields: invoice number, due date and total amount. Return JSON only.": (
        "invoice number due date +total amount"
    ),
    "Return the name, date of birth and address as a JSON object": "name date birth address",
    "Please extract vendor_name, line_items and tax from this receipt in JSON format": (
        "vendor_name line_items tax receipt"
    ),
    "Give me the total and the currency.": "total currency",
    "Extract the table": "table",
    "Return the bounding box of the dog as [x1, y1, x2, y2]": "dog",
    "Detect the dog and return its box in the format (x_min, y_min, x_max, y_max).": "dog box",
    'Extract as JSON: {"invoice_number": "", "total": ""}': "invoice_number total",
    "Fill in this template: {name: string, 'issue date': null, \"items\": [{\"price\": 0}]}": (
        "name issue-date items price"
    ),
    f"Respond with JSON that follows this schema: {SCHEMA}": "vendor lineItems price",
    "Return a JSON object with the keys name, date and total.": "name date total",
    "Respond with a JSON object containing the keys vendor and total.": "vendor total",
    "Answer in JSON with vendor, date and total.": "vendor date total",
    "Extract:\n1. name\n2. total\n3. Date of issue": "name total Date issue",
    "Extract these fields:\norder details\nestimate\nlabel names": "order details estimate label names",
    "Extract these fields:\ninvoice number\ndate\ntotal\nReturn only valid JSON, no explanation.": (
        "invoice number date total"
    ),
    "You see a form.\nExtract invoiceNumber, dueDate and issue_date.": "form invoiceNumber dueDate issue_date",
    "Can you extract the billing address and the VAT number?": "billing address VAT number",
    "Extract the text and return it as JSON.": "text",
    "Output name, date, total, tax.": "name date total tax",
    "Extract first name, sex and passport number from the passport.": "+first name sex passport number",
    "Extract `total` and `due_date`.": "total due_date",
    "From this receipt, extract the total.": "receipt total",
    "Provide the output in JSON with the following keys: merchant, total_amount.": "merchant total_amount",
    "Return the two dates in YYYY-MM-DD format.": "+two dates",
    "Extract red, green and blue circles.": "+red +green +blue circles",
    "Read this receipt and extract merchant, date, total.": "receipt merchant date total",
    "Fill in the fields: name, list price, phone.": "name list price phone",
    "List the dogs in JSON.": "dogs",
    "Read the total amount from the receipt.": "+total amount receipt",
}  # fmt: skip


@pytest.mark.parametrize(("prompt", "words"), INSTRUCTIONS.items())
def test_instructions_give_their_fields(prompt: str, words: str) -> None:
    wanted = [word.replace("-", " ") for word in words.split()]
    assert extract_nouns(prompt, modifiers=False) == [word for word in wanted if word[0] != "+"]
    assert extract_nouns(prompt, modifiers=True) == [word.removeprefix("+") for word in wanted]


@pytest.mark.parametrize(
    ("prompt", "nouns"),
    [
        ("What format is the JSON file on the screen in?", ["format", "JSON", "file", "screen"]),
        ("Which fields lie behind the farm?", ["fields", "farm"]),
        ("Find the man with the keys.", ["man", "keys"]),
        ("What is the list price and the return date?", ["list", "price", "return", "date"]),
        ("Extract price, list price and return date.", ["price", "list", "return", "date"]),
        ("Return address?", ["Return", "address"]),
        ("List the fields of the form.\nWhat is the return date?", ["form", "return", "date"]),
        ("Is the brace { or } on the page?", ["brace", "page"]),
    ],
)
def test_words_of_instructions_are_nouns_elsewhere(prompt: str, nouns: list[str]) -> None:
    assert extract_nouns(prompt, modifiers=False) == nouns


@pytest.mark.parametrize(
    ("prompt", "quoted"),
    [
        ('{"a": "b: {c: 1}", "d": [{"e": 1}], \'f\': 2, gh: 3}', '"a", "d", "e", "f", "gh"'),
        ('A {"a": 1} and {"b": 2}.', 'A "a" and "b".'),
        ('{"properties": {"type": {"type": "string"}}, "required": []}', '"type"'),
        ("{unclosed: 1", "{unclosed: 1"),
        ('{"no", "keys"} and {0: 1}', '{"no", "keys"} and {0: 1}'),
        ("} then: {", "} then: {"),
        ("Choose one: {A: cat, B: dog}", "Choose one: {A: cat, B: dog}"),
        ('[{"bbox_2d": [0, 0, 9, 9], "label": "x", "plate": ""}]', '["plate"]'),
        ('{"point": [x, y], "label": ""}.', "."),
        ('{"x": 0, "y": 0, "width": 0, "height": 0}', ""),
        ('{"name": "", "location": "", "width": 0, "points": 0}', '"name", "location", "width", "points"'),
        ("", ""),
    ],
)
def test_a_template_gives_its_keys(prompt: str, quoted: str) -> None:
    assert quote_keys(prompt) == quoted


def test_names_in_a_list_are_nouns_whatever_their_tag() -> None:
    silent = "/X"  # a word with empty text
    listed = f"{silent} total/ADJ ,/PUNCT name/VERB and/CCONJ net/ADJ {silent}"
    tagged = f"{listed} red/ADJ ,/PUNCT due/ADJ amount/NOUN clearly/ADV shown/VERB"
    named = [word for word, tag in tag_fields(words_of(tagged)) if tag == "NOUN"]
    assert named == ["total", "name", "net", "amount"]


def test_what_follows_json_in_an_answer_format_is_kept() -> None:
    assert clean_instruction("Answer in JSON.") == ""
    assert clean_instruction("Return only JSON.") == ""
    assert clean_instruction("Reply in JSON with name and date.") == "with name and date."


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "unit", ['{"a":', "extract the, ", "extract the:\n", "[x1, ", "as json with the ", "red, ", "a_", "please, ", "1. "]
)
def test_hostile_instructions_take_bounded_time(unit: str) -> None:
    extract_nouns(unit * MAX_CHARS, modifiers=True)


@pytest.mark.parametrize("value", [True, False])
def test_the_policy_takes_modifiers(value: bool) -> None:
    policy = PruningPolicy.parse({"text": {"modifiers": value}})
    assert policy.text == TextOptions(modifiers=value)
    assert PruningPolicy.parse(policy.dump()) == policy
    plain = PruningPolicy.parse({}).resolve(LLAVA).selection_digest()
    assert policy.resolve(LLAVA).selection_digest() == plain, "the words are hashed, not how they were found"


@pytest.mark.parametrize("value", [1, 0, "true", None, []])
def test_modifiers_are_true_or_false(value: object) -> None:
    with pytest.raises(PolicyError, match=r"^pruning\.text\.modifiers: .* expected true or false\.$"):
        PruningPolicy.parse({"text": {"modifiers": value}})
