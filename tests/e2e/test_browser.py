"""
Open WebUI in a real browser: it loads, the administrator signs in, the audio page shows our server.

Screenshots are kept under artifacts/.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import browser
import pytest
from e2e import OCTET, ROOT, Stack, incus
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ARTIFACTS = ROOT / "artifacts"


@dataclass
class Site:
    """Where Open WebUI is, who signs in, and what the audio page has to show."""

    base: str
    email: str
    password: str
    stt_url: str


@pytest.fixture
def site(stack: Stack) -> Site:
    account = json.loads(incus("exec", "e2e-webui", "--", "cat", "/etc/sottovoce/open-webui-admin.json"))
    return Site(
        f"http://10.{OCTET}.0.2:3000",
        account["email"],
        account["password"],
        stack.stt_url,
    )


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


def sign_in(driver: Chrome, site: Site) -> None:
    driver.get(f"{site.base}/auth")
    email = wait(
        driver, "the sign-in form", lambda d: d.find_element(By.CSS_SELECTOR, "input[type=email], #email")
    )
    screenshot(driver, "open-webui-sign-in")
    email.send_keys(site.email)
    driver.find_element(By.CSS_SELECTOR, "input[type=password]").send_keys(site.password)
    driver.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
    wait(driver, "the page after signing in", lambda d: "/auth" not in d.current_url)
    wait(driver, "the session", lambda d: d.execute_script("return localStorage.token"))


def test_the_audio_page_shows_our_server(driver: Chrome, site: Site) -> None:
    sign_in(driver, site)
    driver.get(f"{site.base}/admin/settings/audio")
    wait(driver, f"a field with {site.stt_url}", lambda d: site.stt_url in values(d))
    engines = [field.get_property("value") for field in driver.find_elements(By.TAG_NAME, "select")]
    screenshot(driver, "open-webui-audio-settings")
    assert "openai" in engines
