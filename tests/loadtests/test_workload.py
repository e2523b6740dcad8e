"""The same seed sends the same pictures and questions, and another one others."""

import base64
import io
from random import Random

import pytest
from PIL import Image

from loadtests.workload import LENGTHS, POLICIES, SIZES, Conversation, grid_of, picture, question
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune_evaluation.messages import message


def image_of(url: str) -> Image.Image:
    head, data = url.split(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_has_its_size_and_its_seed_s_pixels(size: tuple[int, int]) -> None:
    assert image_of(picture(7, size)).size == size
    assert picture(7, size) == picture(7, size)
    assert picture(7, size) != picture(8, size)


@pytest.mark.parametrize(("tokens", "grid"), [(1, (1, 1)), (13, (1, 13)), (279, (9, 31)), (576, (24, 24))])
def test_a_grid_is_as_square_as_it_can_be(tokens: int, grid: tuple[int, int]) -> None:
    assert grid_of(tokens) == grid


@pytest.mark.parametrize("words", LENGTHS)
def test_a_question_has_its_length_and_its_seed_s_words(words: int) -> None:
    asked = question(Random(1), words)
    assert abs(len(asked.split()) - words) <= 1
    assert asked == question(Random(1), words)
    assert asked != question(Random(2), words)


def test_policies_are_policies() -> None:
    for policy in POLICIES:
        PruningPolicy.parse(policy)


def test_a_message_has_its_pictures_before_its_text() -> None:
    assert message("Where?", ["data:1"]) == {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "data:1"}}, {"type": "text", "text": "Where?"}],
    }


def test_a_conversation_repeats_what_was_said_and_begins_anew() -> None:
    conversation = Conversation(Random(1), turns=2)
    first = conversation.ask()
    conversation.answered("There.")
    second = conversation.ask()
    conversation.answered("Here.")
    third = conversation.ask()
    assert [turn["role"] for turn in second] == ["user", "assistant", "user"]
    assert second[:2] == [*first, {"role": "assistant", "content": "There."}]
    assert len(second[2]["content"]) == 1, "the picture is not sent twice in one conversation"
    assert len(third) == 1
    assert third[0]["content"][0] != first[0]["content"][0], "another picture"


def test_a_conversation_ends_where_no_answer_came() -> None:
    conversation = Conversation(Random(1))
    first = conversation.ask()
    conversation.answered(None)
    again = conversation.ask()
    assert len(again) == 1
    assert again[0]["content"][0] != first[0]["content"][0]


def test_a_conversation_follows_its_seed() -> None:
    def talk(seed: int) -> list[object]:
        conversation = Conversation(Random(seed))
        requests: list[object] = []
        for _ in range(6):
            requests.append(conversation.ask())
            conversation.answered("Yes.")
        return requests

    assert talk(3) == talk(3)
    assert talk(3) != talk(4)
