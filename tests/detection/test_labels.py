"""YOLO's label files and class names: read, or refused in one line; of VOC's, any text."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_data import CLASSES, voc, yolo_ultralytics
from pycocotools.coco import COCO

from cse_autoloss.trial import ConfigError
from detectors import datasets

pytestmark = pytest.mark.usefixtures("own_cache")


def test_yolos_boxes_and_polygons_are_pixels(tmp_path):
    yolo_ultralytics(tmp_path)
    line = "1 0.25 0.5 0.75 0.5 0.75 0.75\n"
    (tmp_path / "labels" / "train" / "i0.txt").write_text(f"0 0.5 0.5 0.25 0.5\n{line}")
    api = COCO(datasets.find(str(tmp_path)).splits["train"].ann_file)
    box, polygon = api.loadAnns(api.getAnnIds(imgIds=1))
    assert box["bbox"] == [18, 10, 12, 20] and box["category_id"] == 1
    assert polygon["bbox"] == [12, 20, 24, 10] and polygon["category_id"] == 2
    assert polygon["segmentation"] == [[12, 20, 36, 20, 36, 30]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7 0.5 0.5 0.1 0.1", "i0.txt, line 1: class 7 is none of the 3 that are named, 0 to 2"),
        ("0 120 80 30 30", "coordinates should be shares of the image, 0 to 1, found 120"),
        ("0 0.5 0.5", "found 3 numbers"),
        ("bolt 0.5 0.5 0.1 0.1", "should be numbers, found 'bolt"),
        ("0 nan 0.5 0.1 0.1", "should be finite numbers"),
    ],
)
def test_a_label_that_is_no_yolo_label_is_named_with_its_line(line, message, tmp_path):
    yolo_ultralytics(tmp_path)
    (tmp_path / "labels" / "train" / "i0.txt").write_text(line)
    with pytest.raises(ConfigError, match=message):
        datasets.find(str(tmp_path))


def test_labels_in_upper_case_are_found(tmp_path):
    yolo_ultralytics(tmp_path)
    for path in (tmp_path / "labels" / "train").iterdir():
        path.rename(path.with_suffix(".TXT"))
    assert datasets.find(str(tmp_path)).splits["train"].objects == 24


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[bolt, nut, nut]", "2 categories are named 'nut'; each should have a name of its own"),
        ("[bolt, ' nut', nut]", "2 categories are named 'nut'"),
        ("[bolt, '', washer]", "'name': ''}: should have an id and a name"),
        ("[bolt, no, yes]", "YAML reads a name as False; no, yes, on and off should be quoted"),
    ],
)
def test_yolos_class_names_are_checked_as_cocos(names, message, tmp_path):
    yolo_ultralytics(tmp_path)
    path = tmp_path / "data.yaml"
    path.write_text(path.read_text().replace(str(list(CLASSES)), names))
    with pytest.raises(ConfigError, match=message) as caught:
        datasets.find(str(tmp_path))
    assert str(caught.value).startswith(str(path))


def test_a_label_file_without_its_image_is_named_and_counted(tmp_path):
    root = tmp_path / "mine"
    yolo_ultralytics(root)
    folder = root / "labels" / "train"
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    (folder / "background.txt").write_text("")
    assert datasets.find(str(root)).splits["train"].images == 8
    for number in (2, 3):
        (root / "images" / "train" / f"i{number}.png").unlink()
    with pytest.raises(ConfigError, match="train/i2.txt: no such image.*and 1 more like it"):
        datasets.find(str(root))


@pytest.fixture(scope="module")
def label_sets(tmp_path_factory):
    roots = tmp_path_factory.mktemp("yolo"), tmp_path_factory.mktemp("voc")
    yolo_ultralytics(roots[0])
    voc(roots[1], count=4)
    return roots


pieces = st.sampled_from(
    ["0", "1", "-1", "0.5", "1e400", "nan", "names", "train", ":", "[", "{", "- ", " ", "\n", "\t"]
    + [
        "<annotation>",
        "<object>",
        "</object>",
        "<name>",
        "bolt",
        "</name>",
        "&",
        "<!",
        "\u00e4",
        "\0",
    ]
)


@given(
    text=st.lists(pieces, max_size=12).map("".join),
    place=st.sampled_from(["labels/train/i0.txt", "data.yaml", "Annotations/i0.xml"]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_labels_of_any_text_are_read_or_refused_in_one_line(label_sets, text, place):
    root = next(root for root in label_sets if (root / place).is_file())
    before = (root / place).read_text(encoding="utf-8")
    try:
        (root / place).write_text(text, encoding="utf-8")
        datasets.find(str(root))
    except ConfigError as error:
        assert "\n" not in str(error) and str(root) in str(error)
    finally:
        (root / place).write_text(before, encoding="utf-8")
