"""The page of a run: whole in itself, drawn in a browser, served to who has the token."""

import contextlib
import http.client
import io
import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser

import pytest
from PIL import Image
from test_search_decisions import search

from cse_autoloss.caveats import caveats
from cse_autoloss.journal import Journal
from cse_autoloss.page import page, pictures, write_page
from cse_autoloss.page.detections import choose, f1, hits, keep_detections, read_detections
from cse_autoloss.page.page import gather
from cse_autoloss.page.watch import WatchServer, _Handler
from cse_autoloss.status import read_status
from cse_autoloss.trial import Picture

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


class Photographer:
    """A trainer, as far as it shows pictures."""

    @staticmethod
    def pictures(options, split, images):
        assert options == {"data": "here"} and split == "test"
        file = io.BytesIO()
        Image.new("RGB", (50, 40), "teal").save(file, "jpeg")
        return {name: Picture(100, 80, file.getvalue()) for name in images}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    journal = search(tmp_path_factory.mktemp("page") / "<run> & co", {"budget": {"trials": 25}})
    keep_detections(journal, Photographer, {"data": "here"})
    yield Journal.read(journal.folder)
    journal.close()


def browser(address, tmp_path):
    """The page's elements after its script has run, and what the script complained of."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update"]
    options += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [CHROMIUM, *options, "--enable-logging=stderr", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@needs_browser
def test_a_browser_draws_every_section_without_a_complaint(run, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page(run), encoding="utf-8")
    drawn, complaints = browser(file.as_uri(), tmp_path)
    assert complaints == []
    drawn = re.sub("<script>.*?</script>", "", drawn, flags=re.DOTALL)
    titles = re.findall(r"<h2>(.*?)</h2>", drawn)
    assert titles == [
        "Comparison",
        "The best losses",
        "Classification losses, drawn",
        "Box losses, drawn",
        "The search",
        "Where the best loss comes from",
        "On the same images",
        "From candidates to trainings",
        "Every candidate",
        "Provenance",
    ]
    assert "&lt;run&gt; &amp; co" in drawn and "<run>" not in drawn.partition("<main")[2]
    assert drawn.count('<tr id="c') == len(run.candidates())
    pictures = run["detections"]["shown"]
    assert drawn.count("<image") == 2 * len(pictures) >= 4
    assert drawn.count("<figcaption><b>default</b>: ") == len(pictures)
    assert "<math" in drawn and "<polyline" in drawn and "NaN" not in drawn


def test_images_are_chosen_by_what_the_winner_gains_and_loses_and_by_chance():
    def seen(*found):
        return {"objects": [[0, 0, 10, 10, 1], [20, 20, 40, 40, 1]], "found": list(found)}

    one, other, wrong = [0, 0, 10, 9, 1, 0.9], [21, 20, 40, 40, 1, 0.8], [0, 0, 10, 10, 2, 0.7]
    assert hits(seen()["objects"], [one, other, wrong]) == [True, True, False]
    assert hits(seen()["objects"], [[0, 0, 10, 9, 1, 0.3], one]) == [False, True], "surest first"
    assert hits(seen()["objects"], [[0, 0, 10, 4.9, 1, 0.9]]) == [False], "IoU below 0.5"
    assert (f1(seen()), f1(seen(one)), f1(seen(one, other))) == (0, 2 / 3, 1)
    assert f1(seen(one, other, wrong)) == 0.8
    default = {"a": seen(), "b": seen(), "c": seen(one), "d": seen(one, other), "e": seen(one)}
    winner = {"a": seen(one), "b": seen(one, other), "c": seen(one), "d": seen(), "e": seen(one)}
    assert choose(default, winner) == [
        *(("b", "gained"), ("a", "gained"), ("d", "lost")),
        *((name, "drawn") for name in ("c", "e")),
    ]
    assert choose(default, default) == [(name, "drawn") for name in "ce"], "no difference, no claim"


def test_the_comparisons_first_seed_shows_its_detections_and_images_are_chosen_once(run):
    final = run.trials("final")
    first = min(row.trial.seed for row in final)
    for row in run.trials():
        asked = row.stage == "final" and row.trial.seed == first
        assert bool(row.trial.detections) == bool(row.result.detections) == asked
    kept = run["detections"]
    best = next(row for row in read_status(run).comparison if row.label.startswith("found"))
    assert kept["labels"] == ["default", best.label] and kept["images"] == kept["objects"] == 10
    keep_detections(run, Photographer, {"data": "gone"})  # which would fail, were it asked again


def test_a_trainer_without_pictures_or_a_run_without_a_found_loss_has_no_such_section(tmp_path):
    journal = search(tmp_path / "run", {"budget": {"trials": 0}})
    keep_detections(journal, Photographer, {"data": "here"})
    keep_detections(journal, object, {})
    assert gather(journal)["detections"] is None


def test_a_page_takes_numbers_and_jpegs_alone():
    shown = {"name": "C:\\x\\<b>.jpg", "kind": "drawn", "width": 1, "height": 1, "jpeg": "AAAA"}
    shown |= {"objects": [], "found": [[], []]}

    def read(**changes):
        kept = {"labels": ["default", "found #1"], "images": 1, "objects": 0}
        kept["shown"] = [{**shown, **changes}]
        return read_detections({"detections": kept})["shown"][0]

    assert read()["image"] == "data:image/jpeg;base64,AAAA" and read()["name"] == "<b>.jpg"
    for changes in (
        {"jpeg": 'AAAA" onload="x'},
        {"objects": [['1"/><script>', 0, 1, 1, 0]]},
        {"width": '1" onload="x'},
    ):
        with pytest.raises(ValueError):
            read(**changes)
    assert read_detections({"detections": None}) is None


class _Links(HTMLParser):
    found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ("src", "href") and v]


def test_the_page_needs_nothing_from_elsewhere(run):
    text = page(run)
    reader = _Links()
    reader.feed(text)
    assert reader.found == [] and "@import" not in text and "url(" not in text
    assert len(text) < 3_000_000


def test_it_holds_what_the_journal_holds(run):
    data = gather(run)
    assert json.loads(json.dumps(data, allow_nan=False)) == json.loads(json.dumps(data))
    by_id = {one["id"]: one for one in data["candidates"]}
    for one in run.candidates():
        assert by_id[one.id]["fitness"] == one.fitness and by_id[one.id]["cls"] == one.losses["cls"]
    default = next(row for row in data["comparison"] if row["label"] == "default")
    assert default["val"]["values"] == pytest.approx([0.27, 0.27, 0.27], abs=0.1)
    assert data["caveats"] == caveats(read_status(run).comparison)
    for branch, rows in data["examples"].items():
        assert rows and all(row["detail"] for row in rows), branch


def test_examples_are_screened_once_for_all_pages_of_a_run(run, monkeypatch):
    first = gather(run)["examples"]
    monkeypatch.setattr(pictures, "Screener", lambda space: pytest.fail("screened again"))
    assert gather(Journal.read(run.folder))["examples"] == first


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "run", stop=1)
    path = write_page(Journal.read(tmp_path / "run"), tmp_path / "run")
    text = path.read_text(encoding="utf-8")
    assert text.count('"phase":"tuning"') == 1
    assert text.count('"story":["Tuning the default losses, 0 of 3 trainings done: ') == 1


@pytest.fixture
def server(run):
    with WatchServer([run.folder, run.folder]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(address, **headers):
    request = urllib.request.Request(address, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_runs_are_watched_side_by_side_with_the_token_alone(server):
    status, text = get(server.url)
    assert status == 200 and text.count("<iframe") == 2
    status, text = get(server.url.replace("/?", "/1?"))
    assert status == 200 and '"live":true' in text
    assert get(server.url.replace("/?", "/2?"))[0] == 404
    assert get(server.url.partition("?")[0])[0] == 403
    assert get(server.url + "x")[0] == 403
    assert get(server.url, Host="evil.example:80")[0] == 421
    assert server.server_address[0] == "127.0.0.1"


def test_a_browser_that_goes_away_says_nothing_in_the_terminal(server, monkeypatch, capsys):
    def gone(self, status, text):
        raise BrokenPipeError

    monkeypatch.setattr(_Handler, "_send", gone)
    with contextlib.suppress(OSError, http.client.HTTPException):
        get(server.url)
    monkeypatch.undo()
    assert get(server.url)[0] == 200 and capsys.readouterr().err == ""
