"""Explain errors of a request's images, videos and audio, with the field's path."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

from vllm_vtprune.plugin.compat import placeholder_is_missing
from vllm_vtprune.plugin.limits import ImageRejected, missing_image
from vllm_vtprune_server.conversation import ImagePart, MediaPart
from vllm_vtprune_server.problem import MediaProblem, data_url
from vllm_vtprune_server.validation import InvalidField, refused


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
    """The error of a request's image, from a rendering error; None if no image caused it."""
    if isinstance(error, ImageRejected):
        return refused(images[error.index].field, error.reason, "an image of another shape")
    missing = missing_image(error)
    if missing is not None and missing < len(images):
        problem = "null, and no image is cached under this uuid for this policy"
        return refused(images[missing].field, problem, data_url("image"))
    for image in images:
        if isinstance(error, MediaRejected) and image.url == error.url:
            return InvalidField(error.named(image.field), parameter=image.field)
        if image.url == "":  # vLLM treats it as missing
            return refused(image.field, "'' is not a URL of an image", data_url("image"))
    return None


TRUNCATIONS = {"truncate_prompt_tokens": "at least the tokens of the prompt, or null", "truncation": '"disabled"'}
"""Field of a request that cuts its prompt -> what does not."""


def explain_truncation(request: object, media: Sequence[object], error: Exception) -> InvalidField | None:
    """The error of a field that cuts a placeholder off; vLLM would answer with status 500."""
    if not media or not placeholder_is_missing(error):
        return None
    for name, accepted in TRUNCATIONS.items():
        value = getattr(request, name, None)
        if value not in (None, "disabled"):
            return refused(name, f"{value} would cut off an image, a video or audio", accepted)
    return None


def explain_media_error(media: Sequence[MediaPart], error: Exception) -> InvalidField | None:
    """`explain_image_error` for the videos and audio of a request."""
    if isinstance(error, MediaRejected):
        for part in media:
            # vLLM turns data without a URL into a data URL
            if error.url == part.url or error.url.endswith(f",{part.url}"):
                return InvalidField(error.named(part.param), parameter=part.param)
    return None
