"""The page at `/` in a real browser: pictures, sliders, answers, errors, keyboard, phones."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect

from tests.support.browser import chromium
from tests.support.chat import Server, url_of, user
from vllm_vtprune_server.playground import PAGE, POLICY

pytestmark = pytest.mark.engine

WIDE, PHONE = {"width": 1200, "height": 900}, {"width": 375, "height": 667}
QUESTION = "Where is the dog?"
PLAN, CHAT = "/v1/pruning/plan", "/v1/chat/completions"
DARK = (20, 60, 120)
DROP = """
({data, name, type}) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type}));
  for (const kind of ["dragover", "drop"])
    document.body.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
}
"""
# in the page, because an answer may end before a click from here arrives
STOP_AT_FIRST_WORD = """
() => new MutationObserver(([{target}]) => {
  if (target.textContent) document.getElementById("stop").click();
}).observe(document.querySelector(".answer"), {childList: true})
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@contextmanager
def opened(browser: Browser, server: Server, path: str | None = "/", **options: Any) -> Iterator[Page]:
    """A page, which must not complain and must not ask any other server; blank at first without a path."""
    context = browser.new_context(**{"viewport": WIDE, **options})
    context.set_default_timeout(60_000)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if foreign(request.url, server) else None)
    if path is not None:
        page.goto(f"{server.url}{path}")
    yield page
    context.close()
    refused = "Failed to load resource: the server responded with a status of 40"  # shown on the page
    assert [text for text in complaints if not text.startswith(refused)] == []


def foreign(url: str, server: Server) -> bool:
    return not url.startswith(("data:", "blob:", server.url))


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with opened(browser, server) as page:
        yield page


def side(page: Page, name: str) -> Locator:
    return page.get_by_role("region", name=name, exact=True)


def drop(page: Page, picture: Image.Image) -> str:
    """Drop a picture on the page; its data URL."""
    url = url_of(picture)
    page.evaluate(DROP, {"data": url.partition(",")[2], "name": "dropped.png", "type": "image/png"})
    expect(page.locator("#picture")).to_have_text(f"dropped.png, {picture.width} × {picture.height} pixels")
    return url


def expect_kept(page: Page, name: str, count: int) -> None:
    expect(side(page, name).locator(".caption")).to_contain_text(f"{count} of 576 tokens kept.", timeout=60_000)
    expect(side(page, name)).not_to_have_attribute("aria-busy", "true")


def drawn(page: Page, name: str, rows: int = 24, columns: int = 24) -> list[int]:
    """The cells of a dark picture that are not faded."""
    image = Image.open(io.BytesIO(side(page, name).get_by_role("img").screenshot())).convert("L")
    width, height = image.width / columns, image.height / rows
    centres = [
        (round((column + 0.5) * width), round((row + 0.5) * height)) for row in range(rows) for column in range(columns)
    ]
    return [cell for cell, centre in enumerate(centres) if image.getpixel(centre) < 128]  # type: ignore[operator]


def facts(page: Page, name: str) -> dict[str, str]:
    rows = side(page, name).locator("dl > div").all()
    return {row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in rows}


