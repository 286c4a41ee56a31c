"""Any data set is read in the layout that it has, or refused in one line that says what to do."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import cv2
import mmcv
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmcv import Config
from mmdet.datasets import CocoDataset
from PIL import Image
from pycocotools.coco import COCO

from cse_autoloss.trial import ConfigError
from detectors import datasets
from detectors.config_files import CONFIGS
from detectors.data_commands import data as data_command
from detectors.datasets import images, splits
from detectors.datasets.findings import Findings
from detectors.datasets.layouts import Part
from detectors.setup import Setup
from detectors.training import DetectorTrainer

CLASSES = ("bolt", "nut", "washer")
SIZE = (48, 40)  # width, height


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    assert cv2.imwrite(str(path), pixels)
    return path


def content(names, first=1):
    """COCO's three lists for images of those names: two objects each, all classes in turn."""
    listed = [
        {"id": first + i, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
        for i, name in enumerate(names)
    ]
    objects = [
        {
            "id": 2 * i + j + 1,
            "image_id": image["id"],
            "category_id": (i + j) % 3 + 1,
            "bbox": [2 + j, 3, 20, 16],
            "area": 320,
            "iscrowd": 0,
        }
        for i, image in enumerate(listed)
        for j in range(2)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    return {"images": listed, "annotations": objects, "categories": categories}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def coco_set(annotations, folder, count=6, name="{}.png", **kwargs):
    """An annotation file at one place, its images at another."""
    names = [name.format(f"{annotations.parent.name}_{annotations.stem}_{i}") for i in range(count)]
    for each in names:
        picture(folder / each)
    return write(annotations, content(names, **kwargs))


def rewrite(path, change):
    read = json.loads(path.read_text())
    change(read)
    path.write_text(json.dumps(read))


def standard(root):
    for split, first in (("train", 1), ("val", 100)):
        coco_set(
            root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017", first=first
        )
    return root


def roboflow(root):
    for split, first in (("train", 0), ("valid", 100), ("test", 200)):
        path = coco_set(root / split / "_annotations.coco.json", root / split, first=first)
        rewrite(path, add_root_category)


def add_root_category(read):
    for category in read["categories"]:
        category["supercategory"] = "parts"
    read["categories"].insert(0, {"id": 0, "name": "parts", "supercategory": "none"})


def cvat_one_file(root):
    coco_set(root / "annotations" / "instances_default.json", root / "images", 12)


def cvat_subsets(root):
    for subset, first in (("Train", 1), ("Validation", 100)):
        coco_set(
            root / "annotations" / f"instances_{subset}.json",
            root / "images" / subset,
            first=first,
        )


def label_studio(root):
    path = coco_set(root / "result.json", root / "images", 12)
    rewrite(
        path, lambda read: [i.update(file_name="images\\" + i["file_name"]) for i in read["images"]]
    )


def no_year(root):
    for split, first in (("train", 1), ("val", 100)):
        coco_set(root / "annotations" / f"{split}.json", root / split, first=first)


def fiftyone(root):
    coco_set(root / "labels.json", root / "data", 12)


def another_machines_paths(root):
    path = coco_set(root / "annotations.json", root / "pictures", 12)
    rewrite(
        path,
        lambda read: [i.update(file_name=f"/content/{i['file_name']}") for i in read["images"]],
    )


def in_a_folder_of_its_own(root):
    standard(root / "archive" / "coco")


def with_a_byte_order_mark(root):
    standard(root)
    path = root / "annotations" / "instances_train2017.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def voc_xml(path, image, box=(3, 4, 22, 19), name="bolt"):
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = image.name
    for label in CLASSES if name == "bolt" else [name]:
        element = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(element, "name").text = label
        bounds = ElementTree.SubElement(element, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ElementTree.SubElement(bounds, key).text = str(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(path)


def voc(root, images="JPEGImages", annotations="Annotations", count=12):
    for i in range(count):
        image = picture(root / images / f"i{i}.jpg")
        voc_xml(root / annotations / f"i{i}.xml", image)


def voc_without_sets(root):
    voc(root, "images", "annotations")


def voc_by_class(root):
    for name in CLASSES:
        for i in range(4):
            image = picture(root / "dataset" / "images" / name / f"{i}.png")
            voc_xml(root / "dataset" / "annotations" / name / f"{i}.xml", image, name=name)


def voc_beside_images(root):
    voc(root / "train", ".", ".", 8)
    voc(root / "valid", ".", ".", 4)


def voc_trainval_alone(root):
    voc(root / "VOCdevkit" / "VOC2012")
    sets = root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (sets / "trainval.txt").write_text("\n".join(f"i{i}.jpg" for i in range(12)))


def yolo(root, split, count, labels="labels", images="images", first=0):
    for i in range(first, first + count):
        picture(root / images / split / f"i{i}.png")
        path = root / labels / split / f"i{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{label} 0.5 0.5 0.25 0.5\n" for label in range(3)))


def yolo_ultralytics(root):
    yolo(root, "train", 8)
    yolo(root, "val", 4, first=8)
    text = f"path: /datasets/mine\ntrain: images/train\nval: images/val\nnames: {list(CLASSES)}\n"
    (root / "data.yaml").write_text(text)


def yolo_roboflow(root):
    for split, first in (("train", 0), ("valid", 8)):
        yolo(root / split, ".", 4, first=first)
    text = (
        "train: ../train/images\nval: ../valid/images\nnc: 3\nnames: {0: bolt, 1: nut, 2: washer}\n"
    )
    (root / "data.yaml").write_text(text)


def yolo_same_folder_twice(root):
    yolo(root, "all", 12)
    (root / "my.yaml").write_text(f"train: images/all\nval: images/all\nnames: {list(CLASSES)}\n")


def yolo_darknet(root):
    yolo(root, ".", 12, labels="obj_data", images="obj_data")
    (root / "obj.names").write_text("\n".join(CLASSES))
    for name, numbers in (("train.txt", range(8)), ("valid.txt", range(8, 12))):
        (root / name).write_text("".join(f"data/obj_data/i{i}.png\n" for i in numbers))


LAYOUTS = [
    standard,
    roboflow,
    cvat_one_file,
    cvat_subsets,
    label_studio,
    no_year,
    fiftyone,
    another_machines_paths,
    in_a_folder_of_its_own,
    with_a_byte_order_mark,
    voc,
    voc_without_sets,
    voc_by_class,
    voc_beside_images,
    voc_trainval_alone,
    yolo_ultralytics,
    yolo_roboflow,
    yolo_same_folder_twice,
    yolo_darknet,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_path_is_enough_and_no_image_is_in_two_splits(layout, tmp_path):
    layout(tmp_path / "mine")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*")}
    data = datasets.find(str(tmp_path / "mine"))
    assert data.classes == CLASSES
    seen = {}
    for split in ("train", "val", "test"):
        files = data.splits[split]
        api = COCO(files.ann_file)
        assert len(api.imgs) == files.images >= 1 and files.objects == len(api.anns)
        for image in api.imgs.values():
            path = Path(files.img_prefix, image["file_name"])
            assert path.is_file() and seen.setdefault(path, split) == split
            assert (image["width"], image["height"]) == SIZE
    assert len(seen) == len([path for path in before if path.suffix in (".png", ".jpg")])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*")} == before


@pytest.mark.parametrize(
    ("place", "path", "train"),
    [
        ("configs/data.yaml", "{}", "images/train"),
        ("configs/data.yaml", "../mine", "images/train"),
        ("mine/configs/data.yaml", "..", "images/train"),
        ("mine/data.yaml", "", "../mine/images/train"),
    ],
)
def test_labels_are_found_wherever_the_data_yaml_lies(place, path, train, tmp_path):
    root = tmp_path / "mine"
    yolo(root, "train", 8)
    yolo(root, "val", 4)
    yaml = tmp_path / place
    yaml.parent.mkdir(exist_ok=True)
    val = train.replace("train", "val")
    text = f"path: {path.format(root)}\ntrain: {train}\nval: {val}\nnames: {list(CLASSES)}\n"
    yaml.write_text(text)
    for name in (yaml, yaml.parent):
        data = datasets.find(str(name))
        assert (data.splits["train"].images, data.splits["train"].objects) == (8, 24)


def test_an_images_own_name_says_nothing_of_splits(tmp_path):
    flat, folders, labels = tmp_path / "flat", tmp_path / "folders", tmp_path / "labels"
    for i, name in enumerate(("dev_board", "test_bench", "train", *range(7))):
        voc_xml(flat / f"{name}_{i}.xml", picture(flat / f"{name}_{i}.jpg"))
    for split, count in (("train", 6), ("valid", 4)):
        for i in range(count):
            path = folders / split / f"test_{i}.xml"
            voc_xml(path, picture(path.with_suffix(".jpg")))
            path = labels / "labels" / split / f"train_{i}.txt"
            picture(labels / "images" / split / f"train_{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2\n")
    (labels / "classes.txt").write_text("bolt\nnut\n")
    for root, counts in ((flat, (7, 2, 1)), (folders, (6, 2, 2)), (labels, (6, 2, 2))):
        found = datasets.find(str(root)).splits
        assert tuple(found[split].images for split in ("train", "val", "test")) == counts, root


def coco_and_more(root):
    no_year(root)
    coco_set(root / "annotations" / "more.json", root / "more")


def voc_and_more(root):
    voc_beside_images(root)
    voc(root / "more", count=1)


def yolo_and_more(root):
    yolo_roboflow(root)
    (root / "data.yaml").rename(root / "classes.txt").write_text("\n".join(CLASSES))
    yolo(root / "more", ".", 1)


@pytest.mark.parametrize("layout", [coco_and_more, voc_and_more, yolo_and_more])
def test_files_of_no_split_are_left_out_beside_others_and_said(layout, tmp_path):
    layout(tmp_path)
    found = datasets.find(str(tmp_path)).findings
    assert [f.severity for f in found if "its path says no split" in f.text] == ["left out"]


def test_yolos_boxes_and_polygons_are_pixels(tmp_path):
    yolo_ultralytics(tmp_path)
    line = "1 0.25 0.5 0.75 0.5 0.75 0.75\n"
    (tmp_path / "labels" / "train" / "i0.txt").write_text(f"0 0.5 0.5 0.25 0.5\n{line}")
    api = COCO(datasets.find(str(tmp_path)).splits["train"].ann_file)
    box, polygon = api.loadAnns(api.getAnnIds(imgIds=1))
    assert box["bbox"] == [18, 10, 12, 20] and box["category_id"] == 1
    assert polygon["bbox"] == [12, 20, 24, 10] and polygon["category_id"] == 2
    assert polygon["segmentation"] == [[12, 20, 36, 20, 36, 30]]


names = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 99)),
    min_size=12,
    max_size=40,
    unique=True,
)


