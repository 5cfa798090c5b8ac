"""
Open WebUI in a real browser: it loads, the administrator signs in, the audio page shows our server.

SOTTOVOCE_WEBUI_URL        base URL, for example http://10.120.0.2:3000
SOTTOVOCE_WEBUI_EMAIL      administrator, default admin@localhost
SOTTOVOCE_WEBUI_PASSWORD   its password (in the instance: /etc/sottovoce/open-webui-admin.json)
SOTTOVOCE_WEBUI_STT_URL    what the audio page has to show

Screenshots are kept under artifacts/.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/support"))

selenium = pytest.importorskip("selenium", reason="selenium is not installed")
import browser
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ARTIFACTS = ROOT / "artifacts"
NEEDED = ("SOTTOVOCE_WEBUI_URL", "SOTTOVOCE_WEBUI_PASSWORD", "SOTTOVOCE_WEBUI_STT_URL")


def wait(driver: Chrome, what: str, condition: Callable[[Chrome], Any], seconds: float = 60) -> Any:
    return WebDriverWait(
        driver, seconds, poll_frequency=0.3, ignored_exceptions=[StaleElementReferenceException]
    ).until(condition, f"{what} did not appear in {seconds:.0f} s")


def screenshot(driver: Chrome, name: str) -> None:
    ARTIFACTS.mkdir(exist_ok=True)
    driver.save_screenshot(str(ARTIFACTS / f"{name}.png"))


def values(driver: Chrome) -> list[str]:
    return [str(field.get_property("value")) for field in driver.find_elements(By.TAG_NAME, "input")]


@pytest.fixture
def driver() -> Iterator[Chrome]:
    unset = [name for name in NEEDED if not os.environ.get(name)]
    if unset:
        pytest.skip(f"no Open WebUI to look at: {', '.join(unset)} not set")
    if browser.missing():
        pytest.skip(browser.missing())
    with browser.chromium() as made:
        try:
            yield made
        finally:
            try:
                screenshot(made, "open-webui-last")
            except WebDriverException as error:
                print(f"no last screenshot: {error.msg}")


def sign_in(driver: Chrome, base: str) -> None:
    driver.get(f"{base}/auth")
    email = wait(
        driver, "the sign-in form", lambda d: d.find_element(By.CSS_SELECTOR, "input[type=email], #email")
    )
    screenshot(driver, "open-webui-sign-in")
    email.send_keys(os.environ.get("SOTTOVOCE_WEBUI_EMAIL", "admin@localhost"))
    driver.find_element(By.CSS_SELECTOR, "input[type=password]").send_keys(
        os.environ["SOTTOVOCE_WEBUI_PASSWORD"]
    )
    driver.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
    wait(driver, "the page after signing in", lambda d: "/auth" not in d.current_url)
    wait(driver, "the session", lambda d: d.execute_script("return localStorage.token"))


def test_the_audio_page_shows_our_server(driver: Chrome) -> None:
    base, expected = os.environ["SOTTOVOCE_WEBUI_URL"].rstrip("/"), os.environ["SOTTOVOCE_WEBUI_STT_URL"]
    sign_in(driver, base)
    driver.get(f"{base}/admin/settings/audio")
    wait(driver, f"a field with {expected}", lambda d: expected.rstrip("/") in values(d))
    engines = [field.get_property("value") for field in driver.find_elements(By.TAG_NAME, "select")]
    screenshot(driver, "open-webui-audio-settings")
    assert "openai" in engines
