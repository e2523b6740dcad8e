"""Take the playground's pictures of the documentation: ``python -m scripts.playground_pictures``.

Serves the demo model, asks about the page's own scene in a headless Chromium, and writes into docs/images.
"""

from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, expect

from tests.support.browser import chromium
from vllm_vtprune_server.process import running_server

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PICTURES = {
    "playground.png": {"viewport": {"width": 1000, "height": 800}},
    "playground-phone.png": {"viewport": {"width": 375, "height": 800}, "is_mobile": True},
}


def take(browser: Browser, url: str, file: Path, **options: object) -> None:
    """A picture of the whole page after both answers; ``options`` are those of the browser's context."""
    context = browser.new_context(**options)  # type: ignore[arg-type]
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto(url)
    expect(page.locator(".caption").nth(1)).to_contain_text("63 of 576", timeout=120_000)
    page.get_by_label("one after the other").check()
    for _ in range(2):  # what the first request starts is no part of the picture
        page.get_by_role("button", name="Ask both").click()
        expect(page.get_by_role("button", name="Stop")).to_be_enabled()
        expect(page.get_by_role("button", name="Stop")).to_be_disabled(timeout=120_000)
    for answer in page.locator(".answer").all():
        expect(answer).to_have_text("orange")
    picture = Image.open(BytesIO(page.screenshot(full_page=True)))
    picture.convert("RGB").quantize(256).save(file, optimize=True)  # a third of the bytes
    context.close()


if __name__ == "__main__":
    with running_server(["--enforce-eager", "--max-model-len", "4096"]) as url, chromium() as browser:
        for name, options in PICTURES.items():
            take(browser, url, IMAGES / name, **options)
