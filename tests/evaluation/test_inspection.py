"""`vtprune inspect` on checkpoints made on the spot; no engine runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vllm_vtprune
from vllm_vtprune.overlay import CAPTION, GAP
from vllm_vtprune.plugin.inspection import features_of, pruning_processor
from vllm_vtprune.policy import PolicyError
from vllm_vtprune_checkpoints import DEFAULT, FAMILIES, tiny_checkpoint
from vllm_vtprune_evaluation.inspection import FORMATS, inspect
from vllm_vtprune_evaluation.photo import photograph

KEEP = 0.25
RATIO = json.dumps({"budget": {"type": "ratio", "keep": KEEP}})
PRESET = json.dumps({"preset": "fast", "return_kept": True})
RESIZE = json.dumps({"method": "resize", "budget": {"type": "ratio", "keep": KEEP}})


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half as high as wide."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    photograph().crop((0, 0, 512, 256)).save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    inspect([*map(str, argv), "--json"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kept.png"
    answer = run(
        capsys, photo, "--query", "Where is the astronaut?", "--family", family, "--pruning", RATIO, "--out", out
    )
    [report] = answer["images"]
    assert report["method"] == "resprune"
    assert report["nouns"] == ["astronaut"]
    assert 0 < report["kept_tokens"] < 0.3 * report["visual_tokens"]
    random = family != DEFAULT
    assert answer["weights"] == ("random" if random else "trained")
    with Image.open(out) as drawn:
        assert drawn.height == 256 + CAPTION * (3 if random else 2)
        assert drawn.width in (2 * 512 + GAP, 3 * 512 + 2 * GAP)
        dark = np.asarray(drawn.convert("L").crop((0, 256, drawn.width, drawn.height))) < 128
        assert dark.any(), "captions below the pictures"


def test_several_policies_stand_side_by_side(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "three.png"
    inspect([str(photo), "--pruning", PRESET, RATIO, PRESET, "--out", str(out)])
    first, second, where = capsys.readouterr().out.splitlines()
    assert first == f"{PRESET}: resprune keeps 64 of 576 tokens"
    assert second == f"{RATIO}: resprune keeps 144 of 576 tokens"
    assert where == f"Drawn in {out}"
    with Image.open(out) as drawn, Image.open(photo) as before:
        assert drawn.size == (3 * 512 + 2 * GAP, 256 + 2 * CAPTION), "each policy once"
        assert (np.asarray(drawn)[:256, :512] == np.asarray(before.convert("RGB"))).all(), "the image comes first"


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_holds_the_colours_of_a_figure(suffix: str, tmp_path: Path) -> None:
    figure = photograph()
    figure.save(out := tmp_path / f"kept{suffix}")
    if suffix == ".pdf":  # which Pillow does not read
        assert out.read_bytes().startswith(b"%PDF-")
        return
    with Image.open(out) as drawn:
        difference = np.asarray(drawn.convert("RGB")).astype(int) - np.asarray(figure)
    assert np.abs(difference).mean() < 8


def test_as_much_of_the_picture_stays_as_tokens(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kept.png"
    [report] = run(capsys, photo, "--pruning", RATIO, "--out", out)["images"]
    assert (report["kept_tokens"], report["text_fallback"]) == (144, "no_nouns")
    with Image.open(photo) as before, Image.open(out) as after:
        drawn = np.asarray(after)[:256, 512 + GAP :]
        same = (np.asarray(before.convert("RGB")) == drawn).all(axis=2)
    assert same[:, 128:384].mean() == pytest.approx(KEEP, abs=0.02), "the square that the model sees"
    white = (np.asarray(photograph().crop((0, 0, 512, 256))) == 255).all(axis=2)
    assert not (same & ~white)[:, :128].any()


def test_from_python(photo: Path) -> None:
    with Image.open(photo) as picture:
        inspection = vllm_vtprune.inspect(picture, "Where is the astronaut?", "fast", model=str(tiny_checkpoint()))
    assert inspection.report.kept_tokens == round(inspection.report.visual_tokens / 9)
    assert inspection.report.nouns == ("astronaut",)
    assert inspection.drawn.size == (512, 256)
    with pytest.raises(PolicyError, match="expected a policy that selects tokens"):
        vllm_vtprune.inspect(Image.new("RGB", (9, 9)), policy="off", model=str(tiny_checkpoint()))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pruning", "blanced", "--out", "a.png"], "as a preset: quality, balanced, fast, document"),
        (["--pruning", '{"preset": "fst"}', "--out", "a.png"], "--pruning.preset"),
        (["--pruning", "off", "--out", "a.png"], "keeps every token"),
        (["--pruning", '{"alpha": -1}', "--out", "a.png"], "--pruning.alpha"),
        (["--pruning", RESIZE, "--out", "a.png", "--family", "qwen2_5_vl"], "selects no tokens"),
        (["--out", "a.xyz"], "expected a name that ends in .png, .jpg, .jpeg, .webp, .pdf"),
        (["--out", "a.gif"], "a.gif is not accepted"),
        (["--out", "/nonexistent/a.png"], "expected a file in an existing folder"),
    ],
)
def test_bad_options(argv: list[str], message: str, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        inspect([str(photo), *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_method_that_the_family_cannot_run(photo: Path) -> None:
    options = ["--pruning", '{"method": "hired"}', "--out", "a.png", "--family", "qwen2_5_vl"]
    with pytest.raises(SystemExit, match=r"vtprune inspect: .*hired"):
        inspect([str(photo), *options])


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    for image in (text, tmp_path / "missing.png"):
        with pytest.raises(SystemExit, match=image.name):
            inspect([str(image), "--out", str(tmp_path / "a.png")])


def test_each_image_is_encoded_for_itself() -> None:
    """Also one whose pixels, written one after the other, are those of another."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    upright, lying = noise.reshape(60, 40, 3), noise
    processor = pruning_processor(str(tiny_checkpoint()))
    first, second, again = (features_of(processor, Image.fromarray(pixels)) for pixels in (upright, lying, upright))
    assert torch.equal(first.encoder, again.encoder)
    assert not torch.allclose(first.encoder, second.encoder)
