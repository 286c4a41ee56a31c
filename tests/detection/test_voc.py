"""PASCAL VOC from disk: read as mmdet reads it, kept as COCO files, what is wrong said in one
line."""

from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from mmcv import Config
from mmdet.datasets import VOCDataset
from pycocotools.coco import COCO

from cse_autoloss.trial import ConfigError
from detectors import datasets
from detectors.datasets.findings import Findings

SPLITS = {
    "train": ["000001", "000002", "000003"],
    "val": ["000004", "000005"],
    "test": ["000006", "000007"],
}
# image to (class, xmin, ymin, xmax, ymax, difficult), pixels counted from 1; 000003 has no object
OBJECTS = {
    "000001": [("dog", 1, 1, 40, 30, 0), ("cat", 11, 21, 50, 60, 1)],
    "000002": [("person", 5, 6, 30, 50, 0)],
    "000003": [],
    "000004": [("cat", 3, 3, 20, 20, 0)],
    "000005": [("dog", 8, 9, 30, 31, 0), ("person", 1, 1, 64, 48, 0)],
    "000006": [("cat", 2, 2, 60, 40, 0)],
    "000007": [("dog", 2, 2, 60, 40, 0)],
}


@pytest.fixture
def year(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    year = tmp_path / "VOCdevkit" / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (year / name).mkdir(parents=True)
    for split, names in SPLITS.items():
        (year / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    for name, objects in OBJECTS.items():
        cv2.imwrite(str(year / "JPEGImages" / f"{name}.jpg"), np.zeros((48, 64, 3), np.uint8))
        write(year, name, objects)
    return year


def write(year, name, objects):
    root = ElementTree.Element("annotation")
    size = ElementTree.SubElement(root, "size")
    for key, value in (("width", 64), ("height", 48), ("depth", 3)):
        ElementTree.SubElement(size, key).text = str(value)
    for label, *box, difficult in objects:
        element = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(element, "name").text = label
        ElementTree.SubElement(element, "difficult").text = str(difficult)
        bounds = ElementTree.SubElement(element, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ElementTree.SubElement(bounds, key).text = str(value)
    ElementTree.ElementTree(root).write(year / "Annotations" / f"{name}.xml")


def replace(year, *texts):
    path = year / "Annotations" / "000004.xml"
    path.write_text(path.read_text().replace(*texts))


def test_boxes_classes_and_splits_are_those_that_mmdet_reads(year):
    data = datasets.find(f"voc:{year.parent}")
    assert data.classes == ("cat", "dog", "person")
    assert {name: split.images for name, split in data.splits.items()} == {
        "train": 3,
        "val": 2,
        "test": 2,
        "tiny": 2,
    }
    theirs = VOCDataset(
        ann_file=str(year / "ImageSets/Main/train.txt"),
        img_prefix=f"{year}/",
        pipeline=[],
        test_mode=True,
        classes=data.classes,
    )
    ours = COCO(data.splits["train"].ann_file)
    for index, image in enumerate(ours.dataset["images"]):
        expected = theirs.get_ann_info(index)
        for crowd, key in ((0, "bboxes"), (1, "bboxes_ignore")):
            boxes = [ours.anns[i]["bbox"] for i in ours.getAnnIds(image["id"], iscrowd=crowd)]
            boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes]).reshape(-1, 4)
            assert np.array_equal(boxes, np.reshape(expected[key], (-1, 4)))
        assert Path(image["file_name"]).is_file()


def test_a_single_years_folder_is_the_same_data(year):
    one, all_years = datasets.find(f"voc:{year}"), datasets.find(f"voc:{year.parent}")
    assert one.digest == all_years.digest and one.splits == all_years.splits


def test_a_test_split_without_annotations_counts_as_none(year):
    for name in SPLITS["test"]:
        (year / "Annotations" / f"{name}.xml").unlink()
    data = datasets.find(f"voc:{year}")
    assert (data.splits["val"].images, data.splits["test"].images) == (1, 1), "val is halved"


def test_without_a_size_or_with_one_of_zero_the_image_is_opened(year):
    as_it_was = datasets.find(f"voc:{year}", open_images=False)
    for name, size in (("000002", ("size", "sighs")), ("000005", (">64<", ">0<"))):
        path = year / "Annotations" / f"{name}.xml"
        path.write_text(path.read_text().replace(*size))
    api = COCO(datasets.find(f"voc:{year}", open_images=False).splits["train"].ann_file)
    assert {(i["width"], i["height"]) for i in api.imgs.values()} == {(64, 48)}
    assert as_it_was.classes == ("cat", "dog", "person")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda year: (year / "JPEGImages" / "000004.jpg").unlink(), "000004.xml: no such image"),
        (lambda year: (year / "Annotations" / "000002.xml").unlink(), "000002.xml: no such file"),
        (
            lambda year: (year / "Annotations" / "000002.xml").write_text("<annotation"),
            "000002.xml: not a VOC annotation",
        ),
        (lambda year: write(year, "000002", [("", 1, 1, 5, 5, 0)]), "an object without name"),
        (
            lambda year: write(year, "000002", [("dog", 1, 1, 5, "nan", 0)]),
            "bndbox/ymax should be a finite number, found 'nan'",
        ),
        (
            lambda year: replace(year, "<width>64", "<width>inf"),
            "size/width should be a finite number, found 'inf'",
        ),
        (
            lambda year: [path.unlink() for path in (year / "Annotations").iterdir()],
            "no VOC data that can be read; it holds 7 .jpg",
        ),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_file(year, spoil, message):
    spoil(year)
    with pytest.raises(ConfigError, match=message) as caught:
        datasets.find(f"voc:{year}")
    assert "\n" not in str(caught.value)


