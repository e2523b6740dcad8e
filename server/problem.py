"""Problems of images, videos and audio from clients."""

from __future__ import annotations

from vllm.exceptions import VLLMValidationError

MIB = 1024**2


class MediaProblem(VLLMValidationError):
    """A rejected medium; ``str()`` is the predicate of the error sentence, such as "is too large".

    Attributes:
        accepted: accepted media, in words; None: a data URL of the modality.
    """

    def __init__(self, problem: str, accepted: str | None = None) -> None:
        super().__init__(problem)
        self.accepted = accepted


def too_large(limit: float, setting: str) -> MediaProblem:
    """The problem of a file above `limit` bytes, set by the environment variable `setting`."""
    return MediaProblem("is too large", f"at most {limit / MIB:g} MiB ({setting})")


def data_url(modality: str) -> str:
    """The form of a data URL for ``image``, ``video`` or ``audio``."""
    return f"data:{modality}/<format>;base64,<the file's bytes in base64>"
