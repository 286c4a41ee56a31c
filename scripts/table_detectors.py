"""Every detector with every combination of searched and default losses, as proxies on the embedded
data set.

    python scripts/table_detectors.py            # goes on where it was interrupted, then writes
    docs/results.md python scripts/table_detectors.py --seeds 0  # one seed of each
    python scripts/table_detectors.py --write    # the table alone, from what is measured

A finished training is a line of docs/results.jsonl with its provenance. CSE-Autoloss-A stands for
the searched losses of the two-stage detectors and CSE-Autoloss-B for those of the one-stage ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from cse_autoloss.trial import Trial
from detectors.training import DetectorTrainer

DOCS = Path(__file__).parents[1] / "docs"
# Proxy to the detector's name, the searched losses, and the box mAP on COCO val that the paper
# reports with both.
DETECTORS = {
    "faster_rcnn_proxy": ("Faster R-CNN R50", "CSE-Autoloss-A", 38.5),
    "faster_rcnn_r101_proxy": ("Faster R-CNN R101", "CSE-Autoloss-A", 40.2),
    "cascade_rcnn_proxy": ("Cascade R-CNN R50", "CSE-Autoloss-A", 40.5),
    "mask_rcnn_proxy": ("Mask R-CNN R50", "CSE-Autoloss-A", 39.1),
    "fcos_proxy": ("FCOS R50", "CSE-Autoloss-B", 39.6),
    "atss_proxy": ("ATSS R50", "CSE-Autoloss-B", 40.5),
}
# Backbone, neck and RPN of these are Faster R-CNN's: one warm-up serves all three.
WARMED_AS = {"cascade_rcnn_proxy": "faster_rcnn_proxy", "mask_rcnn_proxy": "faster_rcnn_proxy"}
SEEDS = (0, 1, 2)
COMBINATIONS = {
    "default": (),
    "classification": ("cls",),
    "regression": ("reg",),
    "both": ("cls", "reg"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--detectors", nargs="+", default=list(DETECTORS), choices=list(DETECTORS))
    parser.add_argument(
        "--results",
        type=Path,
        default=DOCS / "results.jsonl",
        help="finished trainings, a line each",
    )
    parser.add_argument("--out", type=Path, default=DOCS / "results.md")
    parser.add_argument("--write", action="store_true", help="train nothing, write the table")
    options = parser.parse_args()
    if not options.write:
        measure(options.seeds, options.detectors, options.results)
    options.out.write_text(table(read(options.results)))


def measure(seeds: list[int], detectors: list[str], results: Path) -> None:
    """Train what no line of the file says is trained, all of a seed before the next one's."""
    trainers: dict[str, DetectorTrainer] = {}
    finished = {(cell["detector"], cell["searched"], cell["seed"]) for cell in read(results)}
    for seed, detector, searched in itertools.product(seeds, detectors, COMBINATIONS):
        if (detector, searched, seed) in finished:
            continue
        if detector not in trainers:
            warm = DetectorTrainer.prepare(
                {"config": WARMED_AS.get(detector, detector), "device": "cpu"}
            )
            trainers[detector] = DetectorTrainer({"config": detector, "device": "cpu"}, warm)
        losses = {branch: DETECTORS[detector][1] for branch in COMBINATIONS[searched]}
        cell = dict(
            detector=detector,
            searched=searched,
            seed=seed,
            **train(trainers[detector], losses, seed),
        )
        with results.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        print(
            detector,
            searched,
            seed,
            cell["mAP"],
            cell["cpu_ms_a_step"],
            cell["failure"] or "",
            flush=True,
        )


def train(trainer: DetectorTrainer, losses: dict[str, str], seed: int) -> dict[str, Any]:
    """One training; the median CPU time of its steps, which tells more than the clock on a machine
    with other work."""
    marks: list[tuple[int, float]] = []
    trial = Trial("table", losses=losses, seed=seed)
    result = trainer.train(trial, lambda step, _steps: marks.append((step, time.process_time())))
    rates = [
        (end - start) / (last - first) for (first, start), (last, end) in itertools.pairwise(marks)
    ]
    return dict(
        mAP=result.mAP,
        cpu_ms_a_step=round(1000 * statistics.median(rates), 1) if rates else None,
        loss_weights=dict(result.loss_weights),
        steps=result.steps,
        failure=result.failure,
        provenance=dict(result.provenance),
    )


