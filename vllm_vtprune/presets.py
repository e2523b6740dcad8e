"""Read a file of presets: named policies.

TOML, or JSON if the file's name ends in ``.json``; each entry is a policy as in requests:

    [thumbnail]
    budget = {type = "tokens", keep = 32}

    [page]
    method = "adaptprune"
    budget = {type = "energy", threshold = 0.998, min_tokens = 192}

The entry ``detail`` is a table of policies for OpenAI's ``detail`` of images, unless it has fields of a policy:

    [detail]
    low = "thumbnail"
    high = {budget = {type = "tokens", keep = 400}}
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from vllm_vtprune.policy import BUILTIN_PRESETS, POLICY_FIELDS, PolicyError, PruningPolicy

PRESET_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
"""Valid preset names; they appear in model names (``NAME@PRESET``) and a response header."""


DETAIL = "detail"
DETAIL_DEFAULTS: Mapping[str, str] = MappingProxyType({"low": "fast", "high": "quality", "original": "off"})
"""Preset of each ``detail``; ``auto`` has none: the policy of the request, or the server's default."""
DETAILS = ("low", "high", "auto", "original")


class PresetsFile(dict[str, PruningPolicy]):
    """The presets of a file, by name, in the file's order.

    Attributes:
        detail: the file's policies by ``detail``: a preset's name, a policy, or false.
    """

    detail: Mapping[str, object] = MappingProxyType({})


class PresetsError(ValueError):
    """An invalid file of presets; the message names the file and, if applicable, preset and field."""


def builtin_presets() -> dict[str, PruningPolicy]:
    """The built-in presets, by name."""
    return {name: PruningPolicy.parse(name) for name in BUILTIN_PRESETS}


def read_presets(path: Path) -> PresetsFile:
    """The presets of a file, and its table of ``detail``.

    Raises:
        PresetsError: the file cannot be read or is not a mapping of names to policies.
    """
    presets = PresetsFile()
    content = dict(_read(path))
    table = content.get(DETAIL)
    if isinstance(table, Mapping) and table and table.keys().isdisjoint(POLICY_FIELDS):
        del content[DETAIL]
    else:
        table = {}
    for name, value in content.items():
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
    for name, value in table.items():
        if name not in DETAILS:
            raise PresetsError(f"{path}: {DETAIL}.{name[:80]}: unknown key; expected one of {', '.join(DETAILS)}.")
        try:
            PruningPolicy.parse(value, param=f"{DETAIL}.{name}", presets=builtin_presets() | presets)
        except PolicyError as error:
            raise PresetsError(f"{path}: {error}") from error
    presets.detail = table
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
