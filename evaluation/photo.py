"""Photographs from installed packages."""

from importlib.util import find_spec
from pathlib import Path

from PIL import Image


def package_file(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(spec.origin).parent / file


def package_photograph(package: str, file: str) -> Image.Image:
    """A photograph, RGB, from a file of an installed package; see `package_file`."""
    with Image.open(package_file(package, file)) as image:
        return image.convert("RGB")


def photograph() -> Image.Image:
    """An astronaut before a space shuttle and a flag: 512 x 512, RGB.

    Eileen Collins, photographed by NASA in 1993 (in the public domain).
    """
    return package_photograph("skimage", "data/astronaut.png")
