"""The images of a data set: opened once, held against what annotations say of them."""

import json
import shutil
from pathlib import Path

import cv2
import mmcv
import pytest
from made_data import SIZE, coco_set, picture, rewrite, roboflow, standard, voc, yolo_ultralytics
from PIL import Image
from pycocotools.coco import COCO

from cse_autoloss.trial import ConfigError
from detectors import datasets
from detectors.datasets import images
from detectors.datasets.findings import Findings

pytestmark = pytest.mark.usefixtures("own_cache")


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
