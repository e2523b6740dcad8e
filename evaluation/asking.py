"""Ask a server every question under every arm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from openai import AsyncOpenAI, OpenAIError

from vllm_vtprune_evaluation.answers import Answer, Answers
from vllm_vtprune_evaluation.arms import Arm
from vllm_vtprune_evaluation.messages import data_url, message
from vllm_vtprune_evaluation.options import weights_digest
from vllm_vtprune_evaluation.progress import Progress
from vllm_vtprune_evaluation.questions import Picture, is_right

ANSWER_TOKENS = 12
BATCH = 16  # pictures asked about under all arms before the next; their features stay in the cache
IN_FLIGHT = 8  # concurrent requests


class Unasked(Exception):
    """The server's answer to a question cannot be used; the message gives the reason."""


def ask_all(
    url: str,
    model: str,
    pictures: Sequence[Picture],
    arms: Sequence[Arm],
    answers: Answers,
    progress: Callable[[int], object] | None = None,
    *,
    first: str | None = None,
) -> None:
    """Ask every question of every picture under every arm, except those in ``answers``.

    Proceeds by batches of pictures, so all arms have nearly the same pictures at any time.

    Args:
        url: URL of the server, without a path.
        model: the model that it should serve: a directory, or a name on the hub.
        pictures: the pictures.
        arms: the arms.
        answers: gets the answers.
        progress: called with numbers of questions that are answered; None: shown.
        first: URL of an image to send before every picture; None: none.

    Raises:
        Unasked: the server serves another model, returns no report, or a request failed after retries.
    """
    total = len(arms) * sum(len(picture.questions) for picture in pictures)
    try:
        with ExitStack() as stack:
            if progress is None:
                progress = stack.enter_context(Progress(desc="answered", total=total, unit="questions")).update
            asyncio.run(_ask_all(url, model, pictures, arms, answers, progress, first))
    except* (Unasked, OpenAIError) as failures:
        cause = failures.exceptions[0]
        raise Unasked(f"{url}: {cause}") from cause


async def _ask_all(
    url: str,
    expected: str,
    pictures: Sequence[Picture],
    arms: Sequence[Arm],
    answers: Answers,
    progress: Callable[[int], object],
    first: str | None,
) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY", timeout=600) as client:
        card = (await client.models.list()).data[0]
        root = str((card.model_extra or {}).get("root") or card.id)
        if weights_digest(root) != weights_digest(expected):
            raise Unasked(f"it serves {root}, and not {expected}: name it with --model")
        model = card.id
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def ask(arm: Arm, picture: Picture, index: int, image: str) -> None:
            images = [image] if first is None else [first, image]
            async with slots:
                if not answers.has(arm, picture.name(index)):
                    answers.add(arm, await _ask(client, model, arm, picture, index, images))
                progress(1)

        for start in range(0, len(pictures), BATCH):
            batch = pictures[start : start + BATCH]
            images = {picture.label: data_url(picture.paint()) for picture in batch}
            async with asyncio.TaskGroup() as tasks:
                for arm in arms:
                    for picture in batch:
                        for index in range(len(picture.questions)):
                            tasks.create_task(ask(arm, picture, index, images[picture.label]))


async def _ask(
    client: AsyncOpenAI, model: str, arm: Arm, picture: Picture, index: int, images: Sequence[str]
) -> Answer:
    question = picture.questions[index]
    messages: list[Any] = [message(question.text, images)]
    completion = await client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        extra_body={"pruning": arm.policy_for(picture.label)},
    )
    report = (completion.model_extra or {}).get("pruning")
    if report is None:
        raise Unasked("the server's answers hold no pruning report; expected a server started by `vtprune serve`")
    if any(image_report["bypass_reason"] == "unsupported_model" for image_report in report["images"]):
        raise Unasked("the server's model cannot be pruned")
    text = completion.choices[0].message.content or ""
    return Answer(
        question=picture.name(index),
        kind=question.kind,
        density=picture.density,
        text=text,
        right=is_right(text, question.answer),
        tokens=report["images"][-1]["kept_tokens"],
    )
