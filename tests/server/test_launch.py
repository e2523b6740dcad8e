"""What `vtprune serve` refuses, says and sets before an engine starts."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vllm_vtprune
from tests.support.chat import leaks
from tests.support.forked import run_cli
from vllm_vtprune.plugin.placement import EnginePlacement
from vllm_vtprune.policy import FamilyDefaults, PolicyError, PruningPolicy
from vllm_vtprune_server import launch
from vllm_vtprune_server.policies import Policies

NIXL = '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'
# As if our endpoint plugin failed to load, which vLLM logs and then goes on, too.
WITHOUT_OUR_ROUTES = """
import sys
sys.modules["vllm_vtprune_server.plugin"] = None
"""
# As if our general plugin had failed to load, which vLLM logs and then goes on.
WITHOUT_OUR_MODELS = """
import vllm_vtprune.plugin.register as plugin
plugin.register = lambda: None
"""
# As if the engine had found less memory than it asked for, when it had started.
WITHOUT_MEMORY = """
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm_vtprune_server import memory
def fail(self, args): raise RuntimeError("Engine core initialization failed. See root cause above.")
ServeSubcommand.cmd = fail
memory.GROWTH = 1.0
"""


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA without anything to see with."""
    directory = tmp_path_factory.mktemp("llama")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 128,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def refusal_of(*arguments: str, before: str = "") -> str:
    """What `vtprune serve` says of a start that it refuses."""
    done = run_cli("serve", *arguments, before=before)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("vtprune serve: ")
    return last.removeprefix("vtprune serve: ")


def test_a_default_that_the_model_cannot_follow_is_refused(text_model: Path) -> None:
    message = refusal_of(str(text_model), "--pruning-default", "balanced")
    assert f"{text_model} has the architecture LlamaForCausalLM, which cannot be pruned" in message
    assert "expected one of LlavaForConditionalGeneration" in message


def test_a_model_that_would_be_served_unpruned_is_refused() -> None:
    message = refusal_of(before=WITHOUT_OUR_MODELS)
    assert "would be served unpruned" in message
    assert "vllm.model_executor.models.llava:LlavaForConditionalGeneration" in message, "what it found"
    assert "vllm_vtprune.plugin.families.llava:PrunedLlavaForConditionalGeneration" in message, "what it expected"


def test_a_server_whose_routes_do_not_load_is_refused() -> None:
    assert "the server's routes cannot be loaded: ModuleNotFoundError" in refusal_of(before=WITHOUT_OUR_ROUTES)


def test_options_and_port_are_judged_before_vllm_is_imported() -> None:
    imported = "import sys; sys.argv = ['vtprune', 'serve', *sys.argv[1:]]\n"
    program = f"""{imported}
from vllm_vtprune.cli import main
try:
    main()
finally:
    print("vllm" in sys.modules, "torch" in sys.modules)
"""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, status, message in [
            (
                ["--pruning-default", '{"budget": {"threshold": 2}}'],
                2,
                "vtprune serve: error: --pruning-default.budget.threshold: 2 is not accepted; expected a number above "
                "0 and at most 1.",
            ),
            (["--pruning-placement", "gpu"], 2, "invalid choice: 'gpu' (choose from"),
            (
                ["--host", "127.0.0.1", "--port", port],
                1,
                f"vtprune serve: port {port} is in use; set --port to another",
            ),
        ]:
            done = subprocess.run(
                [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60
            )
            assert done.returncode == status
            assert message in done.stderr.splitlines()[-1]
            assert leaks(done.stderr) == []
            assert done.stdout == "False False\n"


@pytest.mark.parametrize("arguments", [["--headless"], ["--uds", "/tmp/socket"], ["--help=all"], ["--port", "0"]])
def test_a_port_that_is_not_used_is_not_looked_at(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "refuse_used_port", lambda host, port: pytest.fail("looked"))
    launch.check_early([*arguments, "--max-model-len", "100"])


def test_more_memory_than_there_is_is_refused_before_the_engine_starts() -> None:
    assert re.fullmatch(
        r"vLLM asks for 100% of this machine's memory, which is [\d.]+ GiB, and [\d.]+ of [\d.]+ GiB "
        r"are free; set VLLM_CPU_KVCACHE_SPACE to fewer GiB for the KV cache, or --gpu-memory-utilization to 0\.\d+",
        refusal_of("--gpu-memory-utilization", "1"),
    )


def test_an_engine_that_lacked_memory_is_explained_in_the_last_line() -> None:
    """The embedded model asks for little, unlike others: a part of all memory is never free on a machine in use."""
    done = run_cli("serve", before=WITHOUT_MEMORY)
    assert done.returncode == 1
    assert "RuntimeError: Engine core initialization failed" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("vtprune serve: vLLM asks for a KV cache, which is 1.0 GiB, and 0.0 of")
    assert "set VLLM_CPU_KVCACHE_SPACE to fewer GiB" in last


def test_a_default_whose_count_depends_on_features_is_refused_beside_kv_transfer() -> None:
    done = run_cli("serve", "--pruning-default", "balanced", "--kv-transfer-config", NIXL)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        '--pruning-default: a budget of the type "energy" depends on features and cannot be used with '
        'kv_transfer_config.kv_connector=NixlConnector; expected a budget of the type "tokens" or "ratio".'
    )


