"""Laws of the report in a real browser: no error, no request, and points that show recipes."""

import base64
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvtune import report


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BROWSER, FOLDER = load("browser"), load("report_folder")
WIDTHS, THEMES = (1280, 390), ("light", "dark")
SHOWN = "return [...document.querySelectorAll('article')].filter(a => !a.hidden).map(a => a.id)"
PRESSED = (
    "return [...document.querySelectorAll('[data-point][aria-pressed=true]')]"
    ".map(button => Number(button.dataset.point))"
)
DRAWN = """
const charts = [...document.querySelectorAll('.chart')].filter(chart => chart.offsetParent);
return charts.length > 0 && charts.every(chart => chart.querySelector('.main-svg'));
"""
RING = """
const ring = document.querySelector('#chart-front .tracering .point');
const {left, top, width, height} = ring.getBoundingClientRect();
return [left + width / 2, top + height / 2];
"""
MARK = """
document.getElementById('chart-front').scrollIntoView({block: 'center', behavior: 'instant'});
const mark = document.querySelectorAll('#chart-front .tracefront .point')[arguments[0]];
const {left, top, width, height} = mark.getBoundingClientRect();
return [Math.round(left + width / 2), Math.round(top + height / 2)];
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with BROWSER.browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def written(folder: Path) -> Path:
    (folder / report.FILE).write_bytes(report.page(report.read(folder)))
    return folder / report.FILE


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of a whole folder, of one with a profile alone, and of one with hostile names."""
    place = tmp_path_factory.mktemp("pages")
    whole = FOLDER.write(place / "whole")
    hostile = FOLDER.write(place / "hostile", FOLDER.HOSTILE)
    (place / "less").mkdir()
    FOLDER.profile("x").save(place / "less" / "profile.safetensors")
    return {path.name: written(path) for path in (whole, hostile, place / "less")}


def at(driver: Any, script: str, *arguments: Any) -> tuple[float, float]:
    x, y = driver.execute_script(script, *arguments)
    return x, y


def moved(driver: Any, index: int) -> Any:
    """The mouse, over the mark of a point of the front."""
    actions = pytest.importorskip("selenium.webdriver").ActionChains(driver, duration=50)
    x, y = at(driver, MARK, index)
    actions.w3c_actions.pointer_action.move_to_location(x - 3, y - 3)
    actions.w3c_actions.pointer_action.move_to_location(x, y)
    return actions


def until(driver: Any, script: str, wanted: Any, *arguments: Any) -> None:
    """Waits for what the page does a moment later, such as what plotly.js draws."""
    wait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait(driver, 10, 0.05)
    seen: list[Any] = []

    def reached(_: Any) -> bool:
        seen.append(driver.execute_script(script, *arguments))
        return bool(seen[-1] == wanted)

    wait.until(reached, f"wanted {wanted!r}")


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["whole", "hostile", "less"])
def test_a_page_loads_with_no_error_and_asks_for_nothing_but_itself(
    driver, pages, which, width, theme
):
    BROWSER.show(driver, pages[which], width, theme)
    until(driver, DRAWN, True)
    for toggle in driver.find_elements("css selector", "summary"):
        driver.execute_script("arguments[0].click()", toggle)
    assert driver.get_log("browser") == []
    assert set(BROWSER.requests(driver)) == {pages[which].as_uri()}
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.find_elements("css selector", "img, iframe") == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("index", [0, 2])
def test_a_click_on_a_point_of_the_front_shows_its_recipe(driver, pages, width, index):
    BROWSER.show(driver, pages["whole"], width)
    assert driver.execute_script(SHOWN) == ["point-1"]
    moved(driver, index).click().perform()
    until(driver, SHOWN, [f"point-{index}"])
    assert driver.execute_script(PRESSED) == [index]
    assert at(driver, RING) == pytest.approx(at(driver, MARK, index), abs=1.5)
    code = driver.find_element("css selector", f"#toml-{index}")
    assert code.is_displayed() and code.text.strip() == FOLDER.recipe(index, FOLDER.PLAIN).strip()
    assert driver.find_element("css selector", f"#point-{index} .chart .main-svg").is_displayed()


