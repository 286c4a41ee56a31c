"""``cse-search data check``: all that is wrong at once, and how much is used."""

import json

import pytest
from click.testing import CliRunner
from made_data import (
    each,
    picture,
    rewrite,
    standard,
    voc_beside_images,
    voc_xml,
    yolo_ultralytics,
)
from PIL import Image

from cse_autoloss.trial import ConfigError
from detectors.data_commands import data as data_command

pytestmark = pytest.mark.usefixtures("own_cache")


def check(*arguments):
    return CliRunner().invoke(data_command, ["check", *map(str, arguments)])


def test_data_check_prints_everything_by_itself_and_draws_the_boxes(tmp_path):
    root = standard(tmp_path / "mine")
    sheet = tmp_path / "sheet.png"
    result = check(root, "--sheet", sheet)
    assert result.exit_code == 0 and "train: 6 images, 12 objects" in result.output
    colors = {color for _, color in Image.open(sheet).convert("RGB").getcolors(1 << 20)}
    assert {(242, 12, 12), (8, 166, 8)} <= colors, "the boxes' first and second class"
    result = check(root, "--sheet", tmp_path / "sheet.nope")
    assert isinstance(result.exception, ConfigError) and "sheet.nope: " in str(result.exception)
    path = root / "annotations" / "instances_val2017.json"
    rewrite(path, lambda read: read["annotations"][0].update(bbox=[1, 2, 3]))
    rewrite(root / "annotations" / "instances_train2017.json", each("annotations", iscrowd="no"))
    result = check(root, "--json")
    report = json.loads(result.output)
    assert result.exit_code == 1 and not report["usable"] and len(report["findings"]) == 2
    assert "2 to mend" in check(root).output
    assert check(tmp_path / "gone").exit_code == 1
    assert check("config", "--config", "faster_rcnn_proxy").exit_code == 1


def test_data_check_says_how_much_of_what_there_is_is_used(tmp_path):
    voc_xml(tmp_path / "voc" / "more" / "x.xml", picture(tmp_path / "voc" / "more" / "x.jpg"))
    picture(tmp_path / "voc" / "more" / "y.jpg")
    voc_beside_images(tmp_path / "voc")
    standard(tmp_path / "coco")
    yolo_ultralytics(tmp_path / "yolo")
    for name, line in (
        ("voc", "of 14 images 12 are used, of 13 .xml files 12"),
        ("coco", "of 12 images 12 are used, of 2 .json files 2"),
        ("yolo", "of 12 images 12 are used, of 12 .txt files 12"),
    ):
        assert line in check(tmp_path / name).output.splitlines()