@given(names, st.integers(0, 5), st.sampled_from([("all",), ("train",), ("train", "val")]))
@settings(max_examples=30)
def test_augmented_copies_of_an_image_stay_in_one_split(copies, seed, given_splits):
    parts = []
    for split, part_of in zip(given_splits, (copies[::2], copies[1::2]), strict=False):
        part_of = copies if len(given_splits) == 1 else part_of
        read = content([f"{source}{split}_jpg.rf.{number}.jpg" for source, number in part_of])
        paths = {image["id"]: "/" + image["file_name"] for image in read["images"]}
        part = Part(
            None if split == "all" else split, Path("x.json"), **read, digest="", paths=paths
        )
        parts.append(part)
    if any(len({splits.source(i["file_name"]) for i in part.images}) < 3 for part in parts):
        return
    found = splits.complete(parts, seed, Findings())
    again = splits.complete(parts, seed, Findings())
    assert [found[s].images for s in found] == [again[s].images for s in found]
    sources = [
        {splits.source(i["file_name"]) for i in found[s].images} for s in ("train", "val", "test")
    ]
    assert all(sources) and sum(map(len, sources)) == len(set().union(*sources))
    assert sum(len(found[s].images) for s in ("train", "val", "test")) == len(copies)


def test_files_can_be_named_outright_each_with_its_folder_or_alone(tmp_path):
    one = coco_set(tmp_path / "a" / "first.json", tmp_path / "x")
    two = coco_set(tmp_path / "b" / "second.json", tmp_path / "y", first=100)
    name = {
        "train": {"ann_file": str(one), "img_prefix": str(tmp_path / "x")},
        "val": {"ann_file": str(two), "img_prefix": str(tmp_path / "y")},
    }
    data = datasets.find(name)
    assert (data.splits["train"].ann_file, data.splits["train"].images) == (str(one), 6)
    assert json.loads(data.name) == name
    alone = coco_set(tmp_path / "c" / "annotations" / "all.json", tmp_path / "c" / "images", 10)
    assert datasets.find(str(alone)).splits["train"].images == 7
    for wrong, message in (
        ({"trian": str(one)}, "detector.data.trian: no split"),
        ({"train": 3}, "detector.data.train: should name an annotation file"),
        ({"train": str(one), "all": str(two)}, "detector.data.all: one set without splits"),
        (
            {"train": {"ann_file": str(one), "images": "x"}},
            "detector.data.train.images: unknown key",
        ),
        ({"train": str(tmp_path / "gone.json")}, "gone.json: No such file"),
        ({"train": {"ann_file": str(one), "img_prefix": "/gone"}}, "/gone is no folder"),
        ({}, "an empty mapping"),
    ):
        with pytest.raises(ConfigError, match=message):
            datasets.find(wrong)


