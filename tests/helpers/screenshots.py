"""python -m tests.helpers.screenshots RUN_DIR: the README's pictures of a run's report, into docs/images.

Palettes keep the files small: a page has few colors.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image

from launch.environment import ROOT

# Name, width and height of the window, color scheme, and the element that is to be at its top.
PICTURES = (
    ("report", 1280, 1000, "light", "header"),
    ("report-training-dark", 1280, 800, "dark", "section:has(#training)"),
    ("report-phone", 390, 844, "light", "header"),
)


def main(run_dir: Path) -> None:
    from playwright.sync_api import sync_playwright

    page_file = (run_dir / "report" / "index.html").resolve()
    folder = ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        # As root Chromium has no sandbox to start.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, width, height, scheme, top in PICTURES:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(page_file.as_uri())
            page.locator(top).first.evaluate("element => scrollTo(0, element.offsetTop - 60)")
            picture = folder / f"{name}.png"
            page.screenshot(path=picture)
            Image.open(picture).convert("RGB").quantize(128).save(picture, optimize=True)
            print(f"{picture.relative_to(ROOT)}: {picture.stat().st_size / 1024:.0f} KiB")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
