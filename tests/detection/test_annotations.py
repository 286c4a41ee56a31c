"""COCO annotations: what is refused, what is mended, what is left out."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_data import CLASSES, SIZE, coco_set, each, rewrite, standard, write
from pycocotools.coco import COCO

from cse_autoloss.trial import ConfigError
from detectors import datasets

pytestmark = pytest.mark.usefixtures("own_cache")


def shifted(box):
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def each_box(change):
    return lambda read: [a.update(bbox=change(a["bbox"])) for a in read["annotations"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (each_box(lambda box: shifted([20, 18, 20, 16])), "as x1 y1 x2 y2 .*a bbox is"),
        (each_box(lambda box: [0.1, 0.2, 0.3, 0.4]), "boxes are shares of the image"),
        (
            each_box(lambda box: [1, 2, float("inf"), 4]),
            "annotation 1: bbox should be .*inf.*11 more",
        ),
        (each_box(lambda box: [100, 100, 5, 5]), "no annotated object in the train split"),
        (each("annotations", iscrowd="0"), "annotation 1: iscrowd should be 0 or 1, found '0'"),
        (each("annotations", ignore=1), "no annotated object .*all are crowds or to be ignored"),
        (each("annotations", area="big"), "annotation 1: area should be a number"),
        (each("images", width="48"), "width should be a number of pixels, found '48'"),
        (each("images", width=480, height=400), "is 48 x 40 pixels and 480 x 400 here"),
        (each("images", file_name=None), "image 1: file_name should be"),
        (each("categories", name="nut"), "3 categories are named 'nut'"),
        (lambda read: read["images"][2].update(id="three"), "image id 'three': ids should be"),
        (lambda read: read["categories"][2].update(id="3"), "category id '3': ids should be"),
        (
            lambda read: read["annotations"][0].update(image_id="1"),
            "image_id '1' .*text is no number",
        ),
        (lambda read: read["annotations"].append(7), "annotation 7: should be an object"),
    ],
)
def test_annotations_that_cannot_be_trained_on_are_refused(change, message, tmp_path):
    standard(tmp_path)
    path = tmp_path / "annotations" / "instances_train2017.json"
    rewrite(path, change)
    with pytest.raises(ConfigError, match=message) as caught:
        datasets.find(str(tmp_path))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        each("annotations", iscrowd=None, area=None),
        each("annotations", id=0),
        lambda read: [a.pop("id") for a in read["annotations"]],
        each("images", width=None),
        each("categories", supercategory=None, keypoints=[]),
        each("categories", supercategory=["parts"]),
        lambda read: [c.update(name=f" {c['name']}\t") for c in read["categories"]],
        each("images", width=float(SIZE[0])),
    ],
)
def test_what_can_only_be_meant_one_way_is_read_so(change, tmp_path):
    standard(tmp_path)
    rewrite(tmp_path / "annotations" / "instances_train2017.json", change)
    data = datasets.find(str(tmp_path))
    api = COCO(data.splits["train"].ann_file)
    assert data.classes == CLASSES and len(api.imgs) == 6 and len(api.anns) == 12
    assert all(a["id"] > 0 and a["iscrowd"] == 0 and a["area"] > 0 for a in api.anns.values())
    assert all((i["width"], i["height"]) == SIZE for i in api.imgs.values())


def test_what_is_left_out_is_counted_and_named_once(tmp_path):
    standard(tmp_path)

    def change(read):
        read["annotations"][0]["bbox"] = [60, 3, 5, 5]
        read["annotations"][1]["bbox"] = [-9, 3, 5, 5]
        read["annotations"][2]["ignore"] = 1
        read["annotations"][3]["bbox"] = [2, 2, 0, 9]

    rewrite(tmp_path / "annotations" / "instances_train2017.json", change)
    data = datasets.find(str(tmp_path))
    left_out = [
        (f.count, f.text.split(": ")[1].split(",")[0])
        for f in data.findings
        if f.severity == "left out"
    ]
    assert (2, "a box outside of its image") in left_out
    assert (1, "a box without area") in left_out
    assert (1, "has 'ignore'") in left_out
    assert data.splits["train"].objects == 12 - 2 - 1 - 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def one_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzzed")
    path = coco_set(root / "all.json", root / "images", 6)
    return root, json.loads(path.read_text())


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_a_file_it_is_read_or_refused_in_one_line(one_set, data):
    root, read = one_set
    read = json.loads(json.dumps(read))
    for _ in range(data.draw(st.integers(1, 3))):
        entries = read[data.draw(st.sampled_from(("images", "annotations", "categories")))]
        entry = entries[data.draw(st.integers(0, len(entries) - 1))]
        entry[data.draw(st.sampled_from([*entry, "ignore", "segmentation"]))] = data.draw(
            json_values
        )
    write(root / "all.json", read)
    try:
        found = datasets.find(str(root))
    except ConfigError as error:
        assert "\n" not in str(error) and str(root) in str(error)
        return
    for split in found.splits.values():
        for annotation in COCO(split.ann_file).anns.values():
            box = annotation["bbox"]
            assert np.isfinite(box).all() and min(box[2:]) > 0 and annotation["area"] > 0
            assert annotation["iscrowd"] in (0, 1)


def test_a_mask_head_needs_masks(tmp_path):
    root = standard(tmp_path)
    assert datasets.find(str(root))
    with pytest.raises(
        ConfigError, match="annotation 1: no segmentation; the detector has a mask head"
    ):
        datasets.find(str(root), masks=True)
    square = [[2, 3, 22, 3, 22, 19, 2, 19]]
    rle = {"size": [SIZE[1], SIZE[0]], "counts": [0, 4, SIZE[0] * SIZE[1] - 4]}
    for mask in (square, rle):
        for split in ("train", "val"):
            path = root / "annotations" / f"instances_{split}2017.json"
            rewrite(path, each("annotations", segmentation=mask))
        assert datasets.find(str(root), masks=True)
    for mask, message in (
        ([[1, 2, 3, 4]], "three points or more"),
        ({**rle, "counts": [4]}, "add up to 4"),
        ({**rle, "size": [9, 9]}, r"of size \[9, 9\]"),
    ):
        rewrite(path, each("annotations", segmentation=mask))
        with pytest.raises(ConfigError, match=message):
            datasets.find(str(root), masks=True)


def test_classes_with_other_ids_are_matched_by_name_and_others_refused(tmp_path):
    root = standard(tmp_path)
    path = root / "annotations" / "instances_val2017.json"

    def renumber(read):
        number = {1: 7, 2: 1, 3: 2}
        for category in read["categories"]:
            category["id"] = number[category["id"]]
        for annotation in read["annotations"]:
            annotation["category_id"] = number[annotation["category_id"]]

    as_it_was = COCO(datasets.find(str(root)).splits["val"].ann_file)
    rewrite(path, renumber)
    now = COCO(datasets.find(str(root)).splits["val"].ann_file)
    assert now.dataset["annotations"] == as_it_was.dataset["annotations"]
    rewrite(path, lambda read: read["categories"][0].update(name="screw"))
    with pytest.raises(ConfigError, match="class 'screw' has objects here and is none of"):
        datasets.find(str(root))
