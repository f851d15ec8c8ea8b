"""The page of `demix serve` in a real browser, without a display."""

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from edits import make_run
from serving import Server

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no Chromium here: apt-get install chromium chromium-driver"
)
EXPERTS = ("law", "med", "code")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    workdir = make_run(tmp_path_factory.mktemp("served") / "run", EXPERTS, context=128)
    made = Server(workdir, "--nowarm_up")
    yield made
    assert made.end()[0] == 0


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


class Page:
    """The page, opened anew in a window of some size and colours."""

    def __init__(self, browser: Any, server: Server, width: int = 1200, scheme: str = "light"):
        self._browser = browser
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(f"http://127.0.0.1:{server.port}/")
        self.until(lambda: self.all("#experts input"))

    def all(self, selector: str) -> list[Any]:
        return self._browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> Any:
        return self._browser.find_element(By.CSS_SELECTOR, selector)

    def until(self, happened: Callable[[], Any]) -> Any:
        return WebDriverWait(self._browser, 60, poll_frequency=0.05).until(lambda _: happened())

    def fill(self, selector: str, text: str) -> None:
        self.one(selector).clear()
        self.one(selector).send_keys(text)

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self._browser).send_keys(*keys).perform()

    def press_with_control(self, key: str) -> None:
        keys = webdriver.ActionChains(self._browser).key_down(Keys.CONTROL).send_keys(key)
        keys.key_up(Keys.CONTROL).perform()

    def run(self, script: str) -> Any:
        return self._browser.execute_script(script)

    def finished(self) -> str:
        """Returns the status when a text is complete."""
        self.until(lambda: " tokens in " in self.one("#status").text or self.one("#error").text)
        return self.one("#status").text

    def complaints(self) -> list[Any]:
        """Returns what the browser's console has, such as breaches of the policy."""
        return self._browser.get_log("browser")


def tokens(page: Page) -> list[tuple[str, str, str]]:
    """Returns text, most probable expert and background of each token."""
    return page.run(
        "return [...document.querySelectorAll('#text span')].map((s) => "
        "[s.textContent, s.dataset.expert, getComputedStyle(s).backgroundColor])"
    )


def bars(page: Page) -> dict[str, str]:
    return dict(
        page.run(
            "return [...document.querySelectorAll('#bars li')].map((row) => "
            "[row.dataset.name, row.querySelector('.share').textContent])"
        )
    )


def test_text_streams_in_the_colours_of_the_chosen_experts(browser, server):
    page = Page(browser, server)
    assert set(bars(page)) == set(EXPERTS)
    page.fill("#prompt", "court dose <b>x</b>")
    page.fill("#max_tokens", "30")
    page.fill("#seed", "1")
    page.one("#experts input[value=code]").click()
    page.one("#go").click()
    assert page.finished().startswith("30 tokens in ")
    found = tokens(page)
    prompt = "court dose <b>x</b>"
    assert "".join(text for text, _, _ in found).startswith(prompt)
    assert not page.all("#text b")  # text of a model is text
    assert {expert for _, expert, _ in found} <= {"law", "med"}
    colors = {(expert, color) for _, expert, color in found}
    assert len({color for _, color in colors}) == len({expert for expert, _ in colors})
    assert set(bars(page)) == {"law", "med"}
    asked = {"model": "demix", "prompt": prompt, "max_tokens": 30, "seed": 1, "temperature": 0.7}
    choice = server.complete(**asked, demix={"experts": ["law", "med"]})["choices"][0]
    assert "".join(text for text, _, _ in found[len(prompt) :]) == choice["text"]
    last = choice["demix"]["posterior"][-1]
    page.until(
        lambda: (
            [*bars(page).values()]
            == ["<1 %" if 0 < w < 0.01 else f"{int(w * 100 + 0.5)} %" for w in last]
        )
    )
    assert page.complaints() == []


