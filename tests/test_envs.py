"""Environment variables: defaults, values, and errors that name variable, value and what is accepted."""

from pathlib import Path

import pytest

from vllm_vtprune import envs


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for variable in envs.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def test_defaults_also_for_empty_values(monkeypatch):
    for variable in envs.VARIABLES:
        assert variable() == variable.default
        monkeypatch.setenv(variable.name, " ")
        assert variable() == variable.default


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        (envs.device, "CUDA:1", "cuda:1"),
        (envs.device, "cpu", "cpu"),
        (envs.feature_cache_gb, "0", 0.0),
        (envs.feature_cache_gb, "0.5", 0.5),
        (envs.report_table_size, "10", 10),
        (envs.download_dir, "/models", Path("/models")),
    ],
)
def test_values(variable, text, value, monkeypatch):
    monkeypatch.setenv(variable.name, text)
    assert variable() == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        (envs.device, "gpu"),
        (envs.device, "cuda:"),
        (envs.device, "cuda:-1"),
        *((envs.feature_cache_gb, text) for text in ("-1", "inf", "nan", "2GB")),
        *((envs.report_table_size, text) for text in ("0", "-5", "1.5", "many")),
    ],
)
def test_refused_values(variable, text, monkeypatch):
    monkeypatch.setenv(variable.name, text)
    with pytest.raises(ValueError) as error:
        variable()
    assert all(part in str(error.value) for part in (variable.name, repr(text), variable.accepts))


def test_names_are_unique_and_documented():
    assert len({variable.name for variable in envs.VARIABLES}) == len(envs.VARIABLES)
    assert all(variable.name.startswith("VTPRUNE_") and variable.doc for variable in envs.VARIABLES)
