"""Pages in a real browser (headless Chromium), with checks of layout, contrast, errors and requests."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Dialog, Page, sync_playwright

Scheme = Literal["light", "dark"]
PHONE, DESKTOP = (390, 844), (1280, 900)
# WCAG 2, AA, for text of usual size.
LEAST_CONTRAST = 4.5

# The contrast of each text with its background: [ratio, text].
_CONTRASTS = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = channels(colour).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if ((channels(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, text = texts.currentNode.data.trim();
    if (!text || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const [a, b] = [luminance(element.closest("svg") ? style.fill : style.color), luminance(behind(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text]);
  }
  return found;
}"""

_LEGENDS = """() => [...document.querySelectorAll(".key i")].filter((key) => {
  const canvas = key.closest("figure")?.querySelector("canvas");
  const channels = getComputedStyle(key).borderTopColor.match(/\\d+/g).map(Number);
  if (!canvas) {
    const parts = [...document.querySelectorAll(".shares div")].map((part) => getComputedStyle(part).backgroundColor);
    return !parts.includes(getComputedStyle(key).borderTopColor);
  }
  const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < data.length; at += 4) {
    if (data[at + 3] > 128 && channels.every((value, place) => Math.abs(value - data[at + place]) < 24)) return false;
  }
  return true;
}).length"""

# Charts follow the width of the window in a ResizeObserver, which runs when the next frame is drawn.
_DRAWN_AT = """async ([width, height]) => {
  for (let frame = 0; frame < 2; frame += 1) await new Promise(requestAnimationFrame);
  return innerWidth === width && innerHeight === height;
}"""


@dataclass
class Shown:
    """An open page, with the errors and requests that the browser recorded."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def record_dialog(self, dialog: Dialog) -> None:
        """Record a dialog as an error, because no page may open one."""
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def texts(self) -> str:
        return " ".join(self.page.inner_text("main").split())

    def overflow_pixels(self) -> int:
        """The width of the content outside the window, in pixels."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")

    def low_contrast_texts(self) -> list[str]:
        """Texts with too little contrast to their background."""
        found: list[tuple[float, str]] = self.page.evaluate(_CONTRASTS)
        assert found
        return [f"{text}: {ratio:.1f}" for ratio, text in found if ratio < LEAST_CONTRAST]

    def legends_without_a_curve(self) -> int:
        """The number of legend entries whose colour the figure does not use."""
        return self.page.evaluate(_LEGENDS)

    def background_brightness(self) -> float:
        """The brightness of the page background, from 0 to 255."""
        colour: str = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3

    def requests_to_other_hosts(self) -> list[str]:
        """The requests to other addresses than the page's own server."""
        own = urlsplit(self.page.url).netloc
        return [url for url in self.fetched if not url.startswith("data:") and urlsplit(url).netloc != own]

    def set_appearance(self, size: tuple[int, int], scheme: Scheme) -> None:
        """Set the size of the window and the preferred colour scheme, and wait until the page is drawn with them."""
        self.page.set_viewport_size({"width": size[0], "height": size[1]})
        self.page.emulate_media(color_scheme=scheme)
        self.page.wait_for_function(_DRAWN_AT, arg=list(size))


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Launch the installed Chromium."""
    executable = shutil.which("chromium")
    assert executable, "Chromium is missing; as root: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def shown(browser: Browser, url: str) -> Iterator[Shown]:
    """Open a page in its own window."""
    page = browser.new_page()
    seen = Shown(page)
    page.on("console", lambda message: seen.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("dialog", seen.record_dialog)
    page.on("request", lambda request: seen.fetched.append(request.url))
    page.set_default_timeout(20_000)
    page.goto(url)
    try:
        yield seen
    finally:
        page.close()
