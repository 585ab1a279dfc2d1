"""The HTML report in a real browser without a window: no errors, pictures that show, a table that sorts, and a narrow screen."""

import shutil

import pytest
import tiny_comparison
import tiny_runs

webdriver = pytest.importorskip("selenium.webdriver")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.xdist_group("compare"),
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs Debian's chromium and chromium-driver"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory, _, _ = tiny_comparison.compared(tiny_runs.workplace(tmp_path_factory))
    return directory / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, report):
    browser.set_window_size(1200, 900)
    browser.get(report.as_uri())
    return browser


def heads(page):
    return page.find_elements("css selector", "table.sortable th")


def column(page, number):
    return [cell.text for cell in page.find_elements("css selector", f".sortable tbody td:nth-child({number + 1})")]


def test_nothing_is_wrong_and_nothing_is_fetched(page):
    assert [line for line in page.get_log("browser") if line["level"] in ("SEVERE", "WARNING")] == []
    fetched = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []


def test_pictures_are_visible(page):
    sizes = page.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width, i.alt])"
    )
    assert len(sizes) == 4
    assert all(complete and natural > 100 and shown > 100 and alt for complete, natural, shown, alt in sizes)


def test_a_click_on_a_head_sorts_by_it_and_a_second_turns_it_round(page):
    names = [head.text for head in heads(page)]
    number = names.index("trained")
    button = heads(page)[number].find_element("tag name", "button")
    button.click()
    counts = [int(text.replace(",", "")) for text in column(page, number)]
    assert counts == sorted(counts)
    assert heads(page)[number].get_attribute("aria-sort") == "ascending"
    button.click()
    assert [int(text.replace(",", "")) for text in column(page, number)] == sorted(counts, reverse=True)
    heads(page)[0].find_element("tag name", "button").click()
    assert column(page, 0) == sorted(column(page, 0))


def test_at_400_pixels_the_page_scrolls_down_only(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        widths = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert widths == [400, 400]
        font = page.execute_script("return parseFloat(getComputedStyle(document.querySelector('td')).fontSize)")
        assert font >= 12
        assert all(image.rect["width"] <= 400 for image in page.find_elements("tag name", "img"))
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
