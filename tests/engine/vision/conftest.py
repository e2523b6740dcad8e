"""Every family with a tiny checkpoint, and the processor that a server has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests.engine.vision.references import ROWS, Row, write
from tests.support.processors import config_of


@pytest.fixture(scope="module", params=ROWS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def row(family: str) -> Row:
    return ROWS[family]


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(family, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def model_config(checkpoint: Path) -> Any:
    return config_of(checkpoint)


@pytest.fixture(scope="module")
def processor(model_config: Any) -> Any:
    return MULTIMODAL_REGISTRY.create_processor(model_config)