def test_a_picture_is_dropped_the_slider_moved_and_both_answers_read(page: Page, server: Server) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path))
    logged = len(server.log.read_text())
    url = drop(page, Image.new("RGB", (336, 336), DARK))
    page.get_by_role("textbox", name="Question").fill(QUESTION)
    expect_kept(page, "A", 576)
    expect_kept(page, "B", 63)
    before = drawn(page, "B")
    assert len(before) == 63

    slider = side(page, "B").get_by_role("slider")
    for percent in ("80", "40", "25"):  # each replaces the one before
        slider.fill(percent)
    expect_kept(page, "B", 144)
    policy = {"method": "resprune", "budget": {"type": "ratio", "keep": 0.25}}
    planned = server.post({"messages": [user(QUESTION, url)], "pruning": policy}, PLAN).json()["pruning"]["images"][0]
    kept = [index for start, length in planned["kept"]["runs"] for index in range(start, start + length)]
    assert drawn(page, "B") == kept, "what is drawn is what the server keeps"
    assert drawn(page, "A") == list(range(576))
    assert PLAN in asked
    assert CHAT not in asked

    page.get_by_label("at most").fill("12")
    page.get_by_role("button", name="Ask both").click()
    for name, pruning in (("A", "off"), ("B", policy)):
        answer = server.ask(messages=[user(QUESTION, url)], pruning=pruning, max_tokens=12)
        expect(side(page, name).locator(".answer")).to_have_text(answer["choices"][0]["message"]["content"].strip())
        expect(side(page, name).locator("[data-fact=total]")).to_contain_text("ms")
        shown = facts(page, name)
        count = answer["pruning"]["images"][0]["kept_tokens"]
        assert shown["Visual tokens"] == f"{count} / 576"
        assert shown["Prompt tokens"] == str(answer["usage"]["prompt_tokens"])
        first, total = (int(shown[key].removesuffix(" ms")) for key in ("First token", "Total"))
        assert 0 < first <= total
    assert asked.count(CHAT) == 2
    assert drawn(page, "B") == kept

    slider.fill("50")
    expect_kept(page, "B", 288)
    expect(side(page, "B").locator(".answer")).to_be_empty()
    assert asked.count(CHAT) == 2
    assert "Traceback" not in server.log.read_text()[logged:], "plans that were replaced are no errors"


def test_presets_methods_and_the_part_that_the_encoder_sees(page: Page) -> None:
    drop(page, Image.new("RGB", (672, 336), DARK))
    policy = side(page, "A").get_by_role("combobox", name="Policy")
    expect(side(page, "A").get_by_role("slider")).to_be_hidden()
    policy.select_option("thumbnail")  # a preset of this server's operator
    expect_kept(page, "A", 24)
    policy.select_option("last")
    side(page, "A").get_by_role("slider").fill("50")
    expect_kept(page, "A", 288)
    # the lower half of the centre square; a column of the drawing is a 48th of its width
    lower = [row * 48 + column for row in range(12, 24) for column in range(12, 36)]
    assert [cell for cell in drawn(page, "A", 24, 48) if 12 <= cell % 48 < 36] == lower
    offered = policy.locator("option").all_inner_texts()
    assert "off (unpruned)" in offered
    assert "resize" not in offered, "this model's encoder has a fixed resolution"


def test_pasted_and_chosen_pictures(page: Page) -> None:
    paste = DROP.replace('["dragover", "drop"]', '["paste"]').replace("DragEvent", "ClipboardEvent")
    data = url_of(Image.new("RGB", (40, 30), DARK)).partition(",")[2]
    page.evaluate(paste.replace("dataTransfer:", "clipboardData:"), {"data": data, "name": "a", "type": "image/png"})
    expect(page.locator("#picture")).to_have_text("The pasted picture, 40 × 30 pixels")
    file = {"name": "chosen.png", "mimeType": "image/png", "buffer": base64.b64decode(data)}
    page.get_by_label("Choose a picture").set_input_files(file)  # type: ignore[arg-type]
    expect(page.locator("#picture")).to_have_text("chosen.png, 40 × 30 pixels")
    page.get_by_role("button", name="an astronaut").click()
    expect(page.locator("#picture")).to_have_text("an astronaut, 512 × 512 pixels")
    expect(page.get_by_role("textbox", name="Question")).to_have_value(
        "What is the astronaut wearing, and what is behind her?"
    )
    broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"no picture"}
    page.get_by_label("Choose a picture").set_input_files(broken)  # type: ignore[arg-type]
    expect(page.get_by_role("alert").first).to_have_text("broken.png is not a picture that this browser shows.")


def test_what_the_server_refuses_is_shown(page: Page) -> None:
    page.get_by_role("textbox", name="Question").fill("What is <image>?")
    for name in "AB":
        problem = side(page, name).get_by_role("alert")
        expect(problem).to_contain_text("400: messages.0.content.1.text: '<image>' is a placeholder token")
    page.get_by_role("textbox", name="Question").fill(QUESTION)
    expect_kept(page, "B", 63)
    expect(side(page, "B").locator(".problem")).to_be_hidden()


def test_stop(page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path))
    expect_kept(page, "B", 63)
    page.get_by_label("at most").fill("1000")
    page.get_by_label("one after the other").check()
    page.evaluate(STOP_AT_FIRST_WORD)
    page.get_by_role("button", name="Ask both").click()
    expect(side(page, "A").locator(".answer")).not_to_be_empty()
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    assert facts(page, "A")["Total"] == "–"
    assert asked.count(CHAT) == 1


