"""Nouns of a prompt: hand-labelled questions and instructions, answer formats, code, quotes, other languages."""

import inspect
import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.nouns import extract_nouns
from vllm_vtprune.policy import TextOptions
from vllm_vtprune.text import (
    MAX_CHARS,
    MAX_PIECES,
    _pipeline,
    _read,
    clean_instruction,
    read_prompt,
    text_pipeline_name,
)

# question -> its nouns and proper nouns, labelled by hand. Rules were changed after looking at the errors on SEEN.
# UNSEEN and HARDER were labelled after the rules; on first measurement they gave 1.000 and 0.965, and two general rules
# (a subject after an inverted modal, "to" before a noun phrase) were mended since.
SEEN = {
    "What color is the bus?": "color bus",
    "What does the sign say?": "sign",
    "Is the man watching the watch?": "man watch",
    "How many people are in the picture?": "people picture",
    "Is there a snowboard in the image?": "snowboard image",
    "What is the woman in the red dress holding?": "woman dress",
    "Does the bus driver wear a hat?": "bus driver hat",
    "Which side of the photo is the dog on?": "side photo dog",
    "What animal is sitting on the couch?": "animal couch",
    "Are the traffic lights green?": "traffic lights",
    "What is the brand of this camera?": "brand camera",
    "Who is standing next to the parking meter?": "parking meter",
    "What time does the clock show?": "time clock",
    "Is the cat black or white?": "cat",
    "Can you see any orange umbrellas on the beach?": "umbrellas beach",
    "Describe the building behind the tree.": "building tree",
    "What kind of food is on the plate?": "kind food plate",
    "Is it raining?": "",
    "What is the number on the player's jersey?": "number player jersey",
    "What are the children playing with?": "children",
    "Is the orange to the left of the apple?": "orange left apple",
    "What material is the table made of?": "material table",
    "Does the stop sign look old?": "stop sign",
    "Which country does this flag belong to?": "country flag",
    "Is there a fork near the knife and the spoon?": "fork knife spoon",
    "What sport is being played?": "sport",
    "How many slices of pizza are left?": "slices pizza",
    "What is written on the side of the truck?": "side truck",
    "Is the person in front of the Eiffel Tower smiling?": "person front Eiffel Tower",
    "Where is the tall man's phone?": "man phone",
    "Count the red apples in the bowl.": "apples bowl",
    "Why is the little girl crying?": "girl",
}
UNSEEN = {
    "What type of vehicle is parked beside the curb?": "type vehicle curb",
    "Do the shoes match the belt?": "shoes belt",
    "Is the giraffe eating leaves from the tree?": "giraffe leaves tree",
    "What year was this coin minted?": "year coin",
    "How many windows does the house have?": "windows house",
    "Are there any clouds in the blue sky?": "clouds sky",
    "What is on top of the refrigerator?": "top refrigerator",
    "Which man is wearing glasses?": "man glasses",
    "What word is printed on the yellow taxi?": "word taxi",
    "Is the skateboarder doing a trick?": "skateboarder trick",
    "Does the woman hold a tennis racket in her right hand?": "woman tennis racket hand",
    "What is the name of the store on the corner?": "name store corner",
    "Is the kitchen counter clean?": "kitchen counter",
    "How tall is the tower behind the church?": "tower church",
    "What is the license plate number of the silver car?": "license plate number car",
    "Are these zebras drinking water?": "zebras water",
    "What fruit is in the glass bowl?": "fruit glass bowl",
    "Is the train moving or stopped at the station?": "train station",
    "Which bird has a longer beak?": "bird beak",
    "Where was the photograph taken?": "photograph",
    "What is the price of the coffee on the menu?": "price coffee menu",
    "Is the teddy bear on the bed or on the chair?": "teddy bear bed chair",
    "What does the boy want to catch?": "boy",
    "Which company made this laptop?": "company laptop",
    "Can the horse jump over the fence?": "horse fence",
    "Is there a wooden bench under the lamp post?": "bench lamp post",
    "What pattern is on the curtain in the living room?": "pattern curtain living room",
    "How many surfers ride the wave?": "surfers wave",
    "What is the weather like in this scene?": "weather scene",
    "Is this photo from Times Square in New York?": "photo Times Square New York",
    "What did the baker put on the cake?": "baker cake",
    "Tell me the score of the game shown on the screen.": "score game screen",
    "What is the relationship between the two people in the foreground?": "relationship people foreground",
}

