"""Programs of vLLM that would ignore policies say so once, and no other does."""

import pytest

from tests.support.logs import records_of
from vllm_vtprune.plugin import unserved

MAIN = "vllm.entrypoints.cli.main"
SERVES, BATCH = "its routes are vLLM's own", "run-batch PRUNES NOTHING"

# command line, imported, VLLM_PLUGINS, what is said
PROGRAMS: dict[str, tuple[list[str], str | None, str | None, str | None]] = {
    "vllm serve": (["/usr/bin/vllm", "serve", "llava"], MAIN, None, SERVES),
    "the same by another name": (["/opt/start", "serve", "llava"], MAIN, None, SERVES),
    "python -m vllm.entrypoints.cli.main serve": (["/vllm/entrypoints/cli/main.py", "serve"], MAIN, None, SERVES),
    "python -m vllm.entrypoints.openai.api_server": (["/vllm/entrypoints/openai/api_server.py"], None, None, SERVES),
    "vllm serve with our routes": (["/usr/bin/vllm", "serve", "llava"], MAIN, "vtprune", None),
    "vtprune serve": (["/usr/bin/vtprune", "serve", "llava"], None, "vtprune", None),
    "vllm run-batch": (["/usr/bin/vllm", "run-batch", "-i", "in"], MAIN, None, BATCH),
    "the same with the plugin named": (["/usr/bin/vllm", "run-batch", "-i", "in"], MAIN, "vtprune", BATCH),
    "python -m vllm.entrypoints.openai.run_batch": (["/vllm/entrypoints/openai/run_batch.py"], None, None, BATCH),
    "vllm bench": (["/usr/bin/vllm", "bench", "serve"], MAIN, None, None),
    "a script with an LLM": (["evaluate.py", "serve"], None, None, None),
    "an interactive Python": ([""], None, None, None),
}


@pytest.mark.parametrize(("arguments", "imported", "plugins", "message"), PROGRAMS.values(), ids=PROGRAMS.keys())
def test_what_is_said(arguments: list[str], imported: str | None, plugins: str | None, message: str | None) -> None:
    environment = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    warning = unserved.ignored_by(arguments, {} if imported is None else {imported: None}, environment)
    assert (warning is None) == (message is None)
    assert message is None or message in str(warning)


@pytest.mark.parametrize("child", [False, True])
def test_the_process_that_was_started_says_it(child: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["vllm", "run-batch"])
    monkeypatch.setattr(unserved, "parent_process", lambda: object() if child else None)
    with records_of("vllm.vtprune") as records:
        unserved.warn_where_policies_are_ignored()
    assert [record.levelname for record in records] == ([] if child else ["WARNING"])
