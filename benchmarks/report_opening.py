"""How long a browser takes to open a report of 500 items: `python -m benchmarks.report_opening`.

Pages of 500 queries, of 500 anomaly images, and of both, made by `report` from runs on generated data; nearly all
queries are missed, so their cards stand open. Each is opened by a new headless Chromium (Debian's package) several
times, on a desk's and on a phone's screen, taking turns; medians of what the browser says of its own navigation: the
load event, and the first text or picture on the screen. Writes benchmarks/records/report_opening.json.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomaly.score_files import write_scores
from data.anomaly_tree import SIDE, read_tree
from data.defects import write_anomaly_split
from data.errors import InputError, expect
from data.files import npy_bytes, write_atomic, write_json
from data.retrieval_set import read_retrieval_set
from data.scenes import write_retrieval_split
from submit.records import environment
from submit.report import write_report
from submit.score_run import finish_run, score_task
from submit.task_anomaly import SCORES
from submit.task_retrieval import SIDES

RECORD = Path(__file__).parent / "records" / "report_opening.json"
NAMES = ("chromium", "chromium-browser", "google-chrome")
ITEMS, RUNS = 500, 7
PAGES = {"queries": ("retrieval",), "images": ("anomaly",), "both": ("retrieval", "anomaly")}
SCREENS = {"desk": {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False},
           "phone": {"width": 390, "height": 844, "deviceScaleFactor": 3, "mobile": True}}
WIDTH, GRID = 64, 7  # of an embedding; of the noise that a map is drawn out of
TIMINGS = """new Promise(done => { const look = () => {
  const own = performance.getEntriesByType("navigation")[0];
  const seen = performance.getEntriesByName("first-contentful-paint")[0];
  if (!own.loadEventEnd || !seen) return setTimeout(look, 20);
  done({load: own.loadEventEnd, seen: seen.startTime, pictures: document.images.length,
        items: document.querySelectorAll(".card").length});
}; look(); })"""


def make_data(root: Path, items: int) -> None:
    """Images and predictions of both tasks, as many items each (even), by the generators of the dev splits."""
    rng = np.random.default_rng(0)
    write_retrieval_split(root / "retrieval", seed=0, queries=items)
    found = read_retrieval_set(root / "retrieval")
    for side, rows in zip(SIDES, (found.queries, found.database), strict=True):
        write_atomic(root / "predictions" / "retrieval" / f"{side}.npy", npy_bytes(rng.random((len(rows), WIDTH))))
    write_anomaly_split(root / "anomaly", seed=0, good=items // 4, defective=items // 2 - items // 4)
    shutil.rmtree(sorted((root / "anomaly").iterdir())[-1])  # two of its three categories
    for category in read_tree(root / "anomaly").categories:
        noise = torch.from_numpy(rng.random((len(category.images), 1, GRID, GRID)))
        maps = torch.nn.functional.interpolate(noise, size=(SIDE, SIDE), mode="bilinear").numpy()
        write_scores(root / "predictions" / "anomaly" / SCORES, category.name, category.images,
                     maps.max(axis=(1, 2, 3)), maps)


def make_page(root: Path, name: str) -> Path:
    """The report of a run of this page's tasks."""
    run = root / name
    outcomes = [score_task(task, root / "runs", data=root / task, predictions=root / "predictions" / task, seed=0,
                           device="cpu", progress=lambda *_: None, settings=()) for task in PAGES[name]]
    finish_run(run, outcomes, command="python -m benchmarks.report_opening", seed=0, device="cpu")
    return write_report([run], run / "report.html", force=False).path


class Browser:
    """A headless Chromium, spoken to through two pipes: messages of JSON that end with a zero byte."""

    def __init__(self, chromium: str, profile: Path) -> None:
        theirs_in, self._out = os.pipe()
        own_in, theirs_out = os.pipe()
        self._process = subprocess.Popen(  # it expects the pipes at 3 and 4
            ["sh", "-c", f'exec "$@" 3</dev/fd/{theirs_in} 4>/dev/fd/{theirs_out}', "sh", chromium, "--headless=new",
             "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._rest, self._number = os.fdopen(own_in, "rb", buffering=0), b"", 0

    def ask(self, method: str, session: str | None = None, **values: Any) -> dict[str, Any]:
        """The answer to one command of the DevTools protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": values}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        answer = next(found for found in self._messages() if found.get("id") == self._number)
        expect("result" in answer, f"Chromium {method}", "a result", answer.get("error"))
        return answer["result"]

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" not in self._rest:
                more = self._in.read(2**16)
                expect(more, "Chromium", "an answer", "its end")
                self._rest += more
            message, self._rest = self._rest.split(b"\0", 1)
            yield json.loads(message)

    def close(self) -> None:
        os.close(self._out)  # it ends when nobody can speak to it any more
        self._process.wait(30)
        self._in.close()


@contextmanager
def browsing(chromium: str) -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(chromium, Path(profile))
        try:
            yield browser
        finally:
            browser.close()


def opened(chromium: str, page: Path, screen: dict[str, Any]) -> dict[str, Any]:
    """Open the page once, in a browser that knows nothing of it; milliseconds since its navigation began."""
    with browsing(chromium) as browser:
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        browser.ask("Emulation.setDeviceMetricsOverride", session, **screen)
        browser.ask("Page.navigate", session, url=page.as_uri())
        found = browser.ask("Runtime.evaluate", session, expression=TIMINGS, awaitPromise=True, returnByValue=True)
        return found["result"]["value"] | {"browser": browser.ask("Browser.getVersion")["product"]}


def measured(chromium: str, root: Path, items: int, runs: int) -> dict[str, Any]:
    make_data(root, items)
    pages = {name: make_page(root, name) for name in PAGES}
    turns = [{(name, screen): opened(chromium, page, size) for name, page in pages.items()
              for screen, size in SCREENS.items()} for _ in range(runs)]
    result = {}
    for name, page in pages.items():
        one = turns[0][name, "desk"]
        result[name] = {"items": one["items"], "pictures": one["pictures"], "bytes": page.stat().st_size}
        for screen in SCREENS:
            times = {what: [turn[name, screen][what] for turn in turns] for what in ("load", "seen")}
            result[name][screen] = {"load_event_ms": statistics.median(times["load"]),
                                    "first_paint_ms": statistics.median(times["seen"]), "load_events_ms": times["load"]}
    return {"browser": one["browser"], "runs": runs, "pages": result}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=ITEMS, help="Queries of a page, and images of one.")
    parser.add_argument("--runs", type=int, default=RUNS, help="Openings of each page on each screen.")
    asked = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    try:
        expect(chromium, "PATH", f"a browser ({', '.join(NAMES)}; Debian: apt-get install chromium)", "none")
        expect(asked.items >= 20 and asked.items % 2 == 0, "--items", "an even number, at least 20", asked.items)
        expect(asked.runs >= 1, "--runs", "at least 1", asked.runs)
        with tempfile.TemporaryDirectory() as folder:
            result = measured(chromium, Path(folder), asked.items, asked.runs)
    except InputError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    command = f"python -m benchmarks.report_opening{' ' if sys.argv[1:] else ''}{' '.join(sys.argv[1:])}"
    write_json(RECORD, {"command": command, **result, "environment": environment()})
    for name, page in result["pages"].items():
        for screen in SCREENS:
            print(f"{name}, {page['items']} items, {page['pictures']} pictures, {page['bytes'] / 2**20:.1f} MiB, "
                  f"{screen}: load event {page[screen]['load_event_ms']:.0f} ms, "
                  f"first paint {page[screen]['first_paint_ms']:.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
