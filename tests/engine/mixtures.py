"""Prompts that mix images and videos, pruned and unpruned, new and cached."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

from PIL import Image

from tests.engine.test_families import QUESTION, Checker, Shown
from tests.support.engines import Ask, reports
from tests.support.families import Turn
from tests.support.images import sample_images
from tests.support.videos import video

ASKED = [Turn(QUESTION, 1)]
TOKENS = {"budget": {"type": "tokens", "keep": 24}}


def picture(index: int, aspect: tuple[int, int], stamp: str = "") -> Image.Image:
    """One of the sample images, of this aspect ratio (width, height) and some 100,000 pixels."""
    width, height = aspect
    scale = (100_000 / (width * height)) ** 0.5
    return sample_images(index + 1, stamp)[index].resize((round(width * scale), round(height * scale)))


def ask_in_every_order(checker: Checker) -> None:
    """Pruned, unpruned and cached images. A sample of the orders; all of them in `make verify`."""
    energy = {"budget": {"type": "energy", "threshold": 0.9}}
    aspects = ((2, 3), (1, 2), (3, 2), (4, 1))
    policies = (TOKENS, False, energy, False)  # new, new, seen before, seen before
    for number, order in enumerate(permutations(range(4))):
        if number % 8 and not os.environ.get("VTPRUNE_VERIFY"):
            continue
        stamp = f"order {number}"
        parts = [Shown(f"{stamp} {i}", picture(i, aspects[i], stamp), policies[i]) for i in range(4)]
        for seen in parts[2:]:
            checker.ask(ASKED, [seen])
        shown = [parts[i] for i in order]
        request = checker.request([Turn(QUESTION, 4)], shown)
        encoded_before = checker.engine.encodings()
        for cached in ([i == 2 for i in order], [i in (0, 2) for i in order]):
            answer = checker.engine.ask(request)
            checker.compare(answer, request, shown)
            assert [report.cached for report in reports(answer)] == cached
            assert checker.engine.encodings() == encoded_before + 1
        unpruned = replace(checker.request(ASKED, parts[1:2]), pruning=None)  # the stock item, for whoever asks for it
        checker.compare(checker.engine.ask(unpruned), unpruned, parts[1:2])


def ask_about_a_video(
    checker: Checker, video_token: str, policy: Any = TOKENS, read: Callable[[Shown], Shown] = lambda still: still
) -> None:
    """Before and after a pruned image, and alone: it passes unpruned. `read`: what the reference reads of an image."""
    frames, metadata = video()
    moving: Any = Shown("video", frames, False)
    processor = checker.reference.processor
    image_id = checker.reference.model.config.image_token_id
    video_id = processor.tokenizer.convert_tokens_to_ids(video_token)
    stills = [Shown(f"video-{index}", picture(index, (3, 2), "video"), policy) for index in (0, 1)]
    for shown in ([stills[0], moving], [moving, stills[1]], [moving]):
        media = [{"type": "video" if each is moving else "image"} for each in shown]
        content = [*media, {"type": "text", "text": QUESTION}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        still = [each for each in shown if each is not moving]
        request = Ask(prompt, [each.image for each in still], policy, [each.name for each in still])
        answer = checker.engine.ask(replace(request, videos=[(frames, metadata)]))
        whole = answer.prompt_ids.count(video_id)
        expected = [(whole, "unsupported_modality") if each is moving else (24, None) for each in shown]
        assert [(report.kept_tokens, report.bypass_reason) for report in reports(answer)] == expected
        if checker.family.name == "internvl":  # whose frames are images in transformers
            ids = [image_id if token == video_id else token for token in answer.prompt_ids]
            answer = replace(answer, prompt_ids=ids)
        checker.compare(
            answer, replace(request, pruning=None), [each if each is moving else read(each) for each in shown]
        )