def test_everything_can_be_done_from_the_keyboard(browser, server):
    page = Page(browser, server)
    page.press(Keys.TAB)
    assert page.run("return document.activeElement.id") == "prompt"
    page.press_with_control("a")
    page.press("dose")
    page.press(Keys.TAB, Keys.SPACE)  # the first expert
    assert not page.one("#experts input[value=law]").is_selected()
    page.press_with_control(Keys.ENTER)
    page.finished()
    while page.run("return document.activeElement.id") != "text":
        page.press(Keys.TAB)
    outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    page.press(Keys.ARROW_RIGHT)
    page.press(Keys.ARROW_RIGHT)
    assert page.one("#which").text == "before o, token 2 of the prompt"
    page.press(Keys.END)
    assert f"token {len(tokens(page))}" in page.one("#which").text
    page.press(Keys.HOME)
    assert page.one("#which").text.startswith("before d, token 1 ")
    assert bars(page) == {"med": "50 %", "code": "50 %"}


def test_pointing_at_a_token_shows_its_weights(browser, server):
    page = Page(browser, server)
    page.one("#go").click()
    page.finished()
    webdriver.ActionChains(browser).move_to_element(page.all("#text span")[0]).perform()
    page.until(lambda: page.one("#which").text == "before d, token 1 of the prompt")
    assert set(bars(page).values()) == {"33 %"}


def test_escape_stops_and_the_server_is_free(browser, server):
    page = Page(browser, server)
    before = server.until_idle()["generated_tokens"]
    page.fill("#prompt", "a")
    page.fill("#max_tokens", "120")
    page.run(
        "new MutationObserver(() => { if (tokens.length > 3) running?.abort(); })"
        ".observe(text, { childList: true })"
    )
    page.one("#go").click()
    page.until(lambda: page.one("#status").text.startswith("stopped after "))
    assert page.one("#go").is_enabled()
    assert server.until_idle()["generated_tokens"] - before <= 120


def test_errors_are_told(browser, server):
    page = Page(browser, server)
    for box in page.all("#experts input"):
        box.click()
    page.one("#go").click()
    page.until(lambda: page.one("#error").text == "tick one expert or more")
    page.all("#experts input")[0].click()
    page.fill("#prompt", "x" * 140)
    page.one("#go").click()
    page.until(lambda: page.one("#error").text.startswith("the prompt has 141 tokens"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_sideways_and_contrast_is_enough(browser, server, scheme):
    page = Page(browser, server, width=360, scheme=scheme)
    page.fill("#prompt", "w" * 40)
    page.fill("#max_tokens", "20")
    page.one("#go").click()
    page.finished()
    assert page.run("return document.documentElement.scrollWidth") <= 360
    small = page.run(
        "return [...document.querySelectorAll('button, .experts label')]"
        ".filter((e) => e.offsetHeight < 36).map((e) => e.outerHTML)"
    )
    assert not small  # fingers
    for selector, behind in (
        ("#text span", "#text span"), ("label", ".experts label"), ("#status", "section"),
        ("#go", "#go"), (".hint", "section"), ("header p", "body"), ("#which", "section"),
    ):  # fmt: skip
        ink = color(page, selector, "color")
        assert contrast(ink, color(page, behind, "backgroundColor")) >= 4.5, selector
    light = luminance(color(page, "body", "backgroundColor")) > 0.5
    assert light == (scheme == "light")


def color(page: Page, selector: str, which: str) -> tuple[float, ...]:
    """Returns red, green and blue, 0 to 1, of the first element."""
    found = page.run(f"return getComputedStyle(document.querySelector({selector!r})).{which}")
    numbers = found[found.index("(") + 1 : -1].replace(",", " ").split()
    return tuple(float(value) / 255 for value in numbers[:3])


def luminance(rgb: tuple[float, ...]) -> float:
    """Returns the relative luminance as WCAG 2.1 defines it."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Returns the contrast ratio as WCAG 2.1 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_server_with_a_key_asks_for_it(browser, tmp_path):
    workdir = make_run(tmp_path / "run", ("law", "med"), context=32)
    key = tmp_path / "key"
    key.write_text("s3cret-of-16-bytes")
    key.chmod(0o600)
    server = Server(workdir, f"--api_key_file={key}", "--nowarm_up", key="s3cret-of-16-bytes")
    try:
        browser.get(f"http://127.0.0.1:{server.port}/")
        end = time.monotonic() + 30
        while not (field := browser.find_element(By.ID, "key")).is_displayed():
            assert time.monotonic() < end
        field.send_keys("s3cret-of-16-bytes", Keys.TAB)
        while not browser.find_elements(By.CSS_SELECTOR, "#experts input"):
            assert time.monotonic() < end
    finally:
        server.process.kill()