def test_no_image_stands_for_another_of_its_name(tmp_path):
    root = tmp_path / "mine"
    path = coco_set(root / "labels.json", root / "cam1", 8)
    shutil.copytree(root / "cam1", root / "cam2")
    with pytest.raises(ConfigError, match="both .*cam1/.* and .*cam2/.* could be .*7 more like it"):
        datasets.find(str(root))
    (root / "cam1").rename(root / "images")
    assert datasets.find(str(root)).splits["train"].images == 6
    shutil.rmtree(root / "cam2")
    rewrite(path, lambda read: read["images"][1].update(file_name=read["images"][0]["file_name"]))
    notes = " ".join(map(str, datasets.find(str(root)).findings))
    assert "images 1 and 2 " in notes and "each should have a file of its own" in notes

    def on_another_machine(read):
        for image in read["images"]:
            image["file_name"] = f"/cam{image['id']}/{image['file_name']}"

    rewrite(path, on_another_machine)
    with pytest.raises(ConfigError, match="images 1 and 2 .*/cam1/.* and /cam2/.* are both"):
        datasets.find(str(root))


def a_config(train, val):
    return Config({"data": {"train": train, "val": val, "test": val}})


def test_what_an_mmdet_config_names_is_looked_for_in_lists_and_wrappers(tmp_path):
    one = coco_set(tmp_path / "one.json", tmp_path / "x")
    two = coco_set(tmp_path / "two.json", tmp_path / "y")
    voc(tmp_path / "VOC2007", count=5)
    sets = tmp_path / "VOC2007" / "ImageSets" / "Main" / "val.txt"
    sets.parent.mkdir(parents=True)
    sets.write_text("i0\ni1\ni2\n")

    def entry(path, folder):
        return {"type": "CocoDataset", "ann_file": str(path), "img_prefix": str(tmp_path / folder)}

    val = {"type": "VOCDataset", "ann_file": str(sets), "img_prefix": str(tmp_path / "VOC2007")}
    repeated = {"type": "RepeatDataset", "times": 3, "dataset": entry(one, "x")}
    both = {"type": "ConcatDataset", "datasets": [entry(one, "x"), entry(two, "y")]}
    balanced = {"type": "ClassBalancedDataset", "oversample_thr": 0.1, "dataset": both}
    listed = [entry(one, "x"), {**entry(two, "y"), "data_root": str(tmp_path)}]
    for train, count in ((repeated, 6), (balanced, 12), (listed, 12)):
        data = datasets.find("config", config=a_config(train, val))
        assert (data.splits["train"].images, data.splits["val"].images) == (count, 2)
        assert data.classes == CLASSES
    nuts = {"classes": ("nut",)}
    only = datasets.find("config", config=a_config({**entry(one, "x"), **nuts}, {**val, **nuts}))
    assert only.classes == ("nut",) and only.splits["train"].objects == 4


