"""The benchmark of opening a report: its pages are whole, and a browser really says how long it took."""
import json
import re
import sys

import pytest

from benchmarks import report_opening
from tests.test_report_page import CHROMIUM

ITEMS = 20


@pytest.fixture
def asked(monkeypatch, tmp_path):
    monkeypatch.setattr(report_opening, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(sys, "argv", ["report_opening", "--items", str(ITEMS), "--runs", "3"])
    return tmp_path / "record.json"


def test_medians_of_every_page_on_both_screens(asked, monkeypatch, capsys):
    pages = {}

    def opened(chromium, page, screen):
        pages[page.parent.name] = page.read_text(encoding="utf-8")
        turn = next(turns)
        return {"load": len(pages) * screen["width"] + turn, "seen": turn / 2, "items": 2, "pictures": 3,
                "browser": "Chrome/1"}

    turns = iter(range(100))
    monkeypatch.setattr(report_opening, "opened", opened)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert report_opening.main() == 0
    cards = {name: len(re.findall('<article class="card', page)) for name, page in pages.items()}
    assert cards == {"queries": ITEMS, "images": ITEMS, "both": 2 * ITEMS}
    assert not any("no picture" in page or "left out" in page for page in pages.values())
    record = json.loads(asked.read_text())
    assert record["command"] == f"python -m benchmarks.report_opening --items {ITEMS} --runs 3" and record["runs"] == 3
    desk = record["pages"]["queries"]["desk"]
    assert desk == {"load_event_ms": 3846, "first_paint_ms": 3, "load_events_ms": [1280, 3846, 3852]}
    assert "both, 2 items, 3 pictures, " in capsys.readouterr().out


def test_without_a_browser_one_line_says_so(asked, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert report_opening.main() == 2 and not asked.exists()
    assert capsys.readouterr().err == ("error: PATH: expected a browser (chromium, chromium-browser, google-chrome; "
                                       "Debian: apt-get install chromium), found none\n")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package)")
def test_a_browser_says_how_long_a_page_took(tmp_path):
    page = tmp_path / "a page.html"
    page.write_text("<!DOCTYPE html><p>seen</p><article class='card'><img src='data:,'></article>")
    found = report_opening.opened(CHROMIUM, page, report_opening.SCREENS["phone"])
    assert (found["items"], found["pictures"]) == (1, 1) and found["load"] > 0 and found["seen"] > 0
    assert re.match(r"\w*Chrome/\d", found["browser"])