HARDER = {
    "On which side of the picture is the small lamp?": "side picture lamp",
    "Is there either a baseball or a glove in this image?": "baseball glove image",
    "What is the item of furniture to the right of the mirror on the wall?": "item furniture right mirror wall",
    "Which kind of device is not off?": "kind device",
    "Do you see a chair to the left of the man that holds the remote control?": "chair left man remote control",
    "Is the color of the fire hydrant different than the color of the pole?": "color fire hydrant color pole",
    "Who wears a helmet?": "helmet",
    "What's the man wearing on his head?": "man head",
    "What appliance is the same height as the stove?": "appliance height stove",
    "Does the light fixture look modern?": "light fixture",
    "Are there both forks and bread rolls in the photograph?": "forks bread rolls photograph",
    "Is it sunny or overcast outside?": "",
    "How much does the large popcorn cost?": "popcorn",
    "Who is the author of the book on top?": "author book top",
    "What does the label on the bottle say the alcohol content is?": "label bottle alcohol content",
    "Which airline operates the plane at gate 12?": "airline plane gate",
    "what is the last digit on the bus?": "digit bus",
    "Is this movie directed by Christopher Nolan?": "movie Christopher Nolan",
    "Will green grass be found where the cows graze?": "grass cows",
    "Should I multiply the numbers in the equation on the blackboard?": "numbers equation blackboard",
    "Based on the chart, which country had the highest growth rate in 2010?": "chart country growth rate",
    "Please read the text in the top left corner of the page.": "text corner page",
    "Find the person who plays the guitar and tell me his shirt color.": "person guitar shirt color",
    "Why do people use the thing hanging from the ceiling?": "people thing ceiling",
    "If the cyclist turns right, what street will he enter?": "cyclist street",
    "Can dogs and cats sleep on that sofa bed?": "dogs cats sofa bed",
    "Are the skis leaning against the ski rack?": "skis ski rack",
    "Would this outfit suit a job interview?": "outfit job interview",
    "List every vegetable you can spot in the salad.": "vegetable salad",
    "Is anyone watching TV?": "TV",
}

# below what the embedded pipeline measures, which the test prints
FLOORS = {"seen": 0.97, "unseen": 0.97, "harder": 0.94}


def f1(questions: Mapping[str, Sequence[str]]) -> tuple[float, list[str]]:
    """The score, in which case does not matter, and what was missed."""
    hits = both = 0
    misses = []
    for question, labels in questions.items():
        nouns = {noun.casefold() for noun in extract_nouns(question, modifiers=False)}
        wanted = {label.casefold() for label in labels}
        hits, both = hits + len(nouns & wanted), both + len(nouns) + len(wanted)
        if nouns != wanted:
            misses.append(f"{question} extra {sorted(nouns - wanted)} missing {sorted(wanted - nouns)}")
    return 2 * hits / both, misses


@pytest.mark.parametrize("name", list(FLOORS))
def test_f1_on_hand_labelled_questions(name: str) -> None:
    questions = {"seen": SEEN, "unseen": UNSEEN, "harder": HARDER}[name]
    score, misses = f1({question: words.split() for question, words in questions.items()})
    print(f"\n{text_pipeline_name()} on {name} questions: F1 {score:.3f}", *misses, sep="\n  ")
    assert score >= FLOORS[name], misses


