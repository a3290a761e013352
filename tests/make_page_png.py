"""The picture of the page in the README, from a server that runs:

python -m engine.serve & python tests/make_page_png.py http://127.0.0.1:8000/ docs/page.png
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from devtools import Browser
from PIL import Image

QUESTIONS = (
    "Write a Python class Rectangle with methods for its area and its perimeter.",
    "Now a class Square that does the same.",
)
WIDTH, HEIGHT, COLORS = 1080, 950, 64


def main(url: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        browser.window(WIDTH, HEIGHT)
        browser.open(url)
        for name, value in {"temperature": "0", "max_completion_tokens": "250"}.items():
            browser.click(f"[name={name}]")
            browser.type(value)
        for question in QUESTIONS:
            browser.click("#question")
            browser.type(question)
            browser.press("Enter")
            browser.wait("document.querySelector('article:last-of-type').ariaBusy === 'false'")
        browser.screenshot(path, WIDTH, HEIGHT, scale=2)
        browser.close()
    # Few colours: text on plain grounds needs no more, and the file is a third.
    image = Image.open(path).convert("RGB")
    image.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
