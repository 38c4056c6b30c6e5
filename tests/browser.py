"""Debian's chromium, without a screen: what the tests of pages look with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MARKS = [
    pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="needs chromium and chromium-driver: apt-get install them"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium's sockets
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


@contextmanager
def chromium(profile: Path, *flags: str, seconds: int = 30) -> Iterator[Any]:
    """A browser that is closed at the end; a script of it may take so many seconds."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), *flags, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(seconds)
    try:
        yield driver
    finally:
        driver.quit()
