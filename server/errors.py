"""What is wrong with the images of a request."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

from vllm_vtprune_server.images import DATA_URL, ImageProblem
from vllm_vtprune_server.protocol import ImagePart
from vllm_vtprune_server.validation import InvalidField


class ImageRefused(InvalidField):
    """An image that was not taken, by its URL: whoever loads it does not know where it stands in the request."""

    def __init__(self, url: str, problem: ImageProblem) -> None:
        self.url = url
        self.problem = problem
        super().__init__(self.named("image_url"), parameter="image_url")

    def named(self, param: str) -> str:
        """What is wrong, of the field at ``param``."""
        return f"{param}: {reprlib.repr(self.url)} {self.problem}; expected {self.problem.accepted}."


def explain_image_error(images: Sequence[ImagePart], error: Exception) -> InvalidField | None:
    """What is wrong with the images of a request that could not be rendered; None if they are not to blame.

    Args:
        images: the images of the request.
        error: what rendering the request raised.
    """
    for image in images:
        param = f"{image.param}.image_url"
        if isinstance(error, ImageRefused) and image.url == error.url:
            return InvalidField(error.named(param), parameter=param)
        if image.url == "":  # vLLM takes it for none
            return InvalidField(f"{param}: '' is not a URL of an image; expected {DATA_URL}.", parameter=param)
        # The words of vLLM 0.32.0 for an item that comes with a uuid alone (multimodal/processing/processor.py).
        if image.url is None and "data is not provided" in str(error):
            problem = "null given, and nothing is remembered under this uuid (any more)"
            return InvalidField(f"{param}: {problem}; expected {DATA_URL}.", parameter=param)
    return None
