"""The ``pruning`` entry of a prompt's ``mm_processor_kwargs``: one policy and one text for each image.

>>> {"pruning": {"method": "resprune", "budget": {"type": "tokens", "keep": 128}}}
>>> {"pruning": {"method": "resprune", "texts": ["What colour is the bus?", "Who drives?"]}}
>>> {"pruning": {"method": "resprune", "images": [None, False, "fast"]}}     # per image; None: as the request

The server sends the same form, with a ``request_id`` under which it collects the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vllm_vtprune.policy import PolicyError, PruningPolicy

PRUNING_KEY = "pruning"
PARAM = f"mm_processor_kwargs.{PRUNING_KEY}"
MAX_REQUEST_ID = 256


@dataclass(frozen=True)
class PromptPruning:
    """The parsed entry: ``policies[i]`` and ``texts[i]`` are the i-th image's, ``policy`` is that of the rest."""

    policy: PruningPolicy
    policies: tuple[PruningPolicy, ...]
    texts: tuple[str, ...]
    request_id: str | None

    @classmethod
    def parse(cls, value: object, num_images: int, prompt_text: Callable[[], str]) -> PromptPruning:
        """Validate the entry.

        Args:
            value: what the prompt carries under `PRUNING_KEY`.
            num_images: images in the prompt.
            prompt_text: gives the text of the whole prompt, for entries without ``texts``.

        Raises:
            PolicyError: naming the field, its value and what is accepted.
        """
        fields = dict(value) if isinstance(value, Mapping) else {}
        texts = fields.pop("texts", None)
        images = fields.pop("images", None)
        request_id = fields.pop("request_id", None)
        policy = PruningPolicy.parse(fields if isinstance(value, Mapping) else value, param=PARAM)
        if request_id is not None and not (isinstance(request_id, str) and len(request_id) <= MAX_REQUEST_ID):
            raise PolicyError(f"{PARAM}.request_id", request_id, f"a string of at most {MAX_REQUEST_ID} characters")
        policies = tuple(
            PruningPolicy.parse(own, param=f"{PARAM}.images.{index}", default=policy)
            for index, own in enumerate(_per_image("images", images, num_images))
        )
        if texts is None:
            needed = any(policy.conditions_on_text and policy.text.query is None for policy in policies)
            texts = [prompt_text() if needed else ""] * num_images
        conditions = []
        for index, (text, own) in enumerate(zip(_per_image("texts", texts, num_images), policies, strict=True)):
            if not isinstance(text, str):
                raise PolicyError(f"{PARAM}.texts.{index}", text, "a string")
            conditions.append(text if own.text.query is None else own.text.query)
        return cls(policy, policies, tuple(conditions), request_id)


def _per_image(name: str, value: object, num_images: int) -> Sequence[object]:
    """One entry for each image; as many None where the client gave nothing."""
    if value is None:
        return [None] * num_images
    if not isinstance(value, (list, tuple)) or len(value) != num_images:
        raise PolicyError(f"{PARAM}.{name}", value, f"a list with one entry for each of the {num_images} images")
    return value
