"""Runs the demo and shows what it gives: its summary in docs/report.md, and docs/report.png, the picture of README.md.

    .venv/bin/python tools/readme_demo.py

The picture is the head of the page and its density, as Chromium shows them. Run it on a machine that does nothing else,
since the summary tells the seconds.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

DOCS = Path(__file__).parents[1] / "docs"
SUMMARY = re.compile(r"^```text\nhessfn\.problems:digits\n.*?^```", re.DOTALL | re.MULTILINE)
WIDTH, HEIGHT = 900, 1600  # what is empty below is cut off
SHOWN = """<style>
nav, .facts, h2, h2 ~ *, figcaption, .modebar { display: none !important }
#density, #density + figure { display: block !important }
</style></head>"""


def demo(folder: Path) -> str:
    """As ``make demo`` does, in the folder's ``hessfn-report``. Returns what is printed."""
    command = [sys.executable, "-m", "hessfn", "report"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def draw(page: Path, picture: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("no Chromium here")
    part, shot = page.with_name("part.html"), page.with_name("shot.png")
    part.write_text(page.read_text("utf-8").replace("</head>", SHOWN, 1), "utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={page.parent}/user",
    ]
    options += ["--virtual-time-budget=5000", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}"]
    subprocess.run([browser, *options, part.as_uri()], check=True, capture_output=True, timeout=120)
    image = Image.open(shot).convert("RGB")
    empty = Image.new("RGB", image.size, image.getpixel((0, HEIGHT - 1)))
    filled = ImageChops.difference(image, empty).getbbox()
    if filled is None:
        raise SystemExit(f"nothing was drawn of {page}")
    image.crop((0, 0, WIDTH, min(filled[3] + 16, HEIGHT))).quantize(64).save(picture, optimize=True)


def main() -> None:
    page = DOCS / "report.md"
    with tempfile.TemporaryDirectory() as folder:
        printed = demo(Path(folder))
        draw(Path(folder, "hessfn-report", "report.html"), DOCS / "report.png")
    text, num = SUMMARY.subn(lambda _: f"```text\n{printed.strip()}\n```", page.read_text("utf-8"))
    if num != 1:
        raise SystemExit(f"{page} has {num} summaries of the demo")
    page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