def test_everything_is_reached_and_used_by_keyboard(page: Page) -> None:
    expect_kept(page, "B", 63)
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
              const at = document.activeElement;
              if (at === document.body) return ["", ""];
              const shown = at.id === "file" ? document.querySelector("label[for=file]") : at;
              const section = at.closest("section")?.getAttribute("aria-labelledby");
              return [`${at.id || at.innerText} of ${section}`, getComputedStyle(shown).outlineStyle];
            }"""
        )
        if name in reached or not outline:
            break
        reached.append(name)
        assert outline == "solid", f"{name} shows no focus"
    focusable = page.locator("summary, input, button:not([disabled]), textarea, select, a").filter(visible=True).count()
    assert focusable == len(reached), reached
    slider = side(page, "B").get_by_role("slider")
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect_kept(page, "B", 69)
    page.get_by_label("at most").fill("4")
    page.get_by_label("at most").press("Enter")
    expect(side(page, "B").locator("[data-fact=total]")).to_contain_text("ms")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_it_is_accessible_and_fits(browser: Browser, server: Server, viewport: Any, scheme: Any) -> None:
    with opened(browser, server, viewport=viewport, color_scheme=scheme) as page:
        page.get_by_text("API key", exact=True).click()
        expect_kept(page, "B", 63)
        page.get_by_label("at most").fill("4")
        page.get_by_role("button", name="Ask both").click()
        for name in "AB":
            expect(side(page, name).locator("[data-fact=total]")).to_contain_text("ms")
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        violations = Axe().run(page).response["violations"]
        assert [(violation["id"], violation["impact"], violation["nodes"][0]["html"]) for violation in violations] == []


def test_a_server_with_a_key(browser: Browser, server: Server) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": "Unauthorized"})

    with opened(browser, server, None) as page:
        page.route(f"{server.url}/v1/**", guard)
        page.goto(f"{server.url}/")
        expect(page.locator("#server")).to_have_text("401: Unauthorized")
        page.get_by_label("Key of the server").fill("secret")
        page.get_by_label("Key of the server").press("Tab")
        expect_kept(page, "B", 63)
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_below_a_path_of_a_proxy(browser: Browser, server: Server) -> None:
    below = f"{server.url}/some/where"
    with opened(browser, server, None) as page:
        page.route(
            f"{below}/**",
            lambda route: route.fulfill(response=route.fetch(url=route.request.url.replace(below, server.url))),
        )
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{below}/")
        expect_kept(page, "B", 63)
        assert [url for url in asked if not url.startswith((below, "blob:"))] == []


def test_a_server_that_selects_in_its_engine(browser: Browser, server: Server) -> None:
    """Nothing can be drawn there, and answers come as ever."""

    def engine(route: Route) -> None:
        route.fulfill(json={**route.fetch().json(), "placement": "engine"})

    with opened(browser, server, None) as page:
        page.route(f"{server.url}/v1/pruning", engine)
        page.route(f"{server.url}{PLAN}", lambda route: pytest.fail("a plan was asked for"))
        page.goto(f"{server.url}/")
        expect(page.locator("#server")).to_contain_text("This server selects tokens in its engine")
        page.get_by_label("at most").fill("4")
        page.get_by_role("button", name="Ask both").click()
        expect_kept(page, "B", 63)


def test_what_is_served(server: Server) -> None:
    for path in ["/", *(f"/playground/{file.name}" for file in PAGE.iterdir() if file.name != "index.html")]:
        response = server.get(path)
        assert response.headers["content-security-policy"] == POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in POLICY
    page = server.get("/").text
    assert "://" not in page
    assert "style=" not in page
    assert "/" not in server.get("/openapi.json").json()["paths"]


def test_the_documentation_works_without_other_servers(browser: Browser, server: Server) -> None:
    document = server.get("/openapi.json").json()
    assert document["info"]["title"] == "vLLM with vllm-vtprune"
    with opened(browser, server, "/docs") as page:
        assert page.title() == "vLLM with vllm-vtprune - Swagger UI"
        expect(page.get_by_text(CHAT, exact=True)).to_be_visible()
