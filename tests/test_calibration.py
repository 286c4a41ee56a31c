"""What the ranker predicted, beside what was measured."""

from cse_autoloss.calibration import calibration_lines, draw_calibration, predicted_candidates
from cse_autoloss.journal import CandidateState, Journal


def a_run(tmp_path, rows):
    """A journal whose candidates were predicted and measured so."""
    journal = Journal.create(tmp_path / "run", {})
    with journal.step():
        for number, (predicted, fitness) in enumerate(rows):
            losses = {"reg": f"Add({number % 3 + 1},Sub(1,Div(I,U)))"}
            found = journal.add_candidate(
                losses, {"reg": str(number)}, "mutation", "full", 1, {}, predicted, 0.004
            )
            if fitness is not None:
                journal.move(found, CandidateState.SCORED)
                journal.set_fitness(found, fitness, 1)
    return journal


def test_the_report_says_how_predictions_rank_and_names_the_greatest_surprises(tmp_path):
    journal = a_run(
        tmp_path,
        [(0.48, 0.481), (0.47, 0.472), (0.46, 0.462), (0.45, 0.495), (0.485, 0.20), (None, 0.4)],
    )
    candidates = predicted_candidates(journal)
    page = "\n".join(calibration_lines(candidates))
    assert len(candidates) == 5 and "all: 5 candidates, rank correlation -0.60" in page
    assert "those within 0.05 of the best: 4 candidates" in page
    assert "better than predicted: #4 0.495 (predicted 0.450 ± 0.004)" in page
    assert "worse than predicted: #5 0.200" in page
    picture = draw_calibration(candidates, tmp_path / "predicted.png")
    assert picture.stat().st_size > 5000


def test_nothing_is_said_of_a_run_without_predictions(tmp_path):
    journal = a_run(tmp_path, [(None, 0.48), (None, 0.47), (0.4, None), (0.4, 0.41)])
    assert calibration_lines(predicted_candidates(journal)) == []
