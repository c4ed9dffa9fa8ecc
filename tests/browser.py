"""For the tests of reports: a headless Chromium that is driven as a reader would use it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """A driver with a fresh profile; the test is skipped on machines that have no Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not CHROMIUM or not DRIVER:
        pytest.skip("there is no chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: Any, page: Path, width: int = 1280, theme: str = "light") -> None:
    """Opens a page in a window of some width, with a reader's theme; earlier logs are dropped."""
    media = [{"name": "prefers-color-scheme", "value": theme}]
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": media})
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    driver.get(page.as_uri())


def requests(driver: Any) -> list[str]:
    """The addresses that were asked for since the page was opened; `data:` is none."""
    events = [json.loads(line["message"])["message"] for line in driver.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # the browser's own start page may still have been loading
    ours = [one for one in sent if not one["documentURL"].startswith("chrome://")]
    return [u for one in ours if not (u := one["request"]["url"]).startswith("data:")]