def test_a_configs_classes_that_its_data_do_not_have_are_named(tmp_path):
    entry = {"ann_file": str(coco_set(tmp_path / "one.json", tmp_path / "x"))}
    entry |= {"type": "CocoDataset", "img_prefix": str(tmp_path / "x")}
    listed = tmp_path / "names.txt"
    listed.write_text("washer\nbolt\n")
    for classes, found in ((("nut", "bolt"), ("bolt", "nut")), (str(listed), ("bolt", "washer"))):
        config = a_config({**entry, "classes": classes}, {})
        assert datasets.find("config", config=config).classes == found
    cocos = a_config({**entry, "classes": CocoDataset.CLASSES}, {})
    assert datasets.find("config", config=cocos).classes == CLASSES
    for classes, wrong in ((("bolt", "nutt"), "'nutt'"), (("Bolt", "Nut"), "'Bolt' or 'Nut'")):
        message = f"data.train.classes: no class is named {wrong}; there are 'bolt', 'nut', 'wash"
        with pytest.raises(ConfigError, match=message):
            datasets.find("config", config=a_config({**entry, "classes": classes}, {}))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "CocoDataset", "ann_file": "/gone.json"}, "/gone.json: no such file"),
        ({"type": "LVISV05Dataset", "ann_file": __file__}, "a LVISV05Dataset of test_layouts.py"),
        (
            {"type": "CocoDataset", "ann_file": __file__, "classes": "bolt"},
            "a tuple of one has a comma",
        ),
        ({}, "names no train, val or test"),
    ],
)
def test_a_configs_data_that_cannot_be_read_is_refused(entry, message):
    with pytest.raises(ConfigError, match=message):
        datasets.find("config", config=a_config(entry, {}))


