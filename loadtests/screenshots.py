"""Take screenshots of the playground for docs/images, after some minutes of load.

python loadtests/screenshots.py --chromium "$(command -v chromium)"
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Literal

import httpx
from playwright.sync_api import Browser, expect, sync_playwright

from loadtests.texts import sentence

FOLDER = Path(__file__).parents[1] / "docs" / "images"
PHASE_SECONDS = 45.0


def send_load(url: str, seconds: float) -> None:
    """Send requests of every quality level, alternately at a high and a low rate."""
    end = time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=30) as client:
        while (left := end - time.monotonic()) > 0:
            busy = int(left / PHASE_SECONDS) % 2
            body = {
                "input": [sentence() for _ in range(random.choice([1, 2, 4]))],
                "quality": random.choice(["fast", "balanced", "best"]),
            }
            client.post("/classify", json=body).raise_for_status()
            time.sleep(random.expovariate(40 if busy else 8))


def save_screenshots(browser: Browser, url: str, scheme: Literal["light", "dark"]) -> None:
    """Save one screenshot of an answer and one of a comparison, in a color scheme."""
    context = browser.new_context(
        viewport={"width": 1240, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#ticks span")).not_to_have_count(0)
    page.wait_for_load_state("networkidle")
    # Classify again: the page's first answer, for its example, was slow because the browser was
    # still starting.
    page.get_by_role("button", name="Classify").click()
    answered = page.locator("#columns .says:not(:empty)")
    expect(answered).to_have_count(page.locator("#ticks span").count())
    expect(page.locator("#live-budgets rect")).not_to_have_count(0)
    page.screenshot(path=FOLDER / f"playground-{scheme}.png", full_page=True)
    page.click("#compare")
    page.screenshot(path=FOLDER / f"playground-compare-{scheme}.png", full_page=True)
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--chromium", required=True, help="path of the browser")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="seconds of load before the screenshots"
    )
    given = parser.parse_args()
    send_load(given.url, given.seconds)
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.chromium)
        save_screenshots(browser, given.url, "light")
        save_screenshots(browser, given.url, "dark")
        browser.close()


if __name__ == "__main__":
    main()