def test_f1_on_questions_labelled_by_someone_who_has_not_seen_the_rules() -> None:
    """Committed before they were first scored, on 2026-11-20: F1 0.930, by the embedded pipeline.

    A rule was changed since, on 2026-11-25, after looking at questions about scenes: "square" and the like name a thing
    after an adjective too. None of the 130 is read differently, so the score is the same; but it is no longer one on
    unseen data.
    """
    questions = json.loads((Path(__file__).parent / "data" / "heldout_nouns.json").read_text())["questions"]
    assert len(questions) == 130
    score, _ = f1({question["prompt"]: question["nouns"] for question in questions})
    print(f"\n{text_pipeline_name()} on held-out questions: F1 {score:.3f}")
    assert score >= 0.93


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("What is the man doing?\nAnswer the question using a single word or phrase.", "What is the man doing?"),
        ("Is there a dog in the image? Please answer yes or no.", "Is there a dog in the image?"),
        (
            "What is it?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly.",
            "What is it?\ncat\ndog",
        ),
        (
            "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
            "Answer the question using a single word or phrase.",
            "What is this?",
        ),
        ("Provide a one-sentence caption for the provided image.", ""),
        ("Provide a one-sentence caption for the provided image.\nReference OCR token: STOP, Main", "STOP, Main"),
        (
            "Hint: N/A\nQuestion: Which animal is bigger?\nThere are several options:\nA. cat\nB. dog\n"
            "Please select the correct answer from the options above.",
            "Which animal is bigger?\ncat\ndog",
        ),
        ("Context: The plane flies.\nWhat is it?", "The plane flies.\nWhat is it?"),
        ("USER: <image>\nWhat color is the bus? ASSISTANT:", "What color is the bus?"),
        ("Question: what is the dog doing? Short answer:", "what is the dog doing?"),
        ("Describe this image concisely.", ""),
        ("In one word, what is the dog doing?", "what is the dog doing?"),
        ("Answer the following question with a single word: what is it?", "what is it?"),
        ("What is it? Let's think step by step.", "What is it?"),
        ("Give a short answer. What is the bird?", "What is the bird?"),
    ],
)
def test_answer_format_instructions_are_dropped(prompt: str, cleaned: str) -> None:
    assert clean_instruction(prompt) == cleaned


@pytest.mark.parametrize(
    "question",
    [
        "Answer the question based on the sign.",
        "Describe the dog in the image.",
        "Who will answer with a smile?",
        "Who answers the phone on the desk?",
        "Is this a letter?",
        "Answer with the name of the street.",
    ],
)
def test_questions_about_the_image_stay(question: str) -> None:
    assert clean_instruction(question) == question


@pytest.mark.parametrize(
    ("prompt", "nouns"),
    [
        ('What does "Stop Sign" mean on the board?', ["Stop Sign", "board"]),
        ("Where is the 'Exit' sign in the dog's owner's house?", ["Exit", "sign", "dog", "owner", "house"]),
        ("Is “Main St” on the sign?", ["Main St", "sign"]),
        ("Is the Dog next to the dog?", ["Dog"]),
        ("Is the dog older than the other dog, and is the cat?", ["dog", "cat"]),
        ("WHAT COLOR IS THE BUS?", ["COLOR", "BUS"]),
        ("dog frisbee", ["dog", "frisbee"]),
        ("Answer yes or no.", []),
        ("What is this?", []),
        ('""', []),
        ("  ", []),
        ("", []),
    ],
)
def test_nouns_in_order_once_and_as_written(prompt: str, nouns: list[str]) -> None:
    assert extract_nouns(prompt, modifiers=False) == nouns


