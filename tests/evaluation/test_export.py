"""Scenes as files: what `vtprune calibrate` and lmms-eval read are the questions that `vtprune eval` asks."""

import importlib.util
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageChops

from vllm_vtprune_evaluation.export import TASK, export
from vllm_vtprune_evaluation.questions import Picture, pictures, read_sample


@pytest.fixture(scope="module")
def asked() -> list[Picture]:
    return list(pictures("test", 12))


@pytest.fixture(scope="module")
def folder(asked: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a folder: with 'signs'") / "scenes"
    assert export(asked, folder) == 12
    return folder


def test_a_sample_for_calibration(asked: list[Picture], folder: Path) -> None:
    sample = read_sample(folder / "questions.jsonl")
    assert [[(q.text, q.answer) for q in p.questions] for p in sample] == [
        [(q.text, q.answer) for q in p.questions] for p in asked
    ]
    for exported, picture in zip(sample, asked, strict=True):
        assert ImageChops.difference(exported.paint(), picture.paint()).getbbox() is None


def test_a_task_for_lmms_eval(folder: Path) -> None:
    class Loader(yaml.SafeLoader):
        """As lmms-eval's: `!function` names a file beside the task and a function in it."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    task = yaml.load((folder / f"{TASK}.yaml").read_text(), Loader)
    assert task["dataset_kwargs"] == {"data_files": {"test": str(folder / "questions.jsonl")}}
    file, function = task["doc_to_visual"].split(".")
    spec = importlib.util.spec_from_file_location(file, folder / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (image,) = getattr(module, function)({"image": read_sample(folder / "questions.jsonl")[0].label})
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
