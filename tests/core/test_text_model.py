"""Nouns by an installed spaCy model, which the image has: found, loaded without what nouns do not need, and named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.spacy_model import wheel
from vllm_vtprune.text import EMBEDDED, SPACY_MODEL, read_prompt, text_pipeline_name

pytestmark = pytest.mark.verify

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a model of that name is installed."""
    folder = tmp_path_factory.mktemp("model")
    made, site = wheel(folder), folder / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, made], check=True)
    return site


def run(code: str, site: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` by a Python of its own, that has the model."""
    path = {"PYTHONPATH": os.pathsep.join(map(str, (site, ROOT)))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **path})


def test_nouns_are_those_that_the_model_finds(site: Path) -> None:
    question = "Is the bus red? Answer yes or no."
    code = f"""
import json
from vllm_vtprune.text import read_prompt, text_pipeline_name
english = read_prompt({question!r}, modifiers=False)
print(json.dumps([text_pipeline_name(), *english, *read_prompt("Wo steht der Hund?")]))
"""
    done = run(code, site)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        SPACY_MODEL, ["bus", "red"], None, ["Wo", "steht", "der", "Hund"], "not_english_all_words",
    ]  # fmt: skip
    assert (text_pipeline_name(), read_prompt(question, modifiers=False).nouns) == (EMBEDDED, ("bus",)), (
        "without it, red is no noun"
    )


def test_a_folder_of_the_model_s_name_is_not_the_model(tmp_path: Path) -> None:
    (tmp_path / SPACY_MODEL).mkdir()
    done = run(
        "from vllm_vtprune.text import read_prompt, text_pipeline_name\n"
        "print(text_pipeline_name(), *read_prompt('Is the bus red?', modifiers=False).nouns)",
        tmp_path,
    )
    assert done.stdout.split() == [EMBEDDED, "bus"], done.stderr
