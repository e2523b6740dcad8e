"""One budget for all images of a request, on an engine with every cache."""

from typing import Any

import pytest
from PIL import Image

from tests.support.engines import Ask, Engine, ask_about, assert_same, reports
from tests.support.images import sample_images
from vllm_vtprune.plugin.request import PARAM
from vllm_vtprune.policy import PolicyError

pytestmark = pytest.mark.engine

KEEP = 120
QUESTION = "Where is the bus?"


def budget(keep: int = KEEP, **fields: Any) -> dict[str, Any]:
    return {"budget": {"type": "tokens", "keep": keep, "scope": "request", **fields}}


def blank(shade: int) -> Image.Image:
    return Image.new("RGB", (336, 336), (shade, shade, 255 - shade))


def test_a_blank_page_leaves_its_share_to_a_picture(cached: Engine) -> None:
    [picture] = sample_images(1, stamp="shared budget")
    page = blank(17)
    encoded_before = cached.encodings()
    request = Ask(ask_about(QUESTION, images=2), [page, picture], {**budget(), "texts": [QUESTION] * 2})
    answer = cached.ask(request)
    kept = [image.kept_tokens for image in reports(answer)]
    assert sum(kept) == KEEP
    assert kept[0] < kept[1] / 2
    assert kept == [image.allotted_tokens for image in reports(answer)]
    assert {image.placement for image in reports(answer)} == {"api"}

    again = cached.ask(request)
    assert_same(again, answer)
    assert all(image.cached for image in reports(again))
    assert cached.encodings() - encoded_before == 2

    policies = [{"budget": {"type": "tokens", "keep": count}} for count in kept]
    each = cached.ask(Ask(request.prompt, request.images, {"images": policies, "texts": [QUESTION] * 2}))
    assert (each.prompt_ids, each.token_ids) == (answer.prompt_ids, answer.token_ids)
    assert all(image.cached for image in reports(each)), "the same items"
    assert [image.allotted_tokens for image in reports(each)] == [None, None]


def test_a_later_image_changes_the_share_of_an_earlier_one(cached: Engine) -> None:
    first, second = sample_images(2, stamp="later image")
    alone = cached.ask(Ask(ask_about(QUESTION), [first], budget()))
    both = cached.ask(Ask(ask_about(QUESTION, images=2), [first, second], budget()))
    assert reports(alone)[0].kept_tokens == KEEP
    assert sum(image.kept_tokens for image in reports(both)) == KEEP
    assert reports(both)[0].kept_tokens < KEEP


def test_an_image_of_its_own_policy_takes_no_part(cached: Engine) -> None:
    images = sample_images(2, stamp="own policy")
    own = {"budget": {"type": "tokens", "keep": 30}}
    answer = cached.ask(Ask(ask_about(QUESTION, images=2), images, {**budget(), "images": [None, own]}))
    assert [image.kept_tokens for image in reports(answer)] == [KEEP, 30]


def test_a_budget_below_one_token_per_image_is_refused(cached: Engine) -> None:
    images = sample_images(3, stamp="too small")
    with pytest.raises(PolicyError, match="2 tokens cannot be divided over 3 images; expected 3 or more") as refused:
        cached.ask(Ask(ask_about(QUESTION, images=3), images, budget(keep=2)))
    assert refused.value.param == "pruning.budget.keep"


def test_one_image_cannot_have_a_budget_for_all(cached: Engine) -> None:
    with pytest.raises(PolicyError, match="divides one budget over the images of a request") as refused:
        cached.ask(Ask(ask_about(QUESTION), sample_images(1, stamp="one"), {"images": [budget()]}))
    assert refused.value.param == f"{PARAM}.images.0.budget.scope"
