"""Take the README's picture of the page: `python -m tools.picture`.

Serves the demo model, has a short conversation on the page, and writes docs/images/page.png. Needs
the `browser` and `serve` extras, and Chromium.
"""

import pathlib
import re
import shutil
import subprocess
import sys

from absl import app
from playwright.sync_api import Page, expect, sync_playwright

ROOT = pathlib.Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "page.png"
QUESTIONS = ["My name is Ada.", "What is the capital of France?", "What is my name?"]
WIDTH, HEIGHT = 1000, 640


def converse(page: Page) -> None:
    """Put the questions one after the other, each once the last is answered."""
    for i, question in enumerate(QUESTIONS):
        page.get_by_label("Message").fill(question)
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#turns > li")).to_have_count(i + 1, timeout=60_000)
        expect(page.locator("#stop")).to_be_hidden(timeout=60_000)


def main(_: list[str]) -> None:
    """Serve, converse and take the picture."""
    chromium = shutil.which("chromium")
    if not chromium:
        raise app.UsageError("there is no chromium on the path; install it")
    command = [sys.executable, "run.py", "serve", "--port=0"]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        url = next(m[1] for line in server.stderr if (m := re.search(r"(http://\S+?)/? ", line)))
        with sync_playwright() as playwright:
            # Its own sandbox is not to be had by root, as in a container.
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(
                viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=1.5
            )
            page.goto(url)
            expect(page.locator("#ready")).to_contain_text("Ready", timeout=60_000)
            converse(page)
            PICTURE.parent.mkdir(exist_ok=True)
            page.screenshot(path=PICTURE)
            browser.close()
    finally:
        server.terminate()
        server.wait()
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    app.run(main)
