"""Read a file of presets: named policies.

TOML, or JSON if the file's name ends in ``.json``; each entry is a policy as in requests:

    [thumbnail]
    budget = {type = "tokens", keep = 32}

    [page]
    method = "adaptprune"
    budget = {type = "energy", threshold = 0.998, min_tokens = 192}
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from vllm_vtprune.policy import BUILTIN_PRESETS, PolicyError, PruningPolicy

PRESET_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
"""Valid preset names; they appear in model names (``NAME@PRESET``) and a response header."""


class PresetsError(ValueError):
    """An invalid file of presets; the message names the file and, if applicable, preset and field."""


def builtin_presets() -> dict[str, PruningPolicy]:
    """The built-in presets, by name."""
    return {name: PruningPolicy.parse(name) for name in BUILTIN_PRESETS}


def read_presets(path: Path) -> dict[str, PruningPolicy]:
    """The presets of a file, by name, in the file's order.

    Raises:
        PresetsError: the file cannot be read or is not a mapping of names to policies.
    """
    presets = {}
    for name, value in _read(path).items():
        if not PRESET_NAME.fullmatch(name):
            accepted = "a letter, then at most 63 letters, digits and any of _ . -"
            raise PresetsError(f"{path}: {json.dumps(name)[:80]} is not a name for a preset; expected {accepted}.")
        if not isinstance(value, Mapping):
            raise PresetsError(
                f"{path}: {name}: {json.dumps(value, default=str)[:80]} is not a policy; expected an object."
            )
        try:
            presets[name] = PruningPolicy.parse(value, param=name)
        except PolicyError as error:
            raise PresetsError(f"{path}: {error}") from error
    return presets


def _read(path: Path) -> Mapping[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PresetsError(f"{path}: cannot be read ({error}).") from error
    try:
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise PresetsError(f"{path}: is not valid {kind}: {error}.") from error
    if not isinstance(content, Mapping):
        raise PresetsError(f"{path}: expected an object with a policy for each name.")
    return content
