"""What is wrong with an image, a video or a sound that a client sent, in words that follow its name."""

from __future__ import annotations

from vllm.exceptions import VLLMValidationError

MIB = 1024**2


class MediaProblem(VLLMValidationError):
    """A medium that is not taken; ``str()`` says why, to follow the name of the medium.

    Attributes:
        accepted: what would be taken, in words; None: a data URL of its kind.
    """

    def __init__(self, problem: str, accepted: str | None = None) -> None:
        super().__init__(problem)
        self.accepted = accepted


def too_large(limit: float, setting: str) -> MediaProblem:
    """The problem of more bytes than `limit`, which the environment variable `setting` sets."""
    return MediaProblem("is too large", f"at most {limit / MIB:g} MiB ({setting})")


def data_url(modality: str) -> str:
    """How a medium is sent along: ``image``, ``video`` or ``audio``."""
    return f"data:{modality}/<format>;base64,<the file's bytes in base64>"
