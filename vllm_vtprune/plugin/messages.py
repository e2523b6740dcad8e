"""What API processes and a vision encoder process send each other.

A ticket stands for the features that one request asked for. The encoder process holds them until the API process
releases the ticket or disconnects; releasing an image that is not encoded yet cancels its encoding.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec
from vllm.multimodal.inputs import MultiModalKwargsItem

from vllm_vtprune.allotment import Energies
from vllm_vtprune.encoder import PlannedImage
from vllm_vtprune.options import shown
from vllm_vtprune.policy import PolicyError
from vllm_vtprune.vision_encoder import EncoderError

ERRORS: dict[str, type[Exception]] = {"encoder": EncoderError, "value": ValueError, "type": TypeError}
"""Errors that keep their type; others become a RuntimeError."""


class Find(msgspec.Struct, tag=True):
    """Give the ticket to an image that is cached or in progress; answered by `Known`."""

    id: int
    ticket: int
    key: str


class Submit(msgspec.Struct, tag=True):
    """Encode an image for the ticket ``id``; ``layout`` is from `Layout.dump`. Answered by `Encoded`."""

    id: int
    key: str
    item: MultiModalKwargsItem
    layout: dict[str, Any]


class Release(msgspec.Struct, tag=True):
    """The ticket ``id`` is not needed any more. Not answered."""

    id: int


class Plan(msgspec.Struct, tag=True):
    """Plan the image of a ticket; ``policy`` is from `PruningPolicy.dump`. Answered by `Planned`."""

    id: int
    ticket: int
    policy: dict[str, Any]
    noun_ids: tuple[int, ...]


class Measure(msgspec.Struct, tag=True):
    """Measure the spectral energies of the image of a ticket. Answered by `Measured`."""

    id: int
    ticket: int


class WarmUp(msgspec.Struct, tag=True):
    """Load the encoder. Answered by `Done`."""

    id: int


class ForgetImages(msgspec.Struct, tag=True):
    """Empty the feature cache. Answered by `Done`."""

    id: int


Request: TypeAlias = Find | Submit | Release | Plan | Measure | WarmUp | ForgetImages


class Known(msgspec.Struct, tag=True):
    """Whether the image is cached or in progress; if so, `Encoded` follows for its ticket."""

    id: int
    known: bool


class Encoded(msgspec.Struct, tag=True):
    """The features of a ticket are ready; ``began`` and ``seconds`` as of `StageRun`, None if they were cached."""

    id: int
    fresh: bool
    began: int | None
    seconds: float


class Planned(msgspec.Struct, tag=True):
    """The plan of an image."""

    id: int
    plan: PlannedImage


class Measured(msgspec.Struct, tag=True):
    """The spectral energies of an image."""

    id: int
    energies: Energies


class Done(msgspec.Struct, tag=True):
    """The answer without a value."""

    id: int


class Failed(msgspec.Struct, tag=True):
    """The error in the place of an answer. ``values`` are the arguments of a `PolicyError`, else the message."""

    id: int
    kind: str
    values: list[Any]

    @classmethod
    def of(cls, id: int, error: BaseException) -> Failed:
        if isinstance(error, PolicyError):
            problem = error.problem or f"{shown(error.value)} is not accepted"
            return cls(id, "policy", [error.param, None, error.accepted, problem])
        kind = next((kind for kind, known in ERRORS.items() if isinstance(error, known)), "")
        return cls(id, kind, [str(error) or type(error).__name__])

    def error(self) -> Exception:
        return PolicyError(*self.values) if self.kind == "policy" else ERRORS.get(self.kind, RuntimeError)(*self.values)


class Loaded(msgspec.Struct, tag=True):
    """Parameter count of the encoder; None: not loaded. Sent on connection and on every change."""

    parameters: int | None


Reply: TypeAlias = Known | Encoded | Planned | Measured | Done | Failed | Loaded