def shifted(box):
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def each_box(change):
    return lambda read: [a.update(bbox=change(a["bbox"])) for a in read["annotations"]]


def each(kind, **fields):
    return lambda read: [entry.update(fields) for entry in read[kind]]


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


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turn(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).convert("RGB").save(path, "JPEG", exif=exif.tobytes())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "the image does not read: .*truncated"),
        (lambda path: path.write_bytes(b""), "the image is empty, 0 bytes"),
        (lambda path: path.write_text("<html>404</html>"), "no format that OpenCV knows"),
        (turn, "is 40 x 48 pixels as it is read, turned by its EXIF orientation, and 48 x 40 here"),
    ],
)
def test_an_image_that_is_not_what_it_should_be_is_named(spoil, message, tmp_path):
    root = tmp_path / "mine"
    path = coco_set(root / "train.json", root / "train", name="{}.jpg")
    coco_set(root / "val.json", root / "val", first=100)
    name = json.loads(path.read_text())["images"][3]["file_name"]
    spoil(root / "train" / name)
    with pytest.raises(ConfigError, match=message) as caught:
        datasets.find(str(root))
    assert name in str(caught.value)


def test_images_that_were_found_are_looked_at_where_others_are_not_there(tmp_path):
    root = standard(tmp_path)
    first, second, *_ = sorted((root / "train2017").iterdir())
    first.unlink()
    second.write_bytes(b"")
    findings = Findings()
    assert datasets.examine(str(root), findings) is None
    assert [f.text.partition(";")[0] for f in findings] == [
        f"{first}: no such image (id 1)",
        "the image is empty, 0 bytes",
    ]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_a_turned_images_header_says_the_size_that_mmdet_reads(suffix, tmp_path):
    path = str(tmp_path / f"x.{suffix}")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(path, exif=exif)
    size = mmcv.imfrombytes(Path(path).read_bytes()).shape[1::-1]
    told = images.sizes([path], tmp_path)[path], images.look([path], tmp_path)[path]
    assert [(fact.width, fact.height) for fact in told] == [size, size]