# prompt -> the words that count beside nouns' modifiers, tagged by hand: neither verbs of instructions nor formats do
INSTRUCTIONS = {
    "Extract the table": "table",
    "Extract all tables from this page.": "tables page",
    "Extract text": "text",
    "Return the bounding box coordinates of the dog as [x1, y1, x2, y2].": "dog",
    "Output bounding boxes of dogs.": "dogs",
    "Locate the dog, output its bbox coordinates using JSON format.": "dog",
    'Detect all objects and output JSON [{"bbox_2d": [x1, y1, x2, y2], "label": "..."}]': "objects",
    'Detect the cup. Answer as {"bbox": [x_min, y_min, x_max, y_max]}.': "cup",
    "Please provide the bounding box coordinate of the region this sentence describes: the man.": "region sentence man",
    "Describe the painting.": "painting",
    "Describe": "",
    "List objects on the desk.": "objects desk",
    "List ingredients": "ingredients",
    "Read the license plate.": "license plate",
    "Locate dogs and cats": "dogs cats",
    "Find all differences between the pictures.": "differences pictures",
    "Count apples": "apples",
    "Count people in the queue": "people queue",
    "Identify the bird species.": "bird species",
    "Transcribe the handwriting.": "handwriting",
    "Transcribe notes": "notes",
    "Summarize the chart.": "chart",
    "Give me the total of the bill.": "total bill",
    "Tell me the time on the clock.": "time clock",
    "Point to the traffic light.": "traffic light",
    "Detect faces.": "faces",
    "Segment all leaves": "leaves",
    "Highlight defects on the board.": "defects board",
    "Compare the bars.": "bars",
    "OCR this page.": "page",
    "Caption the cartoon": "cartoon",
    "Choose the right animal.": "animal",
    "Explain why the man smiles.": "man",
    "Look at the picture and name the city.": "picture city",
    "First, read the title. Then list the authors.": "title authors",
    "Rank buildings by height.": "buildings height",
    "Order the steps in the diagram.": "steps diagram",
    "Mark the dent.": "dent",
    "Zoom in on the logo.": "logo",
    "Label all parts of the flower.": "parts flower",
    # they are things elsewhere
    "What is the label on the box?": "label box",
    "Is the count on the display right?": "count display",
    "What is the point of the pencil?": "point pencil",
    # who speaks, and code
    "USER: <image>\nDescribe the car.\nASSISTANT:": "car",
    "user: what is the dog doing?\nassistant:": "dog",
    "Human: Where is the ball?\nAI:": "ball",
    "Question: What does the sign say?\nAnswer:": "sign",
    "System: You are a helpful assistant.\nUser: What brand is the shoe?": "brand shoe",
    "### Instruction:\nCount the boats.\n### Response:": "boats",
    "[INST] What color is the boat? [/INST]": "color boat",
    "<|im_start|>user\nWhere is the boat?<|im_end|>\n<|im_start|>assistant\n": "boat",
    'Fill this in:\n```json\n{"title": "...", "author": "..."}\n```': "title author",
    "What does the code do?\n```python\nfile = read('name')\n```": "code",
    "```json\nWhere is the dog?": "dog",
    "```\nWhere is the dog?\n```": "dog",
}


@pytest.mark.parametrize(("prompt", "words"), INSTRUCTIONS.items())
def test_what_an_instruction_is_about(prompt: str, words: str) -> None:
    assert read_prompt(prompt, modifiers=False) == (tuple(words.split()), None if words else "no_nouns")


@pytest.mark.parametrize(
    ("prompt", "nouns"),
    [
        ("iPhone", "iPhone"),
        ("teh dgo", "teh dgo"),
        ("Pikachu", "Pikachu"),
        ("café menu", "café menu"),
        ("dog cat frisbee ball", "dog cat frisbee ball"),
        ("price quantity customer address", "price quantity customer address"),
        ("Does the Schwarzenegger poster hang?", "Schwarzenegger poster"),
    ],
)
def test_unknown_words_and_bare_lists_are_english(prompt: str, nouns: str) -> None:
    assert read_prompt(prompt, modifiers=False) == (tuple(nouns.split()), None)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("¿De qué color es el autobús?", "De qué color es el autobús"),
        ("Welche Farbe hat der Bus? Welche?", "Welche Farbe hat der Bus"),
        ("Wat is de kleur van de bus?", "Wat is de kleur van bus"),
        ("Qu'est-ce que l'homme tient à la main ?", "Qu'est-ce que l'homme tient à la main"),
        ("图片里有什么？红色的圆形在哪里", "图片里有什么 红色的圆形在哪里"),
        ("Какого цвета автобус?", "Какого цвета автобус"),
        ("この写真には何がありますか?", "この写真には何がありますか"),
        ("ما هو لون الحافلة؟", "ما هو لون الحافلة"),
        ("चित्र में कितने लोग हैं?", "चित्र में कितने लोग हैं"),
        ("USER: Wo steht der große Hund?\nASSISTANT:", "Wo steht der große Hund"),
        ("Wo steht der Hund? Answer the question using a single word.", "Wo steht der Hund"),
    ],
)
@pytest.mark.parametrize("modifiers", [True, False])
def test_of_other_languages_every_word_counts(prompt: str, words: str, modifiers: bool) -> None:
    assert read_prompt(prompt, modifiers=modifiers) == (tuple(words.split()), "not_english_all_words")


def test_by_itself_it_reads_as_the_policy_does_by_default() -> None:
    defaults = TextOptions()
    parameters = inspect.signature(read_prompt).parameters
    assert (parameters["clean"].default, parameters["modifiers"].default) == (defaults.clean, defaults.modifiers)
    assert extract_nouns("Where is the red dog?") == ["red", "dog"]