def test_images_of_an_xml_files_name_are_told_apart(year):
    for folder in ("SegmentationClass", "SegmentationObject", "thumbnails"):
        (year / folder).mkdir()
        cv2.imwrite(str(year / folder / "000004.png"), np.zeros((48, 64, 3), np.uint8))
    val = COCO(datasets.find(f"voc:{year}").splits["val"].ann_file)
    assert val.imgs[1]["file_name"] == str(year / "JPEGImages" / "000004.jpg")
    (year / "JPEGImages").rename(year / "photos")
    with pytest.raises(ConfigError, match=r"000004.jpg and \S*thumbnails/000004.png could be its"):
        datasets.find(f"voc:{year}")
    path = year / "Annotations" / "000004.xml"
    path.write_text(path.read_text().replace("<size>", "<filename>000004.jpg</filename><size>"))
    val = COCO(datasets.find(f"voc:{year}").splits["val"].ann_file)
    assert val.imgs[1]["file_name"] == str(year / "photos" / "000004.jpg")


def test_an_xml_file_is_read_in_the_encoding_that_it_declares(year):
    for encoding in ("gb2312", "utf-8", "latin-1", "utf-16"):
        path = year / "Annotations" / "000004.xml"
        name = "猫" if encoding != "latin-1" else "größe"
        write(year, "000004", [(name, 3, 3, 20, 20, 0)])
        text = ElementTree.tostring(ElementTree.parse(path).getroot(), encoding="unicode")
        path.write_bytes(f'<?xml version="1.0" encoding="{encoding}"?>{text}'.encode(encoding))
        assert name in datasets.find(str(year)).classes
    (year / "ImageSets").rename(year / "Sets")
    assert name in datasets.find(str(year)).classes, "it is seen to be an annotation"


def test_a_box_without_area_is_left_out_and_counted(year):
    write(year, "000002", [("person", 5, 6, 30, 50, 0), ("dog", 7, 7, 7, 20, 0)])
    data = datasets.find(f"voc:{year}")
    assert [f.severity for f in data.findings if "without area" in f.text] == ["left out"]
    assert len(COCO(data.splits["train"].ann_file).anns) == 3
    write(year, "000002", [("person", 30, 6, 5, 50, 0), ("dog", 7, 7, 17, 20, 0)])
    texts = " ".join(finding.text for finding in datasets.find(f"voc:{year}").findings)
    assert "a box without area" in texts and "areas are larger" not in texts


def test_a_name_that_ends_like_a_flag_is_a_name_where_there_is_such_a_file(year):
    for split, names in SPLITS.items():
        lines = []
        for number, name in enumerate(names):
            spaced = f"img {number}" if split == "train" else f"{split} {number}"
            for folder, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
                (year / folder / f"{name}.{suffix}").rename(year / folder / f"{spaced}.{suffix}")
            lines.append(f"{spaced}\n")
        (year / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(lines))
    from_folder = datasets.find(f"voc:{year}")
    lists = {split: year / "ImageSets" / "Main" / f"{split}.txt" for split in SPLITS}
    entries = {
        split: {"type": "VOCDataset", "ann_file": str(path), "img_prefix": str(year)}
        for split, path in lists.items()
    }
    from_config = datasets.find("config", config=Config({"data": entries}))
    for split, names in SPLITS.items():
        assert from_folder.splits[split].images == len(names)
        assert from_config.splits[split].images == len(names)


def test_the_same_mistake_in_many_files_is_one_line(year):
    for path in (year / "Annotations").iterdir():
        path.write_text(path.read_text().replace("bndbox", "box"))
    findings = Findings()
    datasets.examine(f"voc:{year}", findings)
    (error,) = findings.errors
    assert ".xml: not a VOC annotation" in str(error) and str(error).endswith(
        "(and 5 more like it)"
    )