def read(results: Path) -> list[dict[str, Any]]:
    """The finished trainings."""
    return (
        [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    )


def table(cells: list[dict[str, Any]]) -> str:
    """The page: a table, and what its numbers are.

    Raises:
        SystemExit: trainings of one detector that cannot be compared, for its config or its first
            weights changed.
    """
    rows = []
    for detector, (name, losses, paper) in DETECTORS.items():
        mine = [cell for cell in cells if cell["detector"] == detector]
        made_by = {
            (cell["provenance"]["config_digest"], cell["provenance"]["weights_digest"])
            for cell in mine
            if cell["provenance"]
        }
        if len(made_by) > 1:
            raise SystemExit(
                f"{detector}: its trainings are of different configs or first weights; take the "
                "old lines out"
            )
        default = {cell["seed"]: cell["mAP"] for cell in mine if cell["searched"] == "default"}
        for searched in COMBINATIONS:
            done = [cell for cell in mine if cell["searched"] == searched]
            measured = [cell for cell in done if cell["mAP"] is not None]
            gains = [
                cell["mAP"] - default[cell["seed"]]
                for cell in measured
                if default.get(cell["seed"]) is not None
            ]
            weights = measured[0]["loss_weights"] if measured else {}
            rows.append(
                [
                    name if searched == "default" else "",
                    {"default": "none", "both": f"both ({losses})"}.get(searched, searched),
                    _spread([100 * cell["mAP"] for cell in measured]),
                    "" if searched == "default" else _spread([100 * gain for gain in gains], "+"),
                    ", ".join(str(cell["seed"]) for cell in measured) or "none",
                    f"{statistics.mean(cell['cpu_ms_a_step'] for cell in measured):.0f}"
                    if measured
                    else "",
                    " / ".join(f"{weights[branch]:.3g}" for branch in ("cls", "reg"))
                    if weights
                    else "",
                    f"{paper}" if searched == "both" else "",
                ]
            )
            if len(measured) < len(done):
                rows[-1][2] += f" ({len(done) - len(measured)} failed)"
    head = [
        "detector",
        "searched losses",
        "mAP",
        "over default, same seed",
        "seeds",
        "CPU ms a step",
        "weights cls / reg",
        "the paper's COCO mAP",
    ]
    lines = [" | ".join(row).join(("| ", " |")) for row in [head, ["---"] * len(head), *rows]]
    about = next((cell["provenance"] for cell in cells if cell["provenance"]), {})
    wanted = len(DETECTORS) * len(COMBINATIONS) * len(SEEDS)
    versions = ", ".join(
        f"{name} {about[name]}"
        for name in ("torch", "mmdet", "mmcv-full", "numpy")
        if name in about
    )
    return f"""# Six detectors, four combinations

Written by `scripts/table_detectors.py` from `docs/results.jsonl`, one line a training.
{len(cells)} of {wanted} are done (three seeds of each); run the script again and it measures what
is missing.

{chr(10).join(lines)}

* mAP: COCO AP in per cent on the val split of the embedded data set, of proxies that train on one
  CPU core ([detectors.md](detectors.md): ResNet-18, for R101 ResNet-34, at a quarter of its width);
  mean and, of more than one seed, standard deviation. Nothing was chosen by these numbers. One seed
  says little: Faster R-CNN's default alone has a standard deviation of 0.6 between seeds.
* Searched losses are those that the paper found, CSE-Autoloss-A and -B. Their weights are found,
  not chosen: a searched loss's gradients start as strong as the default's. Nothing is tuned.
* The R-CNNs with ResNet-18 start from the same backbone, neck and RPN, those of the Faster R-CNN
  proxy's warm-up.
* In FCOS and ATSS the IoU stands for the centerness with the default losses, too.
* CPU ms a step: the process's CPU time, median over a training, on a shared two-core machine: other
  work there makes it differ by a tenth and more between equal trainings.
* The last column is **the paper's, on COCO, at full size and schedule**; it was not measured here,
  and proxies are not to be compared with it.

Measured with {versions}.
"""


def _spread(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
