"""The ``pruning`` entry of a prompt's ``mm_processor_kwargs``: what is asked for each of its images.

>>> {"pruning": {"method": "resprune", "budget": {"type": "tokens", "keep": 128}}}
>>> {"pruning": {"method": "resprune", "texts": ["What colour is the bus?", "Who drives?"]}}
>>> {"pruning": {"method": "resprune", "images": [None, False, "fast"]}}     # per image; None: as the request

Clients of a server write their policies elsewhere: there this entry holds a `PromptPruning`, which no JSON can be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.plugin.image import ImageJob
from vllm_vtprune.policy import FamilyDefaults, PolicyError, PruningPolicy

PRUNING_KEY = "pruning"
REPORT_KEY = "pruning"
"""Where the `RequestReport` is in what the processor returns for such a prompt."""
PARAM = f"mm_processor_kwargs.{PRUNING_KEY}"
ELSEWHERE = "the policy in the request's own pruning field, which /v1/chat/completions takes"


@dataclass(frozen=True)
class PromptPruning:
    """The parsed entry.

    Attributes:
        policy: of what is no image.
        images: in the order of the prompt.
    """

    policy: PruningPolicy
    images: tuple[ImageJob, ...]

    @property
    def policies(self) -> list[PruningPolicy]:
        """The policy of each image."""
        return [image.policy for image in self.images]

    @classmethod
    def of(
        cls,
        inputs: ProcessorInputs,
        *,
        from_client: bool,
        prompt_text: Callable[[], str],
        family: FamilyDefaults | None,
    ) -> PromptPruning:
        """The entry of a prompt, in either form.

        Args:
            inputs: of the processor, with the entry.
            from_client: whether clients of a server may have written it, unless it is a `PromptPruning`.
            prompt_text: gives the text of the whole prompt, for entries without ``texts``.
            family: with which policies are resolved; None: they are not.

        Raises:
            PolicyError: naming the field, its value and what is accepted.
        """
        value = inputs.hf_processor_mm_kwargs[PRUNING_KEY]
        num_images = len(inputs.mm_data_items.get("image", ()))
        if isinstance(value, PromptPruning):
            _per_image("images", value.images, num_images)
            return value
        if from_client:
            raise PolicyError(PARAM, value, ELSEWHERE)
        fields = dict(value) if isinstance(value, Mapping) else {}
        texts, own = fields.pop("texts", None), fields.pop("images", None)
        whole = PruningPolicy.parse(fields if isinstance(value, Mapping) else value, param=PARAM)
        policies = [
            PruningPolicy.parse(each, param=f"{PARAM}.images.{index}", default=whole)
            for index, each in enumerate(_per_image("images", own, num_images))
        ]
        whole_text = cache(prompt_text)
        images = []
        for index, (policy, text) in enumerate(zip(policies, _per_image("texts", texts, num_images), strict=True)):
            if texts is not None and not isinstance(text, str):
                raise PolicyError(f"{PARAM}.texts.{index}", text, "a string")
            resolved = policy if family is None else policy.resolve(family)
            images.append(ImageJob(resolved))
            if resolved.conditions_on_text:
                asked = resolved.text.query
                images[-1].text = asked if asked is not None else text if isinstance(text, str) else whole_text()
        return cls(whole, tuple(images))


def without_pruning(hf_kwargs: Mapping[str, object]) -> Mapping[str, object]:
    """A prompt's ``mm_processor_kwargs`` as stock vLLM takes them."""
    return {key: value for key, value in hf_kwargs.items() if key != PRUNING_KEY}


def _per_image(name: str, value: object, num_images: int) -> Sequence[object]:
    """One entry for each image; as many None where the client gave nothing."""
    if value is None:
        return [None] * num_images
    if not isinstance(value, (list, tuple)) or len(value) != num_images:
        raise PolicyError(f"{PARAM}.{name}", value, f"a list with one entry for each of the {num_images} images")
    return value