@pytest.mark.parametrize("clean", [True, False])
def test_half_a_surrogate_pair_is_a_mark(clean: bool) -> None:
    assert extract_nouns("\ud83d cat\udc00 \ud800", clean) == ["cat"]
    assert read_prompt("\ud800", clean) == ((), "no_nouns")


@pytest.mark.parametrize("prompt", ["", "?!", "What is it?", "Is it large or small?"])
def test_no_nouns_are_told_from_another_language(prompt: str) -> None:
    assert read_prompt(prompt, modifiers=False) == ((), "no_nouns")


def test_nouns_need_no_reason() -> None:
    assert read_prompt("Where is the dog?") == (("dog",), None)
    assert read_prompt("Wo ist der Hund?", clean=False) == (("Wo", "ist", "der", "Hund"), None)
    assert read_prompt("", clean=False) == ((), "no_nouns")


def test_without_clean_up_every_word_counts() -> None:
    assert extract_nouns("Is the dog's bowl red? Answer yes or no.", clean=False) == [
        "Is", "the", "dog's", "bowl", "red", "Answer", "yes", "or", "no",
    ]  # fmt: skip


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("between", ["a bird, ", "？", "horses\n"])
def test_of_a_long_prompt_the_beginning_and_the_end_are_read(between: str, clean: bool) -> None:
    """What stands in the middle may be the context of a question, which mostly ends a message."""
    middle = between * MAX_PIECES
    for distance in (middle, between * MAX_CHARS):
        nouns = extract_nouns(f"The dog. {distance}. A cow. {distance} Where is the cat?", clean)
        assert {"dog", "cat"} <= set(nouns)
        assert "cow" not in nouns
    words = " ".join(f"word{number}" for number in range(MAX_CHARS))
    assert 100 < len(extract_nouns(words, clean)) <= MAX_PIECES


HOSTILE = [
    " ", "(", '"', "'", "'a", "\n ", "a\n", "?", "x,", "a/b", "中", "😀", "\ud800", "dog ", "red, ", "qz wk ", "1. ",
    '"\\', "```", '"a" ', "```json\n{", "(A) ", "USER: ", "Answer: ", "answer the question, ", "a a a caption ",
    "<|", "count ", "select the correct, ", "please, ", "detect all ", "bounding ", "you are a ", "x_min, ",
]  # fmt: skip


def in_time(prompt: str, seconds: float) -> bool:
    """Whether one of three attempts at reading takes less processor time."""
    for _ in range(3):
        _read.cache_clear()
        began = time.thread_time()
        read_prompt(prompt)
        if time.thread_time() - began < seconds:
            return True
    return False


@pytest.mark.parametrize(("length", "seconds"), [(8_000, 0.1), (100_000, 0.2)])
@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_prompts_take_bounded_time(unit: str, length: int, seconds: float) -> None:
    extract_nouns("What is it?")  # loads the pipeline
    assert in_time((unit * length)[:length], seconds if text_pipeline_name() == "embedded" else 2 * seconds)


def test_words_that_were_read_are_not_kept_for_ever() -> None:
    extract_nouns("What is it?")
    before = len(_pipeline().vocab.strings)
    for number in range(20):
        extract_nouns(f"Where is the thing{number} and the other{number}?")
    assert len(_pipeline().vocab.strings) == before


def test_what_was_read_is_remembered() -> None:
    prompt = "Where is the dog of the neighbour?"
    assert read_prompt(prompt) is read_prompt(prompt)


def test_threads_agree() -> None:
    expected = {question: extract_nouns(question) for question in SEEN}
    wrong: list[str] = []

    def check() -> None:
        wrong.extend(question for question, nouns in expected.items() if extract_nouns(question) != nouns)

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("prompt", "nouns"),
    [
        ("What is in the blue square?", ["square"]),
        ("Is there a blue triangle but no green square?", ["triangle", "square"]),
        ("Is the green square left of the blue circle?", ["square", "circle"]),
        ("Where is the orange square?", ["square"]),
        ("Is there a big orange on the table?", ["orange", "table"]),
        ("Is there an old human in the picture?", ["human", "picture"]),
        ("Is the car orange?", ["car"]),
        ("What is on the square table?", ["table"]),
    ],
)
def test_a_thing_that_may_also_describe_is_told_by_its_place(prompt: str, nouns: list[str]) -> None:
    assert extract_nouns(prompt, modifiers=False) == nouns