def test_the_keyboard_does_what_the_mouse_does(driver, pages):
    BROWSER.show(driver, pages["whole"])
    keys = pytest.importorskip("selenium.webdriver").Keys
    button = driver.find_element("css selector", "[data-point='0']")
    driver.execute_script("arguments[0].focus()", button)
    button.send_keys(keys.TAB)
    following = driver.switch_to.active_element
    assert following.get_attribute("data-point") == "1"
    following.send_keys(keys.TAB)
    driver.switch_to.active_element.send_keys(keys.ENTER)
    assert driver.execute_script(SHOWN) == ["point-2"]
    assert driver.execute_script(PRESSED) == [2]
    said = driver.find_element("css selector", "[role=status]").get_attribute("textContent")
    assert "2.50 bits" in said


def test_the_first_tab_leads_past_the_header(driver, pages):
    BROWSER.show(driver, pages["whole"])
    keys = pytest.importorskip("selenium.webdriver").Keys
    driver.find_element("css selector", "body").send_keys(keys.TAB)
    link = driver.switch_to.active_element
    assert link.is_displayed() and link.rect["x"] >= 0
    link.send_keys(keys.ENTER)
    assert driver.switch_to.active_element.tag_name == "main"


def test_pointing_at_a_point_shows_its_numbers(driver, pages):
    BROWSER.show(driver, pages["whole"])
    moved(driver, 0).perform()
    until(driver, "return document.querySelectorAll('#chart-front .hovertext').length", 1)
    told = driver.find_element("css selector", "#chart-front .hovertext").text
    assert "8.50 bits" in told and "1.88 times smaller" in told


@pytest.mark.parametrize(
    "value, title", [("bytes", "bytes of the cache"), ("latency", "latency, us")]
)
def test_a_menu_draws_the_front_over_something_else(driver, pages, value, title):
    BROWSER.show(driver, pages["whole"])
    driver.find_element("css selector", f"[data-draws=front] [value={value}]").click()
    until(driver, "return document.querySelector('#chart-front .xtitle').textContent", title)
    moved(driver, 0).click().perform()
    until(driver, SHOWN, ["point-0"])


def test_a_menu_switches_prices_from_keys_to_values(driver, pages):
    BROWSER.show(driver, pages["whole"])
    driver.find_element("css selector", "[data-draws=prices] [value=values]").click()
    shown = "return JSON.stringify(document.getElementById('chart-prices').data[0].z)"
    data = "return JSON.parse(document.getElementById('figures').textContent)['prices.values']"
    wanted = driver.execute_script(data)["data"][0]["z"]
    assert json.loads(driver.execute_script(shown)) == wanted


@pytest.mark.parametrize("theme", THEMES)
def test_the_theme_is_the_readers_until_it_is_switched(driver, pages, theme):
    BROWSER.show(driver, pages["whole"], theme=theme)
    look = (
        "return [getComputedStyle(document.body).backgroundColor,"
        "document.getElementById('chart-front').layout.font.color]"
    )
    before = driver.execute_script(look)
    assert (sum(map(int, before[0][4:-1].split(","))) < 200) == (theme == "dark")
    driver.find_element("css selector", "#theme").click()
    after = driver.execute_script(look)
    assert all(left != right for left, right in zip(before, after, strict=True))
    driver.find_element("css selector", "#theme").click()
    assert driver.execute_script(look) == before


def test_copy_puts_the_recipe_on_the_clipboard(driver, pages):
    BROWSER.show(driver, pages["hostile"])
    allowed = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    driver.execute_cdp_cmd("Browser.grantPermissions", allowed)
    button = driver.find_element("css selector", "[data-copies=toml-1]")
    button.click()
    until(driver, "return arguments[0].textContent", "Copied", button)
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, done)"
    assert driver.execute_async_script(read) == FOLDER.recipe(1, FOLDER.HOSTILE)


def test_print_is_light_has_no_buttons_and_cuts_no_chart(driver, pages):
    BROWSER.show(driver, pages["whole"], theme="dark")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    ground = "return getComputedStyle(document.querySelector('h1')).color"
    assert sum(map(int, driver.execute_script(ground)[4:-1].split(","))) < 200
    for element in driver.find_elements("css selector", "#theme, select, nav, [data-copies]"):
        assert not element.is_displayed()
    widths = "return [...document.querySelectorAll('.main-svg')].map(svg => svg.clientWidth)"
    assert 0 < max(driver.execute_script(widths)) <= 660
    driver.execute_script("dispatchEvent(new Event('afterprint'))")
    assert driver.execute_script("return document.documentElement.dataset.theme ?? ''") == ""
    done = driver.execute_cdp_cmd("Page.printToPDF", {})
    assert base64.b64decode(done["data"]).startswith(b"%PDF")
