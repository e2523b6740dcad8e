"""Reject images and options that the model's image processor cannot handle, and name the field, before the engine runs.

vLLM reports errors of Hugging Face processors by Python class, without the image. No processor checks options that
change the shape of its output; such options would kill the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.options import did_you_mean
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.request import PRUNING_KEY, without_pruning
from vllm_vtprune.policy import PolicyError

OPTIONS_FIELD = "mm_processor_kwargs"
NESTED_OPTIONS = ("images_kwargs", "videos_kwargs")

VALUE_OPTIONS = frozenset({"do_convert_rgb", "do_normalize", "do_rescale", "image_mean", "image_std", "rescale_factor"})
"""Options that change pixel values only."""

VIDEO_OPTIONS = frozenset({"do_sample_frames", "fps", "max_frames", "min_frames", "num_frames"})

Apply = TypeVar("Apply", bound=Callable[..., Any])


class InputRejected(VLLMValidationError, ValueError):
    """Input rejected by the model's image processor; also a ``ValueError``, like the error it replaces."""

    def __init__(self, message: str, *, parameter: str) -> None:
        VLLMValidationError.__init__(self, message, parameter=parameter)


class ImageRejected(InputRejected):
    """An image rejected by the model's image processor.

    Attributes:
        index: index of the image in its prompt.
        reason: predicate of the error sentence, such as "has 1 x 900 pixels, ...".
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"image {index} {reason}", parameter=f"multi_modal_data.image.{index}")
        self.index = index
        self.reason = reason


class DataMissing(ValueError):
    """An image sent as a uuid only, which no cache holds.

    Attributes:
        index: index of the image in its prompt.
    """

    def __init__(self, index: int, key: str) -> None:
        super().__init__(f"Cache miss for image {key} but data is not provided.")
        self.index = index


def missing_image(error: Exception) -> int | None:
    """The index of the image sent as a uuid only that no cache holds, from an error of ours or vLLM's; else None."""
    if isinstance(error, DataMissing):
        return error.index
    modality, index = compat.missing_item(error) or ("", None)
    return index if modality == "image" else None


def check_options(family_options: frozenset[str], options: Mapping[str, object]) -> None:
    """Reject a request's options that could kill the engine.

    Args:
        family_options: options of the model's family, which may change an image's token count.
        options: the request's options for the Hugging Face processor.

    Raises:
        InputRejected: names the option.
    """
    accepted = VALUE_OPTIONS | family_options
    for name, value in options.items():
        path = f"{OPTIONS_FIELD}.{name}"
        if name in NESTED_OPTIONS and isinstance(value, Mapping):
            paths = [f"{path}.{inner}" for inner in value if inner not in accepted]
        else:
            paths = [] if name in accepted else [path]
        for rejected in paths:
            near = did_you_mean(rejected.rpartition(".")[2], [PRUNING_KEY, *sorted(accepted)])
            raise InputRejected(
                f"{rejected[:200]}: not an option that a request may set for this model{near}; expected one of "
                f"{', '.join(sorted(accepted))}.",
                parameter=rejected,
            )


def rejects_bad_input(apply: Apply) -> Apply:
    """Decorate ``apply`` of a multimodal processor: errors name the image or the option at fault."""

    @wraps(apply)
    def checked(self: Any, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        options = without_pruning(inputs.hf_processor_mm_kwargs)
        if hasattr(self, "family"):
            check_options(self.family.options, options)
        try:
            return apply(self, inputs, timing_ctx)
        except (VLLMError, PolicyError):
            raise
        except ValueError as error:
            rejection = _rejection(self, inputs.mm_data_items, options)
            if rejection is not None:
                raise rejection from error
            if options and not (isinstance(error, DataMissing) or compat.missing_item(error)):
                raise _options_rejected(str(error)) from error
            raise
        except TypeError as error:
            if options:  # vLLM's own processors raise it for unknown options
                raise _options_rejected(str(error)) from error
            raise

    return checked  # type: ignore[return-value]


def _rejection(processor: Any, mm_items: MultiModalDataItems, options: Mapping[str, object]) -> InputRejected | None:
    """Try each image alone; the error for the image or options at fault, None if every image passes."""
    images = mm_items.get("image")
    if not isinstance(images, ImageProcessorItems):
        return None
    for index, image in enumerate(images.data):
        if image is None or _failure(processor, image, options) is None:
            continue
        reason = _failure(processor, image, {})
        if reason is None:
            return _options_rejected("no image can be processed with these values")
        size = images.get_image_size(index)
        return ImageRejected(index, f"has {size.width} x {size.height} pixels, which this model rejects: {reason}")
    return None


def _options_rejected(problem: str) -> InputRejected:
    return InputRejected(
        f"{OPTIONS_FIELD}: {problem}; expected values of the type and in the range that the model's image processor "
        "documents.",
        parameter=OPTIONS_FIELD,
    )


def _failure(processor: Any, image: Any, options: Mapping[str, object]) -> str | None:
    """The Hugging Face processor's error for an image; None if it accepts it."""
    items = MultiModalDataItems({"image": ImageProcessorItems([image])})
    try:
        processor._apply_hf_processor_main(items, options)
    except ValueError as error:
        return str(error.__cause__ or error)
    return None
