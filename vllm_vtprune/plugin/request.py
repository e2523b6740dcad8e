"""The ``pruning`` entry of a prompt's ``mm_processor_kwargs``: the policy of each image.

>>> {"pruning": {"method": "resprune", "budget": {"type": "tokens", "keep": 128}}}
>>> {"pruning": {"method": "resprune", "texts": ["What colour is the bus?", "Who drives?"]}}
>>> {"pruning": {"method": "resprune", "images": [None, False, "fast"]}}     # per image; None: the prompt's policy

In a server, the entry is a `PromptPruning` made from the request's own field; clients cannot write it in JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.options import refuse_unknown
from vllm_vtprune.plugin.image import ImageJob
from vllm_vtprune.policy import POLICY_FIELDS, PRESET, FamilyDefaults, PolicyError, PruningPolicy

PRUNING_KEY = "pruning"
REPORT_KEY = "pruning"
"""Key of the `RequestReport` in the processor's output."""
PARAM = f"mm_processor_kwargs.{PRUNING_KEY}"
SERVER_FIELD = "the policy in the request's own pruning field, on a route that prunes"


@dataclass(frozen=True)
class PromptPruning:
    """The parsed entry.

    Attributes:
        policy: the prompt's policy, which applies to media other than images.
        images: the images in prompt order.
    """

    policy: PruningPolicy
    images: tuple[ImageJob, ...]

    @property
    def policies(self) -> list[PruningPolicy]:
        """The policy of each image."""
        return [image.policy for image in self.images]

    @property
    def details(self) -> list[str | None]:
        """The ``detail`` that chose the policy of each image."""
        return [image.detail for image in self.images]

    @classmethod
    def of(
        cls,
        inputs: ProcessorInputs,
        *,
        from_client: bool,
        prompt_text: Callable[[], str],
        family: FamilyDefaults | None,
    ) -> PromptPruning:
        """Parse a prompt's entry.

        Args:
            inputs: the processor's inputs, with the entry.
            from_client: reject an entry that is not a `PromptPruning`, because a server's client may have written it.
            prompt_text: returns the prompt's text, for entries without ``texts``.
            family: fills in defaults of the policies; None leaves them unset.

        Raises:
            PolicyError: names the field, its value and what is accepted.
        """
        value = inputs.hf_processor_mm_kwargs[PRUNING_KEY]
        num_images = len(inputs.mm_data_items.get("image", ()))
        if isinstance(value, PromptPruning):
            _per_image("images", value.images, num_images)
            return value
        if from_client:
            raise PolicyError(PARAM, value, SERVER_FIELD)
        texts = image_values = None
        if isinstance(value, Mapping):
            refuse_unknown(value, [*POLICY_FIELDS, PRESET, "texts", "images"], param=PARAM)
            value = dict(value)
            texts, image_values = value.pop("texts", None), value.pop("images", None)
        prompt_policy = PruningPolicy.parse(value, param=PARAM)
        policies = [
            PruningPolicy.parse(image_value, param=f"{PARAM}.images.{index}", default=prompt_policy)
            for index, image_value in enumerate(_per_image("images", image_values, num_images))
        ]
        for index, policy in enumerate(policies):
            if policy is not prompt_policy:
                policy.refuse_request_scope(f"{PARAM}.images.{index}")
        full_text = cache(prompt_text)
        images = []
        for index, (policy, text) in enumerate(zip(policies, _per_image("texts", texts, num_images), strict=True)):
            if texts is not None and not isinstance(text, str):
                raise PolicyError(f"{PARAM}.texts.{index}", text, "a string")
            resolved = policy if family is None else policy.resolve(family)
            images.append(ImageJob(resolved))
            if resolved.conditions_on_text:
                query = resolved.text.query
                images[-1].text = query if query is not None else text if isinstance(text, str) else full_text()
        return cls(prompt_policy, tuple(images))


def without_pruning(hf_kwargs: Mapping[str, object]) -> Mapping[str, object]:
    """A prompt's ``mm_processor_kwargs`` without the ``pruning`` entry."""
    return {key: value for key, value in hf_kwargs.items() if key != PRUNING_KEY}


def _per_image(name: str, value: object, num_images: int) -> Sequence[object]:
    """Check that a list has one entry per image; None stands for a list of None."""
    if value is None:
        return [None] * num_images
    if not isinstance(value, (list, tuple)) or len(value) != num_images:
        raise PolicyError(f"{PARAM}.{name}", value, f"a list with one entry for each of the {num_images} images")
    return value
