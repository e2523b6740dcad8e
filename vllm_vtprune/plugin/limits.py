"""What a model's image processor does not take, refused with the field to blame, before the engine gets anything.

vLLM reports what Hugging Face's processors raise under the name of a Python class, without saying which image was the
cause. Options that change the shape of what the engine gets end it: no processor checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.request import without_pruning
from vllm_vtprune.policy import PolicyError

OPTIONS_FIELD = "mm_processor_kwargs"
NESTED_OPTIONS = ("images_kwargs", "videos_kwargs")

VALUE_OPTIONS = frozenset({"do_convert_rgb", "do_normalize", "do_rescale", "image_mean", "image_std", "rescale_factor"})
"""Options that change the values of pixels and nothing else."""

VIDEO_OPTIONS = frozenset({"do_sample_frames", "fps", "max_frames", "min_frames", "num_frames"})

Apply = TypeVar("Apply", bound=Callable[..., Any])


class NotTaken(VLLMValidationError, ValueError):
    """What the model's image processor does not take; a ``ValueError`` too, as what it stands for."""

    def __init__(self, message: str, *, parameter: str) -> None:
        VLLMValidationError.__init__(self, message, parameter=parameter)


class ImageNotTaken(NotTaken):
    """An image that the model's image processor does not take.

    Attributes:
        index: of the image, among those of its prompt.
        reason: why, in words that follow its name.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"image {index} {reason}", parameter=f"multi_modal_data.image.{index}")
        self.index = index
        self.reason = reason


class DataMissing(ValueError):
    """An image that comes by its uuid alone, of which nothing is remembered."""


def data_is_missing(error: Exception) -> bool:
    """Whether an image came by its uuid alone and is not known, as we say or vLLM."""
    return isinstance(error, DataMissing) or compat.says_data_is_missing(error)


def check_options(own: frozenset[str], options: Mapping[str, object]) -> None:
    """Refuse options of a request that the engine would not survive.

    Args:
        own: those of the model's family, which may change how many tokens an image has.
        options: for the Hugging Face processor.

    Raises:
        NotTaken: naming the option.
    """
    accepted = VALUE_OPTIONS | own
    for name, value in options.items():
        path = f"{OPTIONS_FIELD}.{name}"
        if name in NESTED_OPTIONS and isinstance(value, Mapping):
            paths = [f"{path}.{inner}" for inner in value if inner not in accepted]
        else:
            paths = [] if name in accepted else [path]
        for refused in paths:
            raise NotTaken(
                f"{refused[:200]}: not an option that this model takes from a request; expected one of "
                f"{', '.join(sorted(accepted))}.",
                parameter=refused,
            )


def names_what_it_refuses(apply: Apply) -> Apply:
    """Decorate ``apply`` of a multimodal processor: what it cannot process is refused by image or by option."""

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
            blamed = _blamed(self, inputs.mm_data_items, options)
            if blamed is not None:
                raise blamed from error
            if options and not data_is_missing(error):
                raise _options_refused(str(error)) from error
            raise
        except TypeError as error:
            if options:  # vLLM's own processors take their options by name, and no others
                raise _options_refused(str(error)) from error
            raise

    return checked  # type: ignore[return-value]


def _blamed(processor: Any, mm_items: MultiModalDataItems, options: Mapping[str, object]) -> NotTaken | None:
    """The image, or the options, with which the Hugging Face processor fails; None if it takes each image."""
    images = mm_items.get("image")
    if not isinstance(images, ImageProcessorItems):
        return None
    for index, image in enumerate(images.data):
        if image is None or _failure(processor, image, options) is None:
            continue
        reason = _failure(processor, image, {})
        if reason is None:
            return _options_refused("no image can be processed with these values")
        size = images.get_image_size(index)
        return ImageNotTaken(
            index, f"has {size.width} x {size.height} pixels, which this model does not take: {reason}"
        )
    return None


def _options_refused(problem: str) -> NotTaken:
    return NotTaken(
        f"{OPTIONS_FIELD}: {problem}; expected values of the type and in the range that the model's image processor "
        "documents.",
        parameter=OPTIONS_FIELD,
    )


def _failure(processor: Any, image: Any, options: Mapping[str, object]) -> str | None:
    """What Hugging Face's processor says against an image; None if it takes it."""
    items = MultiModalDataItems({"image": ImageProcessorItems([image])})
    try:
        processor._apply_hf_processor_main(items, options)
    except ValueError as error:
        return str(error.__cause__ or error)
    return None
