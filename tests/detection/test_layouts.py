"""Any data set is read in the layout that it has, or refused in one line that says what to do."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import (
    CLASSES,
    LAYOUTS,
    SIZE,
    coco_set,
    content,
    no_year,
    picture,
    rewrite,
    roboflow,
    voc,
    voc_beside_images,
    voc_xml,
    write,
    yolo,
    yolo_roboflow,
)
from mmcv import Config
from mmdet.datasets import CocoDataset
from pycocotools.coco import COCO

from cse_autoloss.trial import ConfigError
from detectors import datasets
from detectors.config_files import CONFIGS
from detectors.datasets import splits
from detectors.datasets.findings import Findings
from detectors.datasets.layouts import Part
from detectors.setup import Setup
from detectors.training import DetectorTrainer

pytestmark = pytest.mark.usefixtures("own_cache")


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