def test_a_broken_image_is_found_in_any_usual_format(tmp_path):
    for suffix in ("jpg", "png", "bmp", "webp"):
        path = picture(tmp_path / f"x.{suffix}", (300, 200))
        good = images.look([str(path)], tmp_path)[str(path)]
        assert (good.width, good.height, good.problem) == (300, 200, None), suffix
        cut(path)
        assert images.look([str(path)], tmp_path)[str(path)].problem, suffix


def test_images_are_opened_once_until_they_change(tmp_path, monkeypatch):
    standard(tmp_path / "mine")
    opened = []
    decode = images._decode
    monkeypatch.setattr(images, "_decode", lambda path: opened.append(path) or decode(path))
    datasets.find(str(tmp_path / "mine"))
    datasets.find(str(tmp_path / "mine"))
    assert len(opened) == 12
    Path(opened[3]).touch()
    datasets.find(str(tmp_path / "mine"))
    assert opened[12:] == [opened[3]]
    shutil.rmtree(tmp_path / "cache" / "cse_autoloss" / "images")
    datasets.find(str(tmp_path / "mine"), open_images=False)
    assert len(opened) == 13


@pytest.mark.parametrize("layout", [standard, roboflow, voc, yolo_ultralytics])
def test_a_worker_that_opens_no_image_sees_the_same_data(layout, tmp_path):
    layout(tmp_path / "mine")
    checked, worker = (
        datasets.find(str(tmp_path / "mine"), open_images=opened) for opened in (True, False)
    )
    assert (checked.digest, checked.splits) == (worker.digest, worker.splits)


def test_the_same_annotations_with_other_images_are_other_data_and_a_copy_is_the_same(tmp_path):
    root = standard(tmp_path / "mine")
    shutil.copytree(root, tmp_path / "copy")
    before, copied = (datasets.find(str(folder)).digest for folder in (root, tmp_path / "copy"))
    changed = next((root / "train2017").iterdir())
    assert cv2.imwrite(str(changed), 255 - cv2.imread(str(changed)))
    assert before == copied != datasets.find(str(root), open_images=False).digest


def test_images_too_small_for_mmdet_are_refused_where_nothing_else_is_left(tmp_path):
    root = standard(tmp_path)
    path = root / "annotations" / "instances_train2017.json"
    small = [image["file_name"] for image in json.loads(path.read_text())["images"]]
    for name in small[:3]:
        picture(root / "train2017" / name, (48, 28))
    rewrite(path, lambda read: [i.update(height=28) for i in read["images"][:3]])
    data = datasets.find(str(root))
    assert "3 of 6 images have a side under 32 pixels" in " ".join(map(str, data.findings))
    assert not {1, 2, 3} & set(COCO(data.splits["tiny"].ann_file).imgs)
    for name in small[3:]:
        picture(root / "train2017" / name, (48, 28))
    rewrite(path, lambda read: [i.update(height=28) for i in read["images"]])
    with pytest.raises(ConfigError, match="6 of 6 images have a side under 32 pixels"):
        datasets.find(str(root))


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


