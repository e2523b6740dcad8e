"""What we touch of vLLM that is not public: in one place, still there, and vLLM still says what we match.

`tests/test_vllm_versions.py` runs this file with the newest vLLM too.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from io import BytesIO
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from vllm.config import ParallelConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.audio import AudioMediaIO
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.platforms import current_platform
from vllm.renderers import BaseRenderer

from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.compat import names
from vllm_vtprune.plugin.compat import server as server_compat

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "vllm_vtprune": "vllm_vtprune",
    "vllm_vtprune_server": "server",
    "vllm_vtprune_checkpoints": "checkpoints",
    "vllm_vtprune_evaluation": "evaluation",
}
COMPAT = "vllm_vtprune.plugin.compat"


# --- In one place -----------------------------------------------------------------------------------------------------


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and name[0] == "_" and name != "_" and name[:2] != "__"


def defined(tree: ast.AST) -> set[str]:
    """Private names that a module defines or assigns."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_own_class(node.value):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def of_own_class(value: ast.expr) -> bool:
    """Whether an expression is ``self``, ``cls`` or ``super()``."""
    return ast.unparse(value) in ("self", "cls", "super()")


def foreign(tree: ast.AST, everywhere: set[str]) -> Iterator[str]:
    """Private names that a module takes from somebody else.

    Args:
        tree: the module.
        everywhere: names that our classes define; of other objects, those count that the module itself defines.
    """
    here = defined(tree)
    everywhere = everywhere | here
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in (everywhere if of_own_class(node.value) else here):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom):
            for name in (*str(node.module).split("."), *(alias.name for alias in node.names)):
                if is_private(name):
                    yield f"line {node.lineno}: import of {name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value) and name.value not in here:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def trees() -> dict[Path, ast.Module]:
    files = (file for folder in FOLDERS.values() for file in (ROOT / folder).rglob("*.py"))
    return {file.relative_to(ROOT): ast.parse(file.read_text()) for file in files}


def test_private_names_of_others_are_in_compat_alone() -> None:
    modules = trees()
    own = set().union(*map(defined, modules.values())) | set(compat.PROCESSOR_HOOKS)
    hooks = {f".{name}" for name in compat.PROCESSOR_HOOKS}
    outside = [
        f"{file}, {what}"
        for file, tree in modules.items()
        if "compat" not in file.parts
        for what in foreign(tree, own)
        if not any(what.endswith(hook) for hook in hooks)
    ]
    assert outside == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(other):\n    return other._field", "other._field"),
        ("from vllm.connections import _async_retry", "import of _async_retry"),
        ("from vllm._custom_ops import swap", "import of _custom_ops"),
        ("getattr(config, '_rank', 0)", "getattr(config, '_rank', 0)"),
        ("class Sub(Base):\n    def f(self):\n        return self._kept", "self._kept"),
    ],
)
def test_a_private_name_is_seen(source: str, said: str) -> None:
    [what] = foreign(ast.parse(source), set())
    assert what.endswith(said)


def test_our_own_private_names_are_none() -> None:
    source = (
        "class Own:\n    def __init__(self):\n        self._kept = 1\ndef f(own):\n    return own._kept + own.__dict__"
    )
    assert list(foreign(ast.parse(source), set())) == []


def our_classes() -> set[type]:
    modules = []
    for package in FOLDERS:
        root = import_module(package)
        modules += [import_module(m.name) for m in pkgutil.walk_packages(root.__path__, f"{package}.")]
    return {
        value for module in modules for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    }  # fmt: skip


def test_private_methods_of_vllm_are_overridden_in_the_table_of_hooks_alone() -> None:
    """An override of a name that vLLM has given up would have no effect, so each is checked when it is imported."""
    overridden = {
        (owner.__module__, name)
        for owner in our_classes()
        for name, value in vars(owner).items()
        if is_private(name)
        and inspect.isroutine(value)
        and any(name in vars(base) for base in owner.__mro__[1:] if base.__module__.split(".")[0] == "vllm")
    }
    outside = {(module, name) for module, name in overridden if not module.startswith(COMPAT)}
    assert {name for _, name in outside} <= set(compat.PROCESSOR_HOOKS)
    assert "_get_mm_hashes" in {name for _, name in outside}


# --- Still there ------------------------------------------------------------------------------------------------------


def test_a_name_that_has_gone_is_told_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "installed_vllm", lambda: "0.34.0")
    said = r"vLLM 0\.34\.0 has no BaseMultiModalProcessor\._gone, which vllm-vtprune .* uses \(vllm_vtprune/plugin/"
    with pytest.raises(compat.VllmChanged, match=said):
        names.require(BaseMultiModalProcessor, "_get_mm_hashes", "_gone")
    with pytest.raises(compat.VllmChanged, match=r"has no SimpleNamespace\._resources"):
        server_compat.before_shutdown(SimpleNamespace(renderer=SimpleNamespace()), print)