def test_the_embedded_model_is_served_in_float32_on_a_cpu() -> None:
    named, page = ["--served-model-name", "vtprune-demo"], "--pruning-playground"
    assert launch._with_model([])[1:] == [*named, "--dtype", "float32", page]
    assert launch._with_model(["--dtype=bfloat16"])[1:] == [*named, page, "--dtype=bfloat16"]


@pytest.mark.parametrize(
    ("disabled", "root_path", "offline"), [(False, "", True), (True, "", False), (False, "/a", False)]
)
def test_docs_need_no_other_server_where_that_can_be(disabled: bool, root_path: str, offline: bool) -> None:
    args = argparse.Namespace(disable_fastapi_docs=disabled, root_path=root_path)
    assert launch.docs_work_offline(args) == offline


@pytest.mark.parametrize("other", ["--grpc", "VLLM_USE_RUST_FRONTEND"])
def test_a_front_end_without_our_routes_is_refused(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch.refuse_other_front_ends(argparse.Namespace(grpc=False))
    if other != "--grpc":
        monkeypatch.setenv(other, "1")
    with pytest.raises(SystemExit, match=f"{other} cannot be combined with pruning"):
        launch.refuse_other_front_ends(argparse.Namespace(grpc=other == "--grpc"))


def test_the_help_of_serve_shows_our_option_with_an_example() -> None:
    done = run_cli("serve", "--help")
    assert done.returncode == 0
    assert "[--pruning-default POLICY] [--pruning-presets FILE]" in done.stdout
    assert "vtprune serve llava-hf/llava-1.5-7b-hf --pruning-default balanced" in done.stdout
    assert re.search(r"^  Pruning  +Which visual tokens are dropped", done.stdout, re.MULTILINE)
    assert "vtprune serve --help=Pruning" in done.stdout


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("balanced", "balanced"),
        ("off", "off"),
        ("false", False),
        ('{"method": "uniform"}', {"method": "uniform"}),
        ('{"budget": {"type": "tokens", "keep": 128}}', {"budget": {"type": "tokens", "keep": 128}}),
    ],
)
def test_a_default_is_a_preset_or_json(text: str, value: object) -> None:
    assert launch.policy_argument(text) == value


@pytest.mark.parametrize("text", ["fast", '{"preset": "fast"}'])
def test_a_default_that_names_a_preset(text: str) -> None:
    policies = Policies.of(launch.policy_argument(text))
    assert (policies.default, policies.default_preset) == (PruningPolicy.parse("fast"), "fast")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"preset": "fst"}', '--pruning-default.preset: "fst" is not accepted (did you mean fast?); expected one of '),
        (
            '{"preset": "fast", "seed": 1}',
            "--pruning-default.seed: seed given beside a preset, which is a whole policy",
        ),
        (
            '{"return_kept": true}',
            "--pruning-default.return_kept: only requests ask for the kept positions; expected it",
        ),
        ("blanced", '--pruning-default: "blanced" is not accepted (did you mean balanced?); expected an object, '),
        ("", '--pruning-default: "" is not accepted; expected an object, false, or a preset: '),
        ("true", "--pruning-default: true is not accepted; expected "),
        ("[1]", "--pruning-default: [1] is not accepted; expected "),
        ('{"metod": 1}', "--pruning-default.metod: unknown field (did you mean method?); expected one of method, "),
        (
            '{"budget": {"type": "tokens", "keep": 0}}',
            "--pruning-default.budget.keep: 0 is not accepted; expected an integer from 1 to 1000000.",
        ),
        ('{"alpha": NaN}', "--pruning-default.alpha: NaN is not accepted; expected null or a number from 0 to 16."),
        ('{"budget": ', '--pruning-default: "{\\"budget\\": " is not accepted; expected '),
    ],
)
def test_another_default_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(PolicyError) as refused:
        Policies.of(launch.policy_argument(text))
    assert str(refused.value).startswith(message)


