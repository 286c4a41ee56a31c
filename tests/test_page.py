"""The page of a run: whole in itself, drawn in a browser, served to who has the token."""

import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser

import pytest
from test_search_decisions import search

from cse_autoloss.caveats import caveats
from cse_autoloss.journal import Journal
from cse_autoloss.page import page, write_page
from cse_autoloss.page.page import gather
from cse_autoloss.page.watch import WatchServer
from cse_autoloss.status import read_status

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    journal = search(tmp_path_factory.mktemp("page") / "<run> & co", {"budget": {"trials": 25}})
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
        "From candidates to trainings",
        "Every candidate",
        "Provenance",
    ]
    assert "&lt;run&gt; &amp; co" in drawn and "<run>" not in drawn.partition("<main")[2]
    assert drawn.count('<tr id="c') == len(run.candidates())
    assert "<math" in drawn and "<polyline" in drawn and "NaN" not in drawn


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


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "run", stop=1)
    path = write_page(Journal.read(tmp_path / "run"), tmp_path / "run")
    assert path.read_text(encoding="utf-8").count('"phase":"tuning"') == 1


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
