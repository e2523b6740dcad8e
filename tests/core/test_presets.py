"""Presets from a file: what it may hold, and what is said of one that cannot be used."""

import json
import pickle
from pathlib import Path

import pytest

from vllm_vtprune.policy import BUILTIN_PRESETS, PruningPolicy
from vllm_vtprune.presets import PresetsError, builtin_presets, read_presets

TOML = """
[thumbnail]
budget = {type = "tokens", keep = 32}

[page]   # dense text
method = "adaptprune"
sigma_d = 2
budget = {type = "energy", threshold = 0.998, min_tokens = 192}

[off]
method = "none"
"""
AS_JSON = {
    "thumbnail": {"budget": {"type": "tokens", "keep": 32}},
    "page": {"method": "adaptprune", "sigma_d": 2, "budget": {"type": "energy", "threshold": 0.998, "min_tokens": 192}},
    "off": {"method": "none"},
}


def written(folder: Path, text: str, name: str = "presets.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    expected = {name: PruningPolicy.parse(value) for name, value in AS_JSON.items()}
    assert read_presets(written(tmp_path, TOML)) == expected
    assert read_presets(written(tmp_path, json.dumps(AS_JSON), "presets.json")) == expected
    assert list(read_presets(written(tmp_path, TOML))) == list(AS_JSON), "in the file's order"


DETAIL = """
[detail]
low = "thumbnail"
high = {budget = {type = "tokens", keep = 400}}
original = false
"""


def test_a_table_of_detail_is_no_preset(tmp_path: Path) -> None:
    presets = read_presets(written(tmp_path, TOML + DETAIL))
    assert list(presets) == list(AS_JSON)
    high = {"budget": {"type": "tokens", "keep": 400}}
    assert presets.detail == {"low": "thumbnail", "high": high, "original": False}
    sent = pickle.loads(pickle.dumps(presets))
    assert (sent, sent.detail) == (presets, presets.detail), "to another process"


def test_a_preset_may_be_called_detail(tmp_path: Path) -> None:
    for text in ("[detail]\n", "[detail]\nbudget = {type = 'tokens', keep = 5}\n"):
        presets = read_presets(written(tmp_path, text))
        assert (list(presets), presets.detail) == (["detail"], {})


def test_an_empty_file_has_none(tmp_path: Path) -> None:
    assert read_presets(written(tmp_path, "")) == {}
    assert read_presets(written(tmp_path, "{}", "presets.json")) == {}


def test_the_package_s_presets_are_policies() -> None:
    assert builtin_presets() == {name: PruningPolicy.parse(name) for name in BUILTIN_PRESETS}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "p.toml",
            "[a]\nbudget = {type = 'tokens', keep = 0}",
            "a.budget.keep: 0 is not accepted; expected an integer",
        ),
        ("p.toml", "[a]\nmetod = 'uniform'", "a.metod: unknown field (did you mean method?); expected one of method, "),
        ("p.json", '{"a": {"alpha": "x"}}', 'a.alpha: "x" is not accepted; expected null or a number'),
        ("p.json", '{"a": "fast"}', 'a: "fast" is not a policy; expected an object.'),
        ("p.toml", "a = 3", "a: 3 is not a policy; expected an object."),
        ("p.toml", "['a@b']\nmethod = 'none'", '"a@b" is not a name for a preset; expected a letter, then'),
        ("p.toml", "['']\nmethod = 'none'", '"" is not a name for a preset'),
        ("p.toml", "['two words']\nmethod = 'none'", '"two words" is not a name for a preset'),
        ("p.toml", "[detail]\nlo = 'fast'", "detail.lo: unknown key; expected one of low, high, auto, original."),
        (
            "p.toml",
            "[detail]\nlow = 'fst'",
            'detail.low: "fst" is not accepted (did you mean fast?); expected an object, false, or a preset: ',
        ),
        ("p.toml", "[detail]\nlow = {alpha = -1}", "detail.low.alpha: -1 is not accepted"),
        ("p.json", "[]", "expected an object with a policy for each name."),
        ("p.json", '{"a": ', "is not valid JSON: "),
        ("p.toml", "[a", "is not valid TOML: "),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = written(tmp_path, text, name)
    with pytest.raises(PresetsError) as refused:
        read_presets(path)
    assert str(refused.value).startswith(f"{path}: {message}")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PresetsError, match=r"missing\.toml: cannot be read \(.*No such file"):
        read_presets(tmp_path / "missing.toml")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "presets.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PresetsError, match=r"presets\.toml: cannot be read"):
        read_presets(path)