def test_a_refusal_says_what_was_found(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    write(tmp_path / "a.json", {"shapes": [], "imagePath": "a.jpg"})
    with pytest.raises(ConfigError, match=r"it holds 1 .json \(a.json\); 1 .jpg \(images/a.jpg\)"):
        datasets.find(str(tmp_path))
    for name in ("train_a", "train_b"):
        coco_set(tmp_path / f"{name}.json", tmp_path / "images")
    with pytest.raises(
        ConfigError, match="both train_a.json and train_b.json could be the train split"
    ):
        datasets.find(str(tmp_path))


def test_files_of_other_tasks_and_second_ones_of_a_split_are_not_read_and_said(tmp_path):
    no_year(tmp_path)
    folder = tmp_path / "annotations"
    (folder / "train.json").rename(folder / "instances_train.json")
    for name in ("captions_train.json", "train.json", "stuffed_keypointed_test.json"):
        shutil.copy(folder / "instances_train.json", folder / name)
    data = datasets.find(str(tmp_path))
    counts = [data.splits[split].images for split in ("train", "val", "test")]
    assert counts == [6, 6, 6], "val.json and stuffed_keypointed_test.json are read"
    notes = "; ".join(f.text for f in data.findings if "not read" in f.text)
    assert "captions_train.json: not read: its name is that of another task, captions" in notes
    assert "train.json: not read: instances_train.json is of the same split" in notes


def test_a_split_that_is_broken_is_refused_and_not_drawn_anew(tmp_path):
    roboflow(tmp_path)
    path = tmp_path / "valid" / "_annotations.coco.json"
    for text, message in (
        ("{", "not JSON"),
        ('{"images": [], "categories": []}', "no images"),
        ('{"images": [], "annotations": 3}', "no list 'annotations'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"valid/_annotations.coco.json: {message}"):
            datasets.find(str(tmp_path))
    path.write_text("[]")
    write(tmp_path / "notes.json", {"images": 1})
    data = datasets.find(str(tmp_path))
    assert "no val split: it is drawn from train" in " ".join(map(str, data.findings))


def test_a_test_split_of_images_alone_counts_as_none(tmp_path):
    no_year(tmp_path)
    path = coco_set(tmp_path / "annotations" / "test.json", tmp_path / "test", first=200)
    rewrite(path, lambda read: read.pop("annotations"))
    data = datasets.find(str(tmp_path))
    assert (data.splits["val"].images, data.splits["test"].images) == (3, 3)


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


def test_a_run_takes_the_data_that_its_config_names_or_files_named_outright(tmp_path):
    files = {}
    for split, first in (("train", 1), ("val", 100)):
        ann_file = coco_set(tmp_path / f"{split}.json", tmp_path / split, first=first)
        files[split] = {"ann_file": str(ann_file), "img_prefix": str(tmp_path / split)}
    config = tmp_path / "mine.py"
    config.write_text(
        f"_base_ = {str(CONFIGS / 'faster_rcnn_proxy.py')!r}\ndata = {files!r}\n", encoding="utf-8"
    )
    own = Setup({"config": str(config)})
    outright = Setup({"data": files})
    assert own.data.name == "config" and own.data.classes == CLASSES
    assert own.data.splits == outright.data.splits
    assert own.config.model.roi_head.bbox_head.num_classes == 3
    checked = DetectorTrainer.check({"data": files})
    assert checked["images"] == {"train": 6, "val": 3, "test": 3, "tiny": 3}
    assert checked["notes"] == []
    with pytest.raises(ConfigError, match="no segmentation; the detector has a mask head"):
        Setup({"config": "mask_rcnn_proxy", "data": files})


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
