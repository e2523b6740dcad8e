"""`vtprune bench` against a server that answers as told: what it writes, and what it does not call a result."""

import base64
import io
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from tests.support.fake_chat import DONE, ROLE, FakeChat, Reply, event, fake_chat, report, token, usage
from vllm_vtprune_evaluation.bench import rounds
from vllm_vtprune_evaluation.bench.command import _without_pruning, bench
from vllm_vtprune_evaluation.bench.rounds import Arm, Asker, Level, turn
from vllm_vtprune_evaluation.bench.subjects import NoPictures, Subject, files, generated, scenes
from vllm_vtprune_evaluation.options import load_format
from vllm_vtprune_evaluation.photo import photograph
from vllm_vtprune_server.images import ImageIntake

Body = dict[str, Any]
KEPT = {"balanced": 128, "fast": 64}
FEW = ["--concurrency", "1", "--pictures", "2"]
SMALL = ["--presets", "balanced", "fast", "--concurrency", "1", "2", "--requests", "4", "--pictures", "3"]


def reply(body: Body) -> Reply:
    """Pruned answers are twice as fast; `fast` says something else."""
    kept = KEPT.get(body["pruning"], 576) if body["pruning"] else 576
    timings = {"text": 1.0, "budget": 2.0, "select": 3.0, "ttft": 24.0} if kept < 576 else {}
    word = "blue" if body["pruning"] == "fast" else "red"
    parts = (ROLE, 0.02 if kept < 576 else 0.1, token(word), token(" car.", "length"))
    return Reply((*parts, usage(pruning={**report(kept), "timings_ms": timings}), DONE))


def run(out: Path, answer: Callable[[Body], Reply] = reply, *options: str) -> FakeChat:
    with fake_chat(answer) as fake:
        bench(["--url", fake.url, *SMALL, "--out", str(out), *options])
    return fake


@dataclass(frozen=True)
class Ran:
    """What a benchmark sent, printed and wrote."""

    bodies: list[Body]
    printed: str
    folder: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("bench")
    with redirect_stdout(io.StringIO()) as printed:
        fake = run(folder)
    return Ran(fake.bodies, printed.getvalue(), folder)


def test_the_result_is_a_table_json_and_one_file_of_html(ran: Ran) -> None:
    out, tmp_path = ran.printed, ran.folder
    assert max(map(len, out.splitlines())) <= 100
    assert "fast keeps 11% of the visual tokens" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complaints"] == []
    arms = {arm["arm"]: arm for arm in results["arms"]}
    assert {name: arm["kept_tokens"] for name, arm in arms.items()} == {"off": 576, **KEPT}
    assert {name: arm["same"] for name, arm in arms.items()} == {"off": 1.0, "balanced": 1.0, "fast": 0.0}
    assert arms["fast"]["similarity"] == 0.5, "one of two words"
    assert arms["fast"]["plan_share"] == 0.25
    levels = {(level["clients"], level["new"], level["arm"]): level for level in results["levels"]}
    assert len(levels) == 3 * 3
    assert {level["requests"] for (clients, *_), level in levels.items() if clients == 1} == {4}
    assert levels[1, True, "balanced"]["ttft_ratio"]["value"] < 0.9
    assert levels[1, True, "off"]["ttft_ratio"] is None
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert 'src="http' not in html
    assert all(name in html for name in ("balanced", "fast", "blue car.", "vtprune bench --url"))
    assert html.count("<svg") == 2 + 3 + 1
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == len(ran.bodies)


def test_every_timed_picture_is_new_to_the_server_and_the_same_for_all_arms(ran: Ran) -> None:
    def picture(body: Body) -> str:
        return str(body["messages"][0]["content"][0]["image_url"]["url"])

    timed = [body for body in ran.bodies if body.get("ignore_eos")]
    repeated, new = timed[:12], timed[12:]
    assert len({picture(body) for body in repeated}) == 3, "those of --pictures"
    assert len({picture(body) for body in new}) == len(new)
    assert [body["pruning"] for body in new[:3]] == [False, "balanced", "fast"]
    sent = [base64.b64decode(picture(body).partition(",")[2]) for body in new[:3]]
    assert len({Image.open(io.BytesIO(file)).tobytes() for file in sent}) == 1


