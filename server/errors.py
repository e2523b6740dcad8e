"""Explain errors of a request's images, videos and audio, with the field's path."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

from vllm_vtprune.plugin.compat import placeholder_is_missing
from vllm_vtprune.plugin.limits import ImageRejected, missing_image
from vllm_vtprune_server.conversation import ImagePart, MediaPart
from vllm_vtprune_server.problem import MediaProblem, data_url
from vllm_vtprune_server.validation import InvalidField


class MediaRejected(InvalidField):
    """A rejected medium, identified by its URL, because the media connector does not know its path in the request.

    Args:
        url: the URL passed to the connector.
        modality: ``image``, ``video`` or ``audio``.
        problem: the problem.
    """

    def __init__(self, url: str, modality: str, problem: MediaProblem) -> None:
        self.url = url
        self.problem = problem
        self._accepted = problem.accepted or data_url(modality)
        super().__init__(self.named(f"{modality}_url"), parameter=f"{modality}_url")

    def named(self, param: str) -> str:
        """The message, with ``param`` as the path."""
        return f"{param}: {reprlib.repr(self.url)} {self.problem}; expected {self._accepted}."


def explain_image_error(images: Sequence[ImagePart], error: Exception) -> InvalidField | None:
    """The error of a request's image, from a rendering error; None if no image caused it.

    Args:
        images: the request's images.
        error: the rendering error.
    """
    if isinstance(error, ImageRejected):
        param = images[error.index].field
        return InvalidField(f"{param}: {error.reason}; expected an image of another shape.", parameter=param)
    missing = missing_image(error)
    if missing is not None and missing < len(images):
        param = images[missing].field
        problem = "null, and no image is cached under this uuid for this policy"
        return InvalidField(f"{param}: {problem}; expected {data_url('image')}.", parameter=param)
    for image in images:
        param = image.field
        if isinstance(error, MediaRejected) and image.url == error.url:
            return InvalidField(error.named(param), parameter=param)
        if image.url == "":  # vLLM treats it as missing
            return InvalidField(f"{param}: '' is not a URL of an image; expected {data_url('image')}.", parameter=param)
    return None


TRUNCATIONS = {"truncate_prompt_tokens": "at least the tokens of the prompt, or null", "truncation": '"disabled"'}
"""Field of a request that cuts its prompt -> what does not."""


def explain_truncation(request: object, media: Sequence[object], error: Exception) -> InvalidField | None:
    """The error of a field that cuts a placeholder off; vLLM would answer with status 500.

    Args:
        request: the request.
        media: its images, videos and audio.
        error: the rendering error.
    """
    if not media or not placeholder_is_missing(error):
        return None
    for name, accepted in TRUNCATIONS.items():
        value = getattr(request, name, None)
        if value not in (None, "disabled"):
            problem = f"{value} would cut off an image, a video or audio"
            return InvalidField(f"{name}: {problem}; expected {accepted}.", parameter=name)
    return None


def explain_media_error(media: Sequence[MediaPart], error: Exception) -> InvalidField | None:
    """`explain_image_error` for the videos and audio of a request."""
    if isinstance(error, MediaRejected):
        for part in media:
            # vLLM turns data without a URL into a data URL
            if error.url == part.url or error.url.endswith(f",{part.url}"):
                return InvalidField(error.named(part.param), parameter=part.param)
    return None