def test_a_default_may_be_a_preset_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "presets.toml"
    path.write_text("[tiny]\nbudget = {type = 'tokens', keep = 5}\n")
    policies = Policies.of("tiny", launch.presets_argument(str(path)))
    assert (policies.default_preset, policies.default.budget.model_dump()) == ("tiny", {"type": "tokens", "keep": 5})


def test_presets_that_cannot_be_used_are_refused_with_the_file_s_name(tmp_path: Path) -> None:
    path = tmp_path / "presets.toml"
    path.write_text("[tiny]\nbudget = {type = 'tokens', keep = 0}\n")
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        launch.presets_argument(str(path))
    assert str(refused.value).startswith(f"{path}: tiny.budget.keep: 0 is not accepted; expected an integer")


def test_a_policy_that_the_model_cannot_follow_is_refused_before_any_request() -> None:
    family = FamilyDefaults(clip_alpha=0.5, provides=frozenset({"grid", "positions"}))
    placement = EnginePlacement("api")
    without_cls: Any = SimpleNamespace(
        family=family, place=lambda policy, param: ("api", None), engine_placement=placement
    )
    presets = {"mine": PruningPolicy.parse({"method": "fastervlm"})}
    Policies.of("fast").placements(without_cls)
    with pytest.raises(PolicyError, match=r"mine\.method: method fastervlm needs cls_attention"):
        Policies.of("fast", presets).placements(without_cls)
    with pytest.raises(PolicyError, match=r"--pruning-default\.method: method fastervlm needs cls_attention"):
        Policies.of({"method": "fastervlm"}).placements(without_cls)


# --- VLLM_PLUGINS ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "vtprune"),
        ("vtprune", "vtprune"),
        ("other", "other,vtprune"),
        ("one,two", "one,two,vtprune"),
        ("one,vtprune,two", "one,vtprune,two"),
    ],
)
def test_plugins_that_are_named_stay_on(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", before)
    for _ in range(2):
        launch.enable_plugin()
        assert os.environ["VLLM_PLUGINS"] == after


def test_where_none_is_named_plugins_of_every_kind_stay_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM loads every plugin while the variable is unset, and only those it names once it is set."""

    def points(group: str) -> list[EntryPoint]:
        return [EntryPoint(f"a-{group.removeprefix('vllm.')}", "a:b", group), EntryPoint("in-all", "a:b", group)]

    monkeypatch.setattr(launch, "entry_points", points)
    monkeypatch.setenv("VLLM_PLUGINS", "")  # so that it is put back even where it is not set
    monkeypatch.delenv("VLLM_PLUGINS")
    launch.enable_plugin()
    kinds = ("general_plugins", "endpoint_plugins", "io_processor_plugins", "platform_plugins", "stat_logger_plugins")
    expected = [*(f"a-{kind}" for kind in kinds), "in-all", "vtprune"]
    assert sorted(os.environ["VLLM_PLUGINS"].split(",")) == sorted(expected)


def test_the_kinds_of_plugins_are_vllm_s() -> None:
    """A kind that a new vLLM adds would be switched off silently."""
    package = find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    files = Path(package.origin).parent.joinpath("plugins").rglob("*.py")
    source = "\n".join(file.read_text() for file in files)
    assert set(launch.PLUGIN_GROUPS) == set(re.findall(r'"(vllm\.\w+_plugins)"', source))


# --- the command line -----------------------------------------------------------------------------------------------


def test_help_lists_the_commands_and_shows_an_example() -> None:
    done = run_cli("--help")
    assert done.returncode == 0
    for text in ("serve [MODEL]", "demo", "example:", "vtprune serve llava-hf/llava-1.5-7b-hf"):
        assert text in done.stdout


def test_the_version_is_the_package_s() -> None:
    assert run_cli("--version").stdout.strip() == f"vllm-vtprune {vllm_vtprune.__version__}"


@pytest.mark.parametrize("arguments", [[], ["sevre"], ["--model"]])
def test_a_command_that_does_not_exist_is_an_error(arguments: list[str]) -> None:
    done = run_cli(*arguments)
    assert done.returncode == 2
    assert "usage: vtprune" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_may_follow_the_options() -> None:
    problem = "/nonexistent/model: no such folder; expected a model's folder, or a name on the hub"
    assert refusal_of("--port", "0", "/nonexistent/model") == problem


def test_a_table_of_detail_without_its_option_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "presets.toml"
    file.write_text('[detail]\nlow = "fast"\n')
    done = run_cli("serve", "--pruning-presets", str(file))
    assert done.returncode == 2
    assert "a table [detail], which has no effect without --pruning-detail" in done.stderr.splitlines()[-1]
