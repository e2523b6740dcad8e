"""Which text an image is conditioned on, and what that means for the turns of a conversation."""

import pytest

from tests.support.chat import Body, Server, fresh_url, kept, nouns, tokens, user

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({}, ["dog"]),
        ({"scope": "message"}, ["dog"]),
        ({"scope": "last_turn"}, ["bus"]),
        ({"query": "a red kite", "modifiers": False}, ["kite"]),
        ({"query": "a red kite", "modifiers": True}, ["red", "kite"]),
        ({"query": "a red kite", "modifiers": False, "scope": "last_turn"}, ["kite"]),
        ({"clean": False}, ["Where", "is", "the", "dog"]),
        ({"clean": False, "modifiers": True}, ["Where", "is", "the", "dog"]),
        ({"query": ""}, []),
    ],
)
def test_which_text_counts(server: Server, text: Body, expected: list[str]) -> None:
    messages = [
        user("Where is the dog?", fresh_url()),
        {"role": "assistant", "content": "Beside the tree."},
        user("Is there a bus?"),
    ]
    answer = server.ask(messages=messages, pruning=tokens(96, text=text))
    assert nouns(answer) == [expected]
    assert kept(answer) == [96]


@pytest.mark.parametrize(
    ("question", "words", "reason"),
    [
        ("Wo steht der große Hund?", ["Wo", "steht", "der", "große", "Hund"], "not_english_all_words"),
        ("图片里的狗在哪里？", ["图片里的狗在哪里"], "not_english_all_words"),
        ("teh dgo", ["teh", "dgo"], None),
        ("What is it?", [], "no_nouns"),
    ],
)
def test_what_is_made_of_a_text_without_english_nouns(
    server: Server, question: str, words: list[str], reason: str | None
) -> None:
    ask = {"messages": [user(question, fresh_url())], "pruning": tokens(96)}
    for _ in range(2):  # the second is answered from the caches
        [image] = server.ask(**ask)["pruning"]["images"]
        assert (image["nouns"], image["text_fallback"]) == (words, reason)


def test_a_method_that_does_not_read_the_text_reports_no_words(server: Server) -> None:
    answer = server.ask(messages=[user("Where is the dog?", fresh_url())], pruning=tokens(96, method="uniform"))
    assert nouns(answer) == [[]]
    assert answer["pruning"]["text_pipeline"] is None


def cached_tokens(answer: Body) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_following_the_last_turn_chooses_anew_and_says_so(server: Server) -> None:
    messages = [user("Where is the dog?", fresh_url())]
    policy = tokens(200, text={"scope": "last_turn"})
    first = server.ask(messages=messages, pruning=policy)
    messages += [{"role": "assistant", "content": "There."}, user("Is there a bus?")]
    second = server.ask(messages=messages, pruning=policy)
    assert (nouns(first), nouns(second)) == ([["dog"]], [["bus"]])
    assert second["pruning"]["images"][0]["cached"] is False
    assert cached_tokens(second) == 0, "what was prefilled for another choice of tokens was reused"
