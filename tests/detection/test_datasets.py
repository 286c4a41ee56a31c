"""The embedded data set, and any COCO-format folder in its place."""

import hashlib
import json
import threading
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from pycocotools.coco import COCO

from cse_autoloss.lossbench import FOLDER, TASKS, read_rows
from cse_autoloss.trial import ConfigError
from detectors import datasets
from detectors.data_commands import data as data_command
from detectors.datasets import shapes

SMALL = {"train": 60, "val": 8, "test": 4, "tiny": len(shapes.CLASSES)}


def hashes(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*.*"))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shapes.write(tmp_path_factory.mktemp("shapes") / "a", seed=3, splits=SMALL)


@pytest.fixture
def user_folder(tmp_path):
    """A COCO-format folder as users have them: train and val only."""
    return shapes.write(tmp_path / "mine", seed=5, splits={"train": 24, "val": 6})


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def annotations(folder, split):
    return json.loads((folder / "annotations" / f"instances_{split}2017.json").read_text())


def rewrite(folder, split, change):
    path = folder / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(folder, tmp_path):
    again = shapes.write(tmp_path / "again", seed=3, splits=SMALL)
    assert hashes(again) == hashes(folder)
    other = shapes.write(tmp_path / "other", seed=4, splits={"train": 2})
    assert hashes(other)["train2017/000000.png"] != hashes(folder)["train2017/000000.png"]


def test_splits_share_no_image(folder):
    found = [h for name, h in hashes(folder).items() if name.endswith(".png")]
    assert len(found) == len(set(found)) == sum(SMALL.values())


def test_classes_have_a_long_tail_and_sizes_run_from_8_pixels_to_over_half_the_image():
    found = [a for index in range(400) for a in shapes.draw(0, "train", index)[1]]
    counts = Counter(a["category_id"] for a in found)
    assert len(counts) == len(shapes.CLASSES) >= 6
    assert counts[1] > 4 * counts[len(shapes.CLASSES)]
    longest = [max(a["bbox"][2:]) for a in found]
    assert min(longest) <= 10 and max(longest) > shapes.IMAGE_SIZE / 2


def test_the_tiny_split_shows_one_category_an_image_in_order(folder):
    content = annotations(folder, "tiny")
    shown = [
        {a["category_id"] for a in content["annotations"] if a["image_id"] == i["id"]}
        for i in content["images"]
    ]
    assert shown == [{c["id"]} for c in content["categories"]]


def test_masks_lie_in_their_boxes_and_cover_their_areas(folder):
    api = COCO(str(folder / "annotations" / "instances_train2017.json"))
    for annotation in api.anns.values():
        x, y, width, height = annotation["bbox"]
        assert (
            x >= 0 and y >= 0 and x + width <= shapes.IMAGE_SIZE and y + height <= shapes.IMAGE_SIZE
        )
        points = np.concatenate([np.reshape(p, (-1, 2)) for p in annotation["segmentation"]])
        low, high = points.min(0), points.max(0)
        assert np.allclose(low, [x, y], atol=0.76) and np.allclose(
            high, [x + width, y + height], atol=0.76
        )
        assert (
            abs(api.annToMask(annotation).sum() - annotation["area"])
            < 0.15 * annotation["area"] + 12
        )


def test_the_files_hold_what_was_drawn(folder):
    for index in range(20):
        image, _ = shapes.draw(3, "train", index)
        read = cv2.imread(str(folder / "train2017" / f"{index:06d}.png"))
        assert np.array_equal(read, image)


def test_a_folder_that_holds_something_is_left_alone(folder):
    before = hashes(folder)
    with pytest.raises(FileExistsError, match="not empty"):
        shapes.write(folder)
    assert hashes(folder) == before
    result = CliRunner().invoke(data_command, ["write", str(folder)])
    assert result.exit_code == 1 and "not empty" in result.output


def test_a_command_that_is_mistyped_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Did you mean 'check'" in CliRunner().invoke(data_command, ["chekc"]).output
    assert not list(tmp_path.iterdir())


def test_two_processes_may_make_the_embedded_data_set_at_once(own_cache, monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 12, "val": 4, "test": 4, "tiny": 6})
    found, failures = [], []

    def find():
        try:
            found.append(datasets.find("embedded", 1))
        except Exception as error:  # noqa: BLE001 - shown by the assertion
            failures.append(error)

    threads = [threading.Thread(target=find) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len({data.digest for data in found}) == 1
    assert [p.name for p in (own_cache / "cse_autoloss" / "data").iterdir()] == [
        f"shapes-v{shapes.VERSION}.{shapes.LAYOUT}-seed1"
    ]


def test_a_users_folder_gets_the_splits_that_it_lacks_and_is_not_written_to(user_folder, own_cache):
    before = hashes(user_folder)
    data = datasets.find(f"coco:{user_folder}")
    assert data.classes == shapes.CLASSES
    assert {name: split.images for name, split in data.splits.items()} == {
        "train": 24,
        "val": 3,
        "test": 3,
        "tiny": 6,
    }
    ids = {name: set(COCO(split.ann_file).imgs) for name, split in data.splits.items()}
    assert ids["val"] | ids["test"] == {1, 2, 3, 4, 5, 6} and not ids["val"] & ids["test"]
    assert set(COCO(data.splits["tiny"].ann_file).cats) == set(range(1, 7))
    assert hashes(user_folder) == before
    assert all(Path(split.img_prefix).is_dir() for split in data.splits.values())


def test_boxes_without_area_are_left_out_and_missing_fields_filled_in(user_folder, own_cache):
    def change(content):
        content["annotations"][0]["bbox"][2] = 0
        for annotation in content["annotations"]:
            del annotation["area"], annotation["iscrowd"]

    rewrite(user_folder, "train", change)
    data = datasets.find(f"coco:{user_folder}")
    left_out = [f for f in data.findings if f.severity == "left out"]
    assert [(f.count, "without area" in f.text) for f in left_out] == [(1, True)]
    api = COCO(data.splits["train"].ann_file)
    assert 1 not in api.anns and all(a["area"] > 0 and a["iscrowd"] == 0 for a in api.anns.values())


def test_categories_in_another_order_are_the_same_classes(user_folder, own_cache):
    rewrite(user_folder, "val", lambda content: content["categories"].reverse())
    data = datasets.find(f"coco:{user_folder}")
    assert [c["name"] for c in COCO(data.splits["val"].ann_file).dataset["categories"]] == list(
        data.classes
    )


def break_key(content):
    del content["categories"]


def break_image(content):
    content["images"][0]["file_name"] = "gone.png"


def break_class(content):
    content["categories"][0]["name"] = "blob"


def break_ids(content):
    content["images"][1]["id"] = content["images"][0]["id"]


def break_box(content):
    content["annotations"][0]["bbox"] = [1, 2, "3", 4]


def break_category(content):
    content["annotations"][0]["category_id"] = 99


def only_crowds(content):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_key, "no list 'categories'"),
        (break_image, "gone.png: no such image"),
        (break_class, "blob"),
        (break_ids, "image entries have the id .*; ids should be unique"),
        (break_box, "annotation 1: bbox should be"),
        (break_category, "category_id 99 is the id of no category"),
        (only_crowds, "no annotated object in the val split"),
        (lambda content: content["images"].clear(), "no images"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_line_that_names_the_file(
    user_folder, own_cache, change, message
):
    path = rewrite(user_folder, "val", change)
    with pytest.raises(ConfigError, match=message) as caught:
        datasets.find(f"coco:{user_folder}")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "gone.png" in str(caught.value)


def test_a_data_set_that_is_not_there_is_said_in_one_line(user_folder, tmp_path):
    for name in ("coco:/nowhere", "coco:", "voc:/x", "shapes"):
        with pytest.raises(ConfigError, match="detector.data"):
            datasets.find(name)
    (user_folder / "annotations" / "instances_train2017.json").rename(user_folder / "a.json")
    (user_folder / "a.json").write_text("[]")
    (user_folder / "annotations" / "instances_val2017.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"no data set that can be read; it holds 30 .png .*2 .json \(a.json, "
    ):
        datasets.find(str(user_folder))


def test_the_benchmark_is_of_the_embedded_data():
    """So a search on them begins with it, and a search on other data does not."""
    rows = read_rows(FOLDER / "faster_rcnn_proxy" / TASKS["head"])
    assert {row.data for row in rows} == {datasets.find("embedded", 0).digest}