def test_seconds_decide_how_many_rounds_there_is_time_for(tmp_path: Path) -> None:
    with fake_chat(reply) as fake:
        bench(["--url", fake.url, *FEW, "--presets", "fast", "--seconds", "1", "--out", str(tmp_path)])
    levels = json.loads((tmp_path / "results.json").read_text())["levels"]
    assert len(levels) == 4
    assert all(4 <= level["requests"] <= 12 for level in levels), "a round takes more than 0.12 s"


def test_stock_vllm_takes_turns_with_our_server_and_gets_no_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []

    def stock_or_ours(body: Body) -> Reply:
        return reply(body) if "pruning" in body else Reply((ROLE, token("red car."), usage(), DONE))

    with fake_chat(stock_or_ours) as fake:

        def server(args: object, *, stock: bool = False) -> AbstractContextManager[str]:
            started.append(stock)
            return nullcontext(fake.url)

        monkeypatch.setattr("vllm_vtprune_evaluation.bench.command._server", server)
        bench([*FEW, "--stock", "--presets", "fast", "--requests", "4", "--out", str(tmp_path)])
    assert started == [False, True, True, False]
    assert sum("pruning" not in body for body in fake.bodies) == 2 * 2 + 2 * 4
    results = json.loads((tmp_path / "results.json").read_text())
    arms = {arm["arm"]: arm for arm in results["arms"]}
    assert (arms["stock"]["kept_tokens"], arms["stock"]["same"]) == (None, 1.0)
    [stock] = [level for level in results["levels"] if level["arm"] == "stock" and level["new"]]
    assert stock["requests"] == 4
    assert stock["ttft_ratio"]["pairs"] == 4


def test_our_options_are_not_those_of_stock_vllm() -> None:
    options = "--pruning-default fast --dtype float32 --pruning-placement=api --pruning-detail --enforce-eager"
    assert _without_pruning(options.split()) == ["--dtype", "float32", "--enforce-eager"]


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ("--load-format dummy --enforce-eager", "dummy"),
        ("--load-format=dummy", "dummy"),
        ("--served-model-name dummy", None),
        ("--load-format auto --served-model-name dummy", "auto"),
    ],
)
def test_weights_are_random_where_the_server_is_told_to_load_none(options: str, value: str | None) -> None:
    assert load_format(options.split()) == value


def test_a_policy_is_named_by_its_method_and_budget(tmp_path: Path) -> None:
    policy = {"method": "divprune", "budget": {"type": "tokens", "keep": 64}}
    with fake_chat(lambda body: reply({**body, "pruning": "fast" if body["pruning"] else False})) as fake:
        bench(["--url", fake.url, *FEW, "--requests", "1", "--presets", json.dumps(policy), "--out", str(tmp_path)])
    assert policy in [body["pruning"] for body in fake.bodies]
    arms = [arm["arm"] for arm in json.loads((tmp_path / "results.json").read_text())["arms"]]
    assert arms == ["off", "divprune@64"]


def bypassed(body: Body) -> Reply:
    images = [{"visual_tokens": 40, "kept_tokens": 40, "bypass_reason": "budget_not_below_tokens"}]
    return Reply((ROLE, token("a"), usage(pruning={"method": "none", "images": images}), DONE))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (bypassed, r"balanced: nothing was pruned \(budget_not_below_tokens\); expected a policy that keeps fewer"),
        (lambda body: Reply((ROLE, token("a"), usage(), DONE)), "off: the answers hold no pruning report"),
        (
            lambda body: Reply((event({"error": {"type": "BadRequestError", "message": "no"}}),), 400),
            "off: 3 of 3 requests failed: status 400",
        ),
    ],
)
def test_what_is_no_ground_for_a_measurement_ends_it(
    answer: Callable[[Body], Reply], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, answer)
    assert not (tmp_path / "report.html").exists()


