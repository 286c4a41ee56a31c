"""Small data sets in the layouts that people have, made on the spot."""

import json
from xml.etree import ElementTree

import cv2
import numpy as np

CLASSES = ("bolt", "nut", "washer")


SIZE = (48, 40)  # width, height


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


def each(kind, **fields):
    return lambda read: [entry.update(fields) for entry in read[kind]]
