"""A headless Chromium."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """That of the environment (scripts/setup.sh), or one on the PATH."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    program = next(filter(None, (shutil.which(name, path=path) for name in NAMES)), None)
    assert program is not None, f"none of {', '.join(NAMES)} is on the PATH; `make setup` fetches Debian's"
    with sync_playwright() as playwright:
        # Chromium's sandbox does not work for root
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"] * (os.getuid() == 0))
        yield browser
        browser.close()
