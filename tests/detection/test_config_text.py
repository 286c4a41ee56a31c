"""What an exported config says of where its losses come from, and of names that stand in a data
set, is text and nothing else."""

import pytest
from mmcv import Config

from cse_autoloss.expression import ExpressionError
from cse_autoloss.trial import Found
from detectors.config_files import config_text
from detectors.export import header
from detectors.training import DetectorTrainer

HOSTILE = "jack-o'-lantern' + open('RAN', 'w').close() + '\nimport os"


def test_class_names_and_paths_stay_text(tmp_path, monkeypatch):
    config = Config(
        {
            "classes": [HOSTILE, 'a "quoted" one'],
            "data": {"train": {"ann_file": HOSTILE, "pair": (1, 2.5), "off": None}},
            "model": {HOSTILE: [{"type": "X"}], "scale": 1e-7},
        }
    )
    path = tmp_path / "best.py"
    path.write_text(config_text(config))
    monkeypatch.chdir(tmp_path)
    read = Config.fromfile(str(path))
    assert read._cfg_dict.to_dict() == config._cfg_dict.to_dict()
    assert not (tmp_path / "RAN").exists()


def test_paths_mean_the_same_from_any_folder_and_names_stay(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = "detectors.training:DetectorTrainer"
    for given, resolved in (
        ({"config": "faster_rcnn_proxy", "data": "embedded"}, {}),
        ({"config": "mine.py", "data": "config"}, {"config": f"{tmp_path}/mine.py"}),
        ({"data": "coco:photos"}, {"data": f"coco:{tmp_path}/photos"}),
        ({"data": "photos"}, {"data": f"{tmp_path}/photos"}),
        ({"data": "of 12:30"}, {"data": f"{tmp_path}/of 12:30"}),
        ({"data": "yolo:of 12:30"}, {"data": f"yolo:{tmp_path}/of 12:30"}),
        ({"data": ""}, {}),  # which is refused, and not this folder
        ({"data": None}, {}),
        (
            {"data": {"train": "a.json", "val": {"ann_file": "b.json", "img_prefix": "/c"}}},
            {
                "data": {
                    "train": f"{tmp_path}/a.json",
                    "val": {"ann_file": f"{tmp_path}/b.json", "img_prefix": "/c"},
                }
            },
        ),
    ):
        options = {"trainer": trainer, **given}
        assert DetectorTrainer.resolve(options) == {**options, **resolved}
        assert DetectorTrainer.resolve(DetectorTrainer.resolve(options)) == {**options, **resolved}


def test_a_provenance_is_comments_alone():
    found = Found({"reg": "U"}, {"reg": "reg"}, {}, {f"run\n{HOSTILE}": HOSTILE})
    lines = header(found).splitlines()
    assert lines and all(line.startswith("#") for line in lines)
    assert any("jack" in line for line in lines)
    with pytest.raises(ExpressionError):  # and a loss that is no formula gets no header at all
        header(Found({"reg": f"U\n{HOSTILE}"}, {"reg": "reg"}, {}, {}))