@pytest.mark.parametrize(
    ("owner", "name", "module"),
    [
        ("vllm.multimodal.processing:BaseMultiModalProcessor", "_merge_mm_kwargs", "multimodal"),
        ("vllm.config:ParallelConfig", "_api_process_rank", "engine"),
        ("vllm.entrypoints.serve.engine.serving:BaseServing", "_get_trace_headers", "server"),
        ("vllm.connections", "_async_retry", "server"),
        ("vllm.model_executor.model_loader.default_loader:DefaultModelLoader", "get_all_weights", "loading"),
    ],
)
def test_the_import_fails_where_a_name_has_gone(
    owner: str, name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, attribute = owner.partition(":")
    place: Any = import_module(path)
    place = getattr(place, attribute) if attribute else place
    for base in getattr(place, "__mro__", (place,)):
        if name in vars(base).get("__annotations__", {}):
            monkeypatch.delitem(base.__annotations__, name)
        if name in vars(base):
            monkeypatch.delattr(base, name)
    source = Path(str(import_module(f"{COMPAT}.{module}").__file__)).read_text()
    with pytest.raises(compat.VllmChanged, match=name):
        exec(compile(source, module, "exec"), {"__name__": f"{COMPAT}.{module}"})


def test_an_api_process_and_its_platform_are_told() -> None:
    parallel = ParallelConfig(_api_process_count=3, _api_process_rank=2)
    assert compat.api_process(parallel) == (2, 3)
    assert compat.api_process(ParallelConfig(_api_process_count=3, _api_process_rank=-1)) == (0, 3)
    assert compat.platform_name() == "cpu" if current_platform.is_cpu() else "cuda"


def test_the_server_puts_itself_where_its_shutdown_is_watched() -> None:
    from vllm.entrypoints.launchers import launcher

    assert "app.state.server = server" in inspect.getsource(launcher)


# --- Still said -------------------------------------------------------------------------------------------------------


def test_ids_that_vllm_made_up_are_known() -> None:
    seen: list[ProcessorInputs] = []
    image = MultiModalDataItems({"image": ImageProcessorItems([object(), object()])})

    class Processor:
        info = SimpleNamespace(parse_mm_data=lambda data: image)

        def apply(self, inputs: ProcessorInputs, timing: object) -> None:
            seen.append(inputs)

    numbers = count(41)
    renderer: Any = SimpleNamespace(
        model_config=SimpleNamespace(multimodal_config=SimpleNamespace(mm_processor_cache_gb=0)),
        config=SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=False)),
        api_process_rank=0,
        get_mm_processor=Processor,
        _mm_req_counter=SimpleNamespace(inc=lambda by: next(numbers)),
        _mm_timing_registry=SimpleNamespace(get=str),
        _mm_processor_cache=None,
        _mm_processor_only_cache=None,
        _validate_mm_uuids=lambda *args: None,
        update_mm_cache_stats=lambda: None,
    )
    renderer._process_mm_uuids = lambda *args: BaseRenderer._process_mm_uuids(renderer, *args)
    for uuids in (None, {"image": ["mine", None]}):
        BaseRenderer._process_multimodal(renderer, [1], {"image": [1, 2]}, uuids, None)
    made_up, mixed = seen
    assert all(made_up.mm_uuid_items["image"])
    assert compat.without_synthetic_uuids(made_up).mm_uuid_items["image"] == [None, None]
    assert compat.without_synthetic_uuids(mixed).mm_uuid_items["image"] == ["mine", None]


def test_missing_data_is_recognised() -> None:
    cache: Any = SimpleNamespace(is_cached=lambda hashes: [False])
    items = MultiModalDataItems({"image": ImageProcessorItems([None])})
    processor: Any = SimpleNamespace()
    with pytest.raises(ValueError) as missing:
        BaseMultiModalProcessor._get_cache_missing_items(processor, cache, items, {"image": ["named"]})
    assert compat.says_data_is_missing(missing.value)
    assert not compat.says_data_is_missing(ValueError("size: expected two numbers"))


def test_a_lost_place_is_recognised() -> None:
    processor: Any = SimpleNamespace()
    counts: Any = {"image": 1}
    with pytest.raises(RuntimeError) as no_update:
        BaseMultiModalProcessor._validate_mm_updates(processor, {}, counts)
    with pytest.raises(RuntimeError) as no_place:
        BaseMultiModalProcessor._validate_mm_placeholders(processor, {}, counts)
    with pytest.raises(AssertionError) as no_match:
        BaseMultiModalProcessor._matched_updates_from_result(processor, {}, {"image": [None]})
    for error in (no_update, no_place, no_match):
        assert compat.lost_place_of_medium(error.value)
    assert not compat.lost_place_of_medium(RuntimeError("out of memory"))


def test_a_limit_is_told_with_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    file = BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "100")
    with pytest.raises(ValueError) as too_many:
        ImageMediaIO().load_bytes(file.getvalue())
    assert "VLLM_MAX_IMAGE_PIXELS" in (server_compat.names_setting(too_many.value) or "")
    assert not server_compat.is_too_large(too_many.value)
    with pytest.raises(ValueError) as no_image:
        ImageMediaIO().load_bytes(b"no image")
    assert server_compat.names_setting(no_image.value) is None


def test_a_file_that_is_too_large_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", "0")
    with pytest.raises(VLLMValidationError) as too_large:
        AudioMediaIO().load_bytes(b"a sound")
    assert server_compat.is_too_large(too_large.value)


def test_data_urls_are_read_by_us(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader(server_compat.ReadsDataUrls):
        def load_data_url(self, url: str, media_io: Any) -> Any:
            return "read by us", url

    url = "data:image/png;base64,AAAA"
    assert Reader().load_from_url(url, AudioMediaIO()) == ("read by us", url)
    assert asyncio.run(Reader().load_from_url_async(url, AudioMediaIO())) == ("read by us", url)
