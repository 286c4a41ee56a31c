"""Keep a finished run's comparison among the claims, a line a training; or what its search trained.

    python scripts/keep_comparison.py RUN "name"                # to docs/claims/comparisons.jsonl
    python scripts/keep_comparison.py RUN "name" --searched     # to docs/claims/searched.jsonl

A name that is there already is refused.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from table_claims import COMPARISONS, FOLDER, read_comparisons

from cse_autoloss.config import parse_config
from cse_autoloss.journal import Journal
from cse_autoloss.stages import Ladder

SEARCHED = "searched.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--searched", action="store_true", help="what its search trained")
    options = parser.parse_args()
    path = FOLDER / (SEARCHED if options.searched else COMPARISONS)
    if path.exists() and options.name in read_comparisons(path):
        parser.error(f"{path.name} has a run {options.name!r}")
    journal = Journal.read(options.run)
    if not options.searched and not journal["compared"]:
        parser.error(f"{options.run}: its comparison is not finished")
    ladder = Ladder.of(parse_config(journal["config"]).stages)
    stage = ladder.fitness if options.searched else ladder.comparison
    with path.open("a") as file:
        for row in journal.trials(stage, finished=True):
            made_from = row.result.provenance
            kept = {
                "run": options.name,
                "loss": row.label or f"#{row.candidate}",
                "losses": dict(row.trial.losses),
                "seed": row.trial.seed,
                **{
                    split: round(row.result.metrics.get(f"{split}/mAP", 0.0), 5)
                    for split in row.trial.evaluate
                },
                **({"failure": row.result.failure} if row.result.failure else {}),
                "scale": dict(row.trial.scale),
                "detector": made_from.get("config"),
                "weights": made_from.get("weights_digest"),
                "data": made_from.get("data_digest"),
                "precision": made_from.get("precision", ""),
            }
            file.write(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
