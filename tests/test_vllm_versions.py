"""The versions of vLLM that the plugin was tested with: no other is used unasked, and the newest really serves.

PyPI has no CPU build of that one, so `scripts/vllm_next.py` puts its Python on the installed build's compiled code.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.apis import STREAMS, WHOLE, Ask
from tests.support.chat import (
    SMALL_KV_CACHE,
    VISUAL_TOKENS,
    Server,
    fresh_picture,
    fresh_url,
    kept,
    random_model,
    text_of,
    tokens,
    url_of_bytes,
    user,
)
from tests.support.forked import run
from vllm_vtprune.plugin import version
from vllm_vtprune.plugin.register import register
from vllm_vtprune.plugin.version import UntestedVllmError, is_tested, require_tested_vllm
from vllm_vtprune_server.process import running_server

ROOT = Path(__file__).resolve().parents[1]
NEWEST = "0.33.0"


# --- which versions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vllm_version", "tested"),
    [
        ("0.32.0", True),
        ("0.32.1", True),
        ("0.33.0", True),
        ("0.33.12", True),
        ("0.33.0+cpu", True),
        ("0.33.0+cu130", True),
        ("0.33.0rc2", True),
        ("0.32.0.post1", True),
        ("0.31.0", False),
        ("0.34.0", False),
        ("0.3.2", False),
        ("0.320.1", False),
        ("1.33.0", False),
        ("0.33", False),
        ("0.33.1.dev7+g0123456", False),
        ("0.33.1rc1.dev7+g0123456.cpu", False),
        ("dev", False),
    ],
)
def test_a_release_of_a_tested_version_is_tested(
    vllm_version: str, tested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_tested(vllm_version) == tested
    install(vllm_version, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if tested:
        require_tested_vllm()
        return
    with pytest.raises(UntestedVllmError) as refused:
        register()
    assert str(refused.value).startswith(f"vLLM {vllm_version} is installed, but vllm-vtprune ")
    assert "tested only with 0.32 and 0.33" in str(refused.value)
    assert "VTPRUNE_ANY_VLLM=1" in str(refused.value)
    monkeypatch.setenv("VTPRUNE_ANY_VLLM", "1")
    require_tested_vllm()


def test_the_installed_vllm_is_tested() -> None:
    assert is_tested(version.installed_vllm() or "none")


def test_the_extra_for_gpus_takes_what_is_tested() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [requirement] = map(Requirement, project["optional-dependencies"]["gpu"])
    minors = [f"0.{minor}" for minor in range(20, 60)]
    assert tuple(minor for minor in minors if requirement.specifier.contains(f"{minor}.0")) == version.TESTED
    assert NEWEST.startswith(f"{version.TESTED[-1]}.")


@pytest.mark.parametrize(
    "code",
    [
        "from vllm_vtprune.cli import main; main(['serve'])",
        "from vllm.plugins import load_general_plugins; load_general_plugins()",
    ],
    ids=["vtprune-serve", "vllm"],
)
def test_no_server_starts_on_another(code: str, tmp_path: Path) -> None:
    install("0.99.0+cpu", tmp_path)
    done = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "vLLM 0.99.0+cpu is installed, but vllm-vtprune " in last
    if "serve" in code:
        assert last.startswith("vtprune serve: vLLM 0.99.0")
        assert len(done.stderr.splitlines()) == 1


def install(vllm_version: str, folder: Path) -> None:
    """The metadata of a vLLM, found before the real one where the folder comes first on the path."""
    info = folder / "vllm-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm_version}\n")


# --- the newest -------------------------------------------------------------------------------------------------------


CHECK_NAMES = """
import importlib, pkgutil, sys
import pytest
for package in map(importlib.import_module, ("vllm_vtprune", "vllm_vtprune_server", "vllm_vtprune_evaluation")):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
import vllm
print(vllm.__version__)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-n", "0", "tests/test_compat.py"]))
"""


@pytest.fixture(scope="module")
def newest_environment() -> dict[str, str]:
    """What makes a process use it."""
    made = subprocess.run([sys.executable, ROOT / "scripts/vllm_next.py"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    folder = made.stdout.strip()
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "VLLM_CACHE_ROOT": f"{folder}-cache"}


def test_the_newest_has_every_name_that_is_used_and_says_what_is_matched(newest_environment: dict[str, str]) -> None:
    command, environment = [sys.executable, "-c", CHECK_NAMES], {**os.environ, **newest_environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[0] == NEWEST


@pytest.fixture(scope="module")
def newest(newest_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("newest") / "server.log"
    options = [
        *random_model(),
        *SMALL_KV_CACHE,
        *("--dtype", "float32"),
        *("--max-model-len", "2048"),
        *("--allowed-media-domains", "127.0.0.1"),
        *("--pruning-default", json.dumps(tokens(96))),
        "--enforce-eager",
    ]
    environment = {**newest_environment, "VTPRUNE_FETCH_PRIVATE_ADDRESSES": "1"}
    with running_server(options, environment=environment, log=log) as url:
        yield Server(url, log)


@pytest.fixture
def picture_on_the_web(tmp_path: Path) -> Iterator[str]:
    fresh_picture().save(tmp_path / "picture.png")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/picture.png"
        server.shutdown()
        thread.join()


@pytest.mark.engine
@pytest.mark.verify
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 96),
        ({"pruning": tokens(24)}, 24),
        ({"pruning": tokens(24, method="uniform")}, 24),
        ({"pruning": False}, VISUAL_TOKENS),
        ({"model": "vtprune-demo@off"}, VISUAL_TOKENS),
        ({"pruning": {"budget": {"type": "energy", "threshold": 0.9, "min_tokens": 1}}}, None),
    ],
    ids=["default", "tokens", "method", "off", "alias", "energy"],
)
def test_the_newest_prunes_in_whole_answers_and_in_streams(
    fields: dict[str, Any], expected: int | None, newest: Server
) -> None:
    asked = {"messages": [user("Where is the bus?", fresh_url())], **fields}
    answer = newest.ask(**asked)
    [image] = answer["pruning"]["images"]
    assert image["visual_tokens"] == VISUAL_TOKENS
    if expected is None:
        assert 1 < image["kept_tokens"] < VISUAL_TOKENS
        assert image["energy"] >= 0.9
    else:
        assert image["kept_tokens"] == expected
    assert 0 < answer["usage"]["prompt_tokens"] - image["kept_tokens"] < 40
    chunks = newest.stream(**asked, stream_options={"include_usage": True})
    assert text_of(chunks) == answer["choices"][0]["message"]["content"]
    assert kept(chunks[-1]) == [image["kept_tokens"]]
    for name in ("prompt_tokens", "completion_tokens"):
        assert chunks[-1]["usage"][name] == answer["usage"][name]
    for usage in (chunks[-1]["usage"], answer["usage"]):
        assert usage["prompt_tokens_details"]["vtprune"]["kept_tokens"] == image["kept_tokens"]


@pytest.mark.engine
@pytest.mark.verify
@pytest.mark.parametrize("ask", [*WHOLE.values(), *STREAMS.values()])
def test_the_newest_prunes_in_every_api(newest: Server, ask: Ask) -> None:
    assert ask(newest, {"url": fresh_url()}, pruning=tokens(40)).kept == [40]


@pytest.mark.engine
@pytest.mark.verify
def test_the_newest_fetches_an_image(newest: Server, picture_on_the_web: str) -> None:
    assert kept(newest.ask(messages=[user("What is it?", picture_on_the_web)])) == [96]


@pytest.mark.engine
@pytest.mark.verify
@pytest.mark.parametrize(
    ("fields", "url", "mention"),
    [
        ({"pruning": {"budget": {"type": "tokens", "keep": 0}}}, None, "pruning.budget.keep"),
        ({}, url_of_bytes(b"no picture at all"), "image"),
        ({}, "http://localhost/picture.png", "localhost"),
    ],
    ids=["policy", "image", "host"],
)
def test_the_newest_refuses_what_it_cannot_do(
    fields: dict[str, Any], url: str | None, mention: str, newest: Server
) -> None:
    response = newest.post({"messages": [user("What is it?", url or fresh_url())], **fields})
    assert response.status_code == 400, response.text
    assert mention in json.dumps(response.json()["error"])


@pytest.mark.engine
@pytest.mark.verify
def test_the_newest_tells_about_itself(newest: Server) -> None:
    assert "vtprune-demo@off" in [model["id"] for model in newest.get("/v1/models").json()["data"]]
    assert newest.get("/v1/pruning").json()["methods"]
    newest.ask(messages=[user("What is it?", fresh_url())])
    metrics = newest.metrics()
    assert metrics[f"vtprune:build_info|vllm_version={NEWEST}"] == 1
    assert metrics["vtprune:feature_cache_misses_total"] >= 1
