"""The report in Chromium: nothing fails, the figures are there, and a telephone does not scroll the page sideways."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

from test_analysis import analyse, figures, gallery, nothing, page, pairs, png, sweep

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 844)], ids=["desktop", "telephone"])
def test_the_page_opens_with_its_figures_and_without_errors(browser, tmp_path, width, height):
    settings = {"merge=cross": 0.0, "merge=concat": -0.1, "merge=add": 0.01}
    a = analyse(sweep(pairs(8, settings)), nothing)
    curves = {s: {i: [(0, 1.0), (400, 0.5 + i / 100)] for i in range(8)} for s in settings}
    grids = {arm.run_id: gallery.cut(png(4)[1], arm) for arm in a.record.arms}
    drawings = [figures.forest(a), figures.curves(a, curves), figures.pareto(a)]
    path = tmp_path / "index.html"
    path.write_text(page(a, drawings, gallery.galleries(a, grids, [])).html(), encoding="utf-8")
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    heights = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().height)"
    )
    assert len(heights) == 3
    assert all(80 < h < 900 for h in heights)
    assert browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert "merge=concat is better than merge=cross" in browser.find_element("tag name", "body").text
