"""What a model's vision encoder makes of pictures, for the budgets that follow from it; no engine is started."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image
from tqdm import tqdm

from vllm_vtprune.budget import Spectrum, exact_spectrum
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.inspection import features_of, pruning_processor


@dataclass(frozen=True)
class Sample:
    """Some pictures, as the model's encoder sees them.

    Attributes:
        features: of the first picture.
        spectra: of all of them, exact, over the tokens that energy is measured on.
    """

    features: VisualFeatures
    spectra: list[Spectrum]


def sample_pictures(model: str, images: Iterable[Image.Image]) -> Sample:
    """Encode pictures one by one.

    Args:
        model: a directory, or a name on the hub.
        images: at least one.

    Raises:
        InspectionFailed: the model cannot be pruned.
    """
    processor = pruning_processor(model)
    first: VisualFeatures | None = None
    spectra = []
    for image in tqdm(images, unit="picture", disable=None):
        features = features_of(processor, image)
        overview = features.overview
        first = first or features
        spectra.append(exact_spectrum(features.encoder if overview is None else features.encoder[overview]))
    assert first is not None
    return Sample(first, spectra)
