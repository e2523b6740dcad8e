"""What we touch of vLLM that is not public: names that are checked, and sentences of vLLM's that it still says.

`tests/test_vllm_versions.py` runs this file with the newest vLLM too.
"""

from __future__ import annotations

import asyncio
import inspect
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

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

COMPAT = "vllm_vtprune.plugin.compat"


# --- Still there ------------------------------------------------------------------------------------------------------


def test_a_name_that_has_gone_is_told_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "installed_vllm", lambda: "0.34.0")
    message = r"vLLM 0\.34\.0 has no BaseMultiModalProcessor\._gone, which vllm-vtprune .* uses \(vllm_vtprune/plugin/"
    with pytest.raises(compat.VllmChanged, match=message):
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
    source = Path(str(import_module(f"{COMPAT}.{module}").__file__)).read_text()
    path, _, attribute = owner.partition(":")
    place: Any = import_module(path)
    place = getattr(place, attribute) if attribute else place
    for base in getattr(place, "__mro__", (place,)):
        if name in vars(base).get("__annotations__", {}):
            monkeypatch.delitem(base.__annotations__, name)
        if name in vars(base):
            monkeypatch.delattr(base, name)
    with pytest.raises(compat.VllmChanged, match=name):
        exec(compile(source, module, "exec"), {"__name__": f"{COMPAT}.{module}"})


def test_an_api_process_and_its_platform_are_told() -> None:
    parallel = ParallelConfig(_api_process_count=3, _api_process_rank=2)
    assert compat.api_process(parallel) == (2, 3)
    assert compat.api_process(ParallelConfig(_api_process_count=3, _api_process_rank=-1)) == (0, 3)
    assert compat.platform_name(current_platform) == "cpu" if current_platform.is_cpu() else "cuda"


def test_the_server_puts_itself_where_its_shutdown_is_watched() -> None:
    from vllm.entrypoints.launchers import launcher

    assert "app.state.server = server" in inspect.getsource(launcher)


def test_the_program_that_is_warned_of_ignored_policies_is_there() -> None:
    assert find_spec("vllm.entrypoints.cli.main") is not None  # as `vllm_vtprune.plugin.unserved` knows it


# --- Still said -------------------------------------------------------------------------------------------------------


def test_ids_that_vllm_made_up_are_known() -> None:
    seen: list[ProcessorInputs] = []
    image = MultiModalDataItems({"image": ImageProcessorItems([object(), object()])})

    class Processor:
        info = SimpleNamespace(parse_mm_data=lambda data: image)

        def apply(self, inputs: ProcessorInputs, timing: object) -> None:
            seen.append(inputs)

    numbers = count(41)
    renderer: Any = MagicMock(
        model_config=SimpleNamespace(multimodal_config=SimpleNamespace(mm_processor_cache_gb=0)),
        config=SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=False)),
        api_process_rank=0,
        get_mm_processor=Processor,
        _mm_req_counter=SimpleNamespace(inc=lambda by: next(numbers)),
    )
    renderer._process_mm_uuids = lambda *args: BaseRenderer._process_mm_uuids(renderer, *args)
    for uuids in (None, {"image": ["mine", None]}):
        BaseRenderer._process_multimodal(renderer, [1], {"image": [1, 2]}, uuids, None)
    made_up, mixed = seen
    assert all(made_up.mm_uuid_items["image"])
    assert compat.without_synthetic_uuids(made_up).mm_uuid_items["image"] == [None, None]
    assert compat.without_synthetic_uuids(mixed).mm_uuid_items["image"] == ["mine", None]


def test_missing_data_is_recognised() -> None:
    cache: Any = SimpleNamespace(is_cached=lambda hashes: [False] * len(hashes))
    items = MultiModalDataItems({"image": ImageProcessorItems([Image.new("RGB", (8, 8)), None])})
    processor: Any = SimpleNamespace()
    with pytest.raises(ValueError) as missing:
        BaseMultiModalProcessor._get_cache_missing_items(processor, cache, items, {"image": ["new", "named"]})
    assert compat.missing_item(missing.value) == ("image", 1)
    assert compat.missing_item(ValueError("size: expected two numbers")) is None


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
        assert compat.placeholder_is_missing(error.value)
    assert not compat.placeholder_is_missing(RuntimeError("out of memory"))


def test_a_limit_is_told_with_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    file = BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "100")
    with pytest.raises(ValueError) as too_many:
        ImageMediaIO().load_bytes(file.getvalue())
    assert "VLLM_MAX_IMAGE_PIXELS" in (server_compat.limit_message(too_many.value) or "")
    assert not server_compat.is_too_large(too_many.value)
    with pytest.raises(ValueError) as no_image:
        ImageMediaIO().load_bytes(b"no image")
    assert server_compat.limit_message(no_image.value) is None


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
