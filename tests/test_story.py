"""What a person is told of a run while it goes on: sentences that are true of it."""

import io
import re

import pytest
from formula import luck
from rich.console import Console
from test_search_decisions import SPACES, detector

from cse_autoloss import display
from cse_autoloss.breeder import InlineBreeder
from cse_autoloss.config import parse_config
from cse_autoloss.display import panel, watching
from cse_autoloss.journal import Journal
from cse_autoloss.search import Search
from cse_autoloss.simulated import SimulatedCluster
from cse_autoloss.status import read_status
from cse_autoloss.story import listed

CONFIG = {
    "search": {
        **{"branch": "cls", "known": 2, "population": 5, "tournament": 2, "offspring": 800},
        **{"candidates": 4, "ranker": "model", "race": {"share": 0.5}},
    },
    "budget": {"trials": 24},
    "tuning": {"scales": [[1, 1], [2, 1]], "lr_scales": [0.5]},
    "stages": {
        "head": {"task": "head", "seeds": 3},
        "confirm": {"best": 3, "seeds": 2},
        "final": {"best": 2, "seeds": 3},
    },
}


def close(trial):
    """mAP of losses that few trainings cannot tell apart."""
    losses = sorted(trial.losses.items())
    return 0.3 + 0.02 * luck(losses) + 0.01 * luck(losses, trial.seed)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, its status whenever the driver looked, and what a terminal that is none showed."""
    config = parse_config(CONFIG)
    meta = {"config": config.model_dump(mode="json"), "spaces": SPACES}
    journal = Journal.create(tmp_path_factory.mktemp("story") / "run", meta)
    seen, shown = [], io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(display, "PLAIN_EVERY", 0)
        with watching(journal, Console(file=shown, width=80)) as show:

            def look():
                show()
                seen.append((read_status(journal), journal["standing"]))

            cluster = SimulatedCluster(detector(mAP=close), 2)
            breeder = InlineBreeder.of(config, SPACES, journal)
            Search(config, SPACES, journal, cluster, breeder, look).run()
    yield journal, seen, shown.getvalue()
    journal.close()


def stories(run, phase):
    return [" ".join(status.story) for status, _ in run[1] if status.phase == phase]


def test_each_phase_says_what_is_done_and_why(run):
    assert "The workers start" in stories(run, "preparing")[0]
    assert "Tuning the default losses, 2 of 3 trainings done" in " ".join(stories(run, "tuning"))
    searching = " ".join(stories(run, "searching"))
    for said in (
        "Training heads with known losses, the first parents.",
        "Training heads with the tuned default, to compare with.",
        "Training heads with losses that the model ranks first.",
    ):
        assert said in searching
    assert re.search(r"#\d+ trains? once more|#\d+ and #\d+ train once more", searching)
    (confirm, *_), (*_, final) = stories(run, "confirm"), stories(run, "final")
    assert confirm.startswith("The search is over: its 24 trainings are done. The best 3 train")
    assert "on 2 seeds that nothing was chosen by" in confirm
    assert re.search(r"Comparing CSE-Autoloss-A, found #\d+ and found #\d+ with the tuned", final)
    assert "on test, over 1 seed, which says nothing of luck." in " ".join(stories(run, "final"))
    assert read_status(run[0]).story[0].startswith("All is done. found #")


def test_who_leads_is_the_leader_of_the_last_round_with_its_lead_and_rivals(run):
    told = [(status, standing) for status, standing in run[1] if standing]
    told = [(status, standing) for status, standing in told if status.phase == "searching"]
    assert any(standing["rivals"] for _, standing in told)
    for status, standing in told:
        sentence = status.story[-1]
        ahead = 100 * (standing["mAP"] - status.baseline["mAP"])
        how = "leads the default by" if ahead >= 0 else "is"
        assert sentence.startswith(f"#{standing['leader']} {how} {abs(ahead):.1f} ± ")
        rivals = [f"#{number}" for number in [standing["leader"], *standing["rivals"]]]
        apart = f"{listed(rivals)} cannot be told apart."
        assert sentence.endswith(apart) == (len(rivals) > 1)
        assert ("the race goes on because" in sentence) == (len(rivals) > 1 and standing["raced"])


def test_a_log_and_a_panel_say_it_too_and_a_log_only_when_it_has_changed(run):
    _, seen, shown = run
    lines = shown.splitlines()
    for status, _ in seen:
        assert " ".join(status.story) in lines
    assert not [line for line, after in zip(lines, lines[1:]) if line == after]
    console = Console(file=io.StringIO(), width=200)
    console.print(panel(seen[-1][0]))
    assert seen[-1][0].story[0] in console.file.getvalue()


@pytest.mark.parametrize(
    ("names", "said"),
    [([], ""), (["a"], "a"), (list("ab"), "a and b"), (list("abc"), "a, b and c")]
    + [(list("abcd"), "a, b, c and 1 other"), (list("abcde"), "a, b, c and 2 others")],
)
def test_lists_are_short(names, said):
    assert listed(names) == said
