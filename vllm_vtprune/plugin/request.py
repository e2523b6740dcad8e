"""The ``pruning`` entry of a prompt's ``mm_processor_kwargs``: one policy and one text for each image.

>>> {"pruning": {"method": "resprune", "budget": {"type": "tokens", "keep": 128}}}
>>> {"pruning": {"method": "resprune", "texts": ["What colour is the bus?", "Who drives?"]}}
>>> {"pruning": {"method": "resprune", "images": [None, False, "fast"]}}     # per image; None: as the request

Clients of a server write their policies elsewhere: there this entry holds a `PromptPruning`, which no JSON can be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vllm_vtprune.policy import PolicyError, PruningPolicy

PRUNING_KEY = "pruning"
REPORT_KEY = "pruning"
"""Where the `RequestReport` is in what the processor returns for such a prompt."""
PARAM = f"mm_processor_kwargs.{PRUNING_KEY}"
ELSEWHERE = "the policy in the request's own pruning field, which /v1/chat/completions takes"


@dataclass(frozen=True)
class PromptPruning:
    """The parsed entry: ``policies[i]`` and ``texts[i]`` are the i-th image's, ``policy`` is that of the rest."""

    policy: PruningPolicy
    policies: tuple[PruningPolicy, ...]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, value: object, *, from_client: bool, num_images: int, prompt_text: Callable[[], str]) -> PromptPruning:
        """The entry of a prompt, in either form.

        Args:
            value: what the prompt carries under `PRUNING_KEY`.
            from_client: whether clients of a server may have written it, unless it is a `PromptPruning`.
            num_images: images in the prompt.
            prompt_text: gives the text of the whole prompt, for entries without ``texts``.

        Raises:
            PolicyError: naming the field, its value and what is accepted.
        """
        if isinstance(value, PromptPruning):
            _per_image("images", value.policies, num_images)
            return value
        if from_client:
            raise PolicyError(PARAM, value, ELSEWHERE)
        return cls.parse(value, num_images, prompt_text)

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
        policy = PruningPolicy.parse(fields if isinstance(value, Mapping) else value, param=PARAM)
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
        return cls(policy, policies, tuple(conditions))


def _per_image(name: str, value: object, num_images: int) -> Sequence[object]:
    """One entry for each image; as many None where the client gave nothing."""
    if value is None:
        return [None] * num_images
    if not isinstance(value, (list, tuple)) or len(value) != num_images:
        raise PolicyError(f"{PARAM}.{name}", value, f"a list with one entry for each of the {num_images} images")
    return value
