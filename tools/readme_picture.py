"""Draws docs/report.png, the picture of README.md: the head of a report and its density, as Chromium shows them.

make demo
.venv/bin/python tools/readme_picture.py demo-report/report.html
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

PICTURE = Path(__file__).parents[1] / "docs" / "report.png"
WIDTH, HEIGHT = 900, 1600  # what is empty below is cut off
SHOWN = """<style>
nav, .facts, h2, h2 ~ *, figcaption, .modebar { display: none !important }
#density, #density + figure { display: block !important }
</style></head>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("no Chromium here")
    with tempfile.TemporaryDirectory() as folder:
        part, shot = Path(folder, "part.html"), Path(folder, "shot.png")
        part.write_text(page.read_text("utf-8").replace("</head>", SHOWN, 1), "utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/user"]
        options += ["--virtual-time-budget=5000", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}"]
        subprocess.run([browser, *options, part.as_uri()], check=True, capture_output=True, timeout=120)
        image = Image.open(shot).convert("RGB")
    empty = Image.new("RGB", image.size, image.getpixel((0, HEIGHT - 1)))
    filled = ImageChops.difference(image, empty).getbbox()
    if filled is None:
        raise SystemExit(f"nothing was drawn of {page}")
    image.crop((0, 0, WIDTH, min(filled[3] + 16, HEIGHT))).quantize(64).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