def test_failures_on_the_way_are_no_result_and_the_report_says_so_first(tmp_path: Path) -> None:
    def fails(body: Body) -> Reply:
        return Reply((ROLE,), cut=True) if body.get("ignore_eos") and body["pruning"] == "fast" else reply(body)

    with pytest.raises(SystemExit, match="vtprune bench: not a result: fast, 1 client: 4 of 4 requests failed"):
        run(tmp_path, fails)
    assert "Not a result: fast, 1 client" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["complaints"]


def test_an_interrupt_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Asker, "block", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path)
    assert ended.value.code == 130
    assert f"Interrupted; 12 requests are kept in {tmp_path}/requests.jsonl" in capsys.readouterr().err
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--presets", "balancd"], "--presets: balancd is not a preset (did you mean balanced?); expected a policy"),
        (["--presets", '{"method": "magic"}'], '--presets.method: "magic" is not accepted; expected one of none,'),
        (["--presets", "{"], "--presets: { is not JSON"),
        (["--presets", "off"], "expected different policies, and neither off nor stock"),
        (["--url", "http://x", "--stock"], "--url: cannot be combined with a model, --family, --stock"),
        (["--size", "10"], "argument --size: '10' is not accepted; expected WIDTHxHEIGHT"),
        (["--concurrency", "0"], "argument --concurrency: '0' is not accepted; expected a whole number from 1"),
    ],
)
def test_options_that_are_none_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        bench(options)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_no_server_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no server answers at http://127.0.0.1:9/v1/models"):
        bench(["--url", "http://127.0.0.1:9", "--out", str(tmp_path)])


def test_arms_take_turns_and_each_is_first_at_times() -> None:
    arms = [Arm("a"), Arm("b"), Arm("c")]
    assert ["".join(arm.name for arm in turn(arms, number)) for number in range(4)] == ["abc", "bca", "cab", "abc"]


def test_enough_rounds_for_an_interval_and_enough_requests_for_all_clients() -> None:
    assert (Level(1).block, Level(1).rounds(24), Level(1).rounds(1)) == (1, 24, rounds.FEWEST)
    assert (Level(16).block, Level(16).rounds(24), Level(16).rounds(1000)) == (32, rounds.FEWEST, 32)


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_copy_is_another_file_with_the_same_pixels(encoding: str) -> None:
    buffer = io.BytesIO()
    photograph().resize((64, 48)).save(buffer, encoding)
    subject = Subject("a", buffer.getvalue(), "image/png", "What?")
    copies = [base64.b64decode(subject.url(copy).partition(",")[2]) for copy in ("", "one", "two")]
    assert len(set(copies)) == 3
    first, *others = (ImageIntake().load_bytes(data).media for data in copies)
    assert all(ImageChops.difference(first, other).getbbox() is None for other in others)


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.png", "c.webp"):
        photograph().save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("none")
    subjects = files(tmp_path, "What?", 2)
    assert [(subject.label, subject.kind, subject.question) for subject in subjects] == [
        ("a.png", "image/png", "What?"), ("b.jpg", "image/jpeg", "What?"),
    ]  # fmt: skip
    (tmp_path / "a.png").write_text("none")
    with pytest.raises(NoPictures, match=r"--images: .*a.png"):
        files(tmp_path, "What?", 2)
    with pytest.raises(NoPictures, match="expected a folder of image files"):
        files(tmp_path / "missing", "What?", 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoPictures, match="holds no picture; expected files such as"):
        files(tmp_path / "empty", "What?", 2)


def test_generated_pictures_have_their_sizes_and_scenes_their_answers() -> None:
    sizes = [Image.open(io.BytesIO(subject.data)).size for subject in generated(3, [(640, 480), (100, 200)])]
    assert sizes == [(640, 480), (100, 200), (640, 480)]
    assert all(subject.answer and subject.question for subject in scenes(3))
    assert scenes(3) == scenes(3)
