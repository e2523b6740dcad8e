"""What is wrong with the images, videos and sounds of a request."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

from vllm_vtprune.plugin.compat import placeholder_is_missing
from vllm_vtprune.plugin.limits import ImageRejected, data_is_missing
from vllm_vtprune_server.problem import MediaProblem, data_url
from vllm_vtprune_server.protocol import ImagePart, MediaPart, PruningChatCompletionRequest
from vllm_vtprune_server.validation import InvalidField


class MediaRefused(InvalidField):
    """A medium that was not taken, by its URL: whoever loads it does not know where it stands in the request.

    Args:
        url: as it was given to who loads it.
        modality: ``image``, ``video`` or ``audio``.
        problem: why.
    """

    def __init__(self, url: str, modality: str, problem: MediaProblem) -> None:
        self.url = url
        self.problem = problem
        self._accepted = problem.accepted or data_url(modality)
        super().__init__(self.named(f"{modality}_url"), parameter=f"{modality}_url")

    def named(self, param: str) -> str:
        """What is wrong, of the field at ``param``."""
        return f"{param}: {reprlib.repr(self.url)} {self.problem}; expected {self._accepted}."


def explain_image_error(images: Sequence[ImagePart], error: Exception) -> InvalidField | None:
    """What is wrong with the images of a request that could not be rendered; None if they are not to blame.

    Args:
        images: the images of the request.
        error: what rendering the request raised.
    """
    if isinstance(error, ImageRejected):
        param = images[error.index].field
        return InvalidField(f"{param}: {error.reason}; expected an image of another shape.", parameter=param)
    for image in images:
        param = image.field
        if isinstance(error, MediaRefused) and image.url == error.url:
            return InvalidField(error.named(param), parameter=param)
        if image.url == "":  # vLLM takes it for none
            return InvalidField(f"{param}: '' is not a URL of an image; expected {data_url('image')}.", parameter=param)
        if image.url is None and data_is_missing(error):
            problem = "null, and no image is cached under this uuid"
            return InvalidField(f"{param}: {problem}; expected {data_url('image')}.", parameter=param)
    return None


def explain_truncation(request: PruningChatCompletionRequest, error: Exception) -> InvalidField | None:
    """What is wrong with ``truncate_prompt_tokens`` where it cuts the place of a medium out of the prompt.

    vLLM then finds fewer places than media and takes the fault on itself.
    """
    limit = request.truncate_prompt_tokens
    media = request.images or request.other_media
    if limit is None or not media or not placeholder_is_missing(error):
        return None
    return InvalidField(
        f"truncate_prompt_tokens: {limit} would cut off an image, a video or audio; expected at least the "
        "tokens of the prompt, or null.",
        parameter="truncate_prompt_tokens",
    )


def explain_media_error(media: Sequence[MediaPart], error: Exception) -> InvalidField | None:
    """The same for the videos and sounds of a request."""
    if isinstance(error, MediaRefused):
        for part in media:
            # vLLM puts data that came without a URL into one.
            if error.url == part.url or error.url.endswith(f",{part.url}"):
                return InvalidField(error.named(part.param), parameter=part.param)
    return None
