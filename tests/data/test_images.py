from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lawn.data.cifar import cifar10
from lawn.data.digits import digits
from lawn.data.imagenet import decode, imagenet
from lawn.data.images import DeviceImages, random_crop_flip
from lawn.errors import ConfigError, DataError


def write_cifar(folder: Path, train: int = 60, test: int = 20) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{part}.npz", images=images, labels=np.arange(count) % 10)


def test_crop_and_flip_are_those_of_a_loop():
    images = torch.arange(5 * 2 * 6 * 4, dtype=torch.int64).view(5, 2, 6, 4)
    padded = torch.nn.functional.pad(images, [2] * 4)
    index = torch.tensor([4, 0, 2, 2])
    got = random_crop_flip(padded, index, (2, 6, 4), torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    top, left = torch.randint(5, (2, 4), generator=generator)
    flip = torch.randint(2, (4,), generator=generator)
    for k in range(4):
        crop = padded[index[k], :, top[k] : top[k] + 6, left[k] : left[k] + 4]
        assert torch.equal(got[k], crop.flip(-1) if flip[k] else crop)


def test_an_epoch_is_a_permutation_and_normalized():
    data = digits(Path(), "test", seed=0, val_fraction=0.2)
    images, labels = (
        torch.cat(c) for c in zip(*data.train_batches(100, torch.Generator().manual_seed(0)), strict=True)
    )
    assert (len(labels), len(data.test_labels), data.num_train, data.shape) == (1437, 360, 1437, (1, 8, 8))
    assert torch.equal(labels.bincount(), data.train_labels.bincount())
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1) < 1e-3
    (evaluated, _), *_ = data.eval_batches(5)
    torch.testing.assert_close(evaluated, (data.test_images[:5].float() - data.mean[0]) / data.std[0])


def test_validation_split_is_stratified_seeded_and_apart_from_test():
    one, two, other = (digits(Path(), "val", seed=s, val_fraction=0.2) for s in (0, 0, 1))
    assert torch.equal(one.test_images, two.test_images)
    assert not torch.equal(one.test_images, other.test_images)
    assert (len(one.train_labels), len(one.test_labels)) == (1149, 288)
    assert (one.test_labels.bincount() - 28.8).abs().max() < 2
    test = {image.numpy().tobytes() for image in digits(Path(), "test", seed=0, val_fraction=0.2).test_images}
    everything = [image.numpy().tobytes() for image in torch.cat([one.train_images, one.test_images])]
    assert len(everything) == 1437
    assert not test & set(everything)


def test_limit():
    data = digits(Path(), "test", seed=0, val_fraction=0.2, limit=50)
    assert data.num_train == 50
    assert len(data.train_labels.unique()) > 5
    with pytest.raises(ConfigError, match=r"dataset.limit=2000: there are only 1437"):
        digits(Path(), "test", seed=0, val_fraction=0.2, limit=2000)


def test_cifar_reads_what_is_there(tmp_path):
    write_cifar(tmp_path / "cifar10")
    data = cifar10(tmp_path, "test", seed=0, val_fraction=0.1)
    assert (data.num_train, data.num_classes, data.shape) == (60, 10, (3, 32, 32))
    assert data.warnings == [
        "cifar10: 60 training images, published are 50000",
        "cifar10: 20 test images, published are 10000",
    ]
    images, _ = next(data.train_batches(8, torch.Generator().manual_seed(0)))
    assert images.shape == (8, 3, 32, 32)
    assert images.dtype == torch.float32


def test_cifar_absent_and_offline(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(DataError, match=r"put cifar-10-python.tar.gz from there, or train.npz and test.npz, into"):
        cifar10(tmp_path, "test", seed=0, val_fraction=0.1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((4, 28, 28, 3), np.uint8), "labels": np.zeros(4, int)}, "want images"),
        ({"images": np.zeros((4, 32, 32, 3), np.float32), "labels": np.zeros(4, int)}, "want images"),
        ({"images": np.zeros((4, 32, 32, 3), np.uint8), "labels": np.full(4, 10)}, "labels must be 0 to 9"),
        ({"images": np.zeros((4, 32, 32, 3), np.uint8)}, "damaged"),
        ({"images": np.zeros((4, 32, 32, 3), np.uint8), "labels": np.full(4, 1.7)}, "integer labels"),
        ({"images": np.zeros((4, 32, 32, 3), np.uint8), "labels": np.array(["a"] * 4)}, "integer labels"),
        ({"images": np.zeros((0, 32, 32, 3), np.uint8), "labels": np.zeros(0, int)}, "at least one"),
        (None, "damaged"),
    ],
)
def test_cifar_damaged(tmp_path, arrays, message):
    write_cifar(tmp_path / "cifar10")
    path = tmp_path / "cifar10" / "train.npz"
    if arrays is None:
        path.write_bytes(path.read_bytes()[:1000])
    else:
        np.savez(path, **arrays)
    with pytest.raises(DataError, match=message):
        cifar10(tmp_path, "test", seed=0, val_fraction=0.1)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_damaged_cifar_cache_is_one_line_or_reads_the_same(tmp_path_factory, data):
    """Bytes of the headers and the directory of the archive are changed, or its end is missing."""
    folder = tmp_path_factory.mktemp("fuzz") / "cifar10"
    write_cifar(folder, 12, 10)
    path = folder / "train.npz"
    whole = path.read_bytes()
    text = bytearray(whole)
    edge = st.one_of(st.integers(0, 300), st.integers(len(text) - 400, len(text) - 1))
    where = data.draw(edge)
    text[where : None if data.draw(st.booleans()) else where + 1] = bytes([data.draw(st.integers(0, 255))])
    path.write_bytes(text)
    try:
        images = cifar10(folder.parent, "test", seed=0, val_fraction=0.1).train_images
    except DataError as error:
        line = str(error)
    else:
        path.write_bytes(whole)
        assert torch.equal(images, cifar10(folder.parent, "test", seed=0, val_fraction=0.1).train_images)
        return
    assert "\n" not in line
    assert str(path) in line


def write_folders(root: Path, classes: int = 3, each: int = 4) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for c in range(classes):
            folder = root / "imagenet" / part / f"n{c:08d}"
            folder.mkdir(parents=True)
            for k in range(each):
                image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
                image.convert(("RGB", "L", "CMYK")[k % 3]).save(folder / f"{k}.JPEG")


def test_imagenet_folders(tmp_path):
    write_folders(tmp_path)
    data = imagenet(tmp_path, "test", seed=0, val_fraction=0.25, image_size=32, workers=0)
    assert (data.num_train, data.num_classes, data.shape) == (12, 3, (3, 32, 32))
    assert data.warnings == [
        "imagenet: 3 classes, published are 1000",
        "imagenet: 12 training images, published are 1281167",
        "imagenet: 12 validation images, published are 50000",
    ]
    batches = list(data.train_batches(5, torch.Generator().manual_seed(0)))
    assert [tuple(images.shape) for images, _ in batches] == [(5, 3, 32, 32), (5, 3, 32, 32), (2, 3, 32, 32)]
    held_out = imagenet(tmp_path, "val", seed=0, val_fraction=0.25, image_size=32, workers=0, limit=6)
    assert held_out.num_train == 6
    assert torch.cat([labels for _, labels in held_out.eval_batches()]).bincount().tolist() == [1, 1, 1]
    assert list(data.damaged()) == []


def test_gray_and_cmyk_images_have_the_colors_that_they_show(tmp_path):
    color = (200, 120, 40)
    for mode in ("RGB", "L", "CMYK"):
        Image.new("RGB", (300, 260), color).convert(mode).save(tmp_path / "image.JPEG", quality=100)
        pixel = np.asarray(decode(str(tmp_path / "image.JPEG")))[130, 150].astype(int)
        expected = np.asarray(Image.new("RGB", (1, 1), color).convert(mode).convert("RGB"))[0, 0].astype(int)
        assert np.abs(pixel - expected).max() <= 3, mode


def test_evaluation_images_are_the_center_of_the_resized_image(tmp_path):
    """Worked by hand: short side 80 to round(64 * 256 / 224) = 73, then the middle 64 x 64."""
    for part in ("train", "val"):
        (tmp_path / "imagenet" / part / "n00000000").mkdir(parents=True)
        image = Image.new("RGB", (120, 80), (255, 0, 0))
        image.paste((0, 0, 255), (60, 0, 120, 80))  # the right half is blue
        image.save(tmp_path / "imagenet" / part / "n00000000" / "0.JPEG", quality=100)
    data = imagenet(tmp_path, "test", seed=0, val_fraction=0.5, image_size=64, workers=0)
    ((images, _),) = data.eval_batches()
    assert images.shape == (1, 3, 64, 64)
    red, blue = ((images[0, c] * s + m) for c, m, s in ((0, 0.485, 0.229), (2, 0.406, 0.225)))
    for left, right in ((red, blue.flip(-1)), (blue.flip(-1), red)):
        assert left[:, :28].min() > 0.95
        assert right[:, 36:].max() < 0.05


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_images_are_named(tmp_path, workers, damage):
    write_folders(tmp_path)
    path = tmp_path / "imagenet" / "train" / "n00000001" / "2.JPEG"
    path.write_bytes({"cut": path.read_bytes()[:500], "text": b"<html>not found</html>", "empty": b""}[damage])
    data = imagenet(tmp_path, "test", seed=0, val_fraction=0.25, image_size=32, workers=workers)
    with pytest.raises(DataError, match=r"^/.*n00000001/2.JPEG: cannot be decoded \(.*remove it$") as error:
        list(data.train_batches(5, torch.Generator().manual_seed(0)))
    assert "\n" not in str(error.value)
    (line,) = data.damaged()
    assert line.startswith(str(path))


def test_imagenet_absent(tmp_path):
    with pytest.raises(DataError, match=r"put its images into .*train/<wnid>/\*.JPEG yourself"):
        imagenet(tmp_path, "test", seed=0, val_fraction=0.1, image_size=32, workers=0)
    write_folders(tmp_path)
    (tmp_path / "imagenet" / "train" / "n99999999").mkdir()
    with pytest.raises(DataError, match=r"Found no valid file for the classes n99999999"):
        imagenet(tmp_path, "test", seed=0, val_fraction=0.1, image_size=32, workers=0)


@pytest.mark.data
def test_real_cifar(data_dir):
    data = cifar10(data_dir, "test", seed=0, val_fraction=0.1)
    assert isinstance(data, DeviceImages)
    assert data.warnings == []
    assert data.train_labels.bincount().tolist() == [5000] * 10
    torch.testing.assert_close(torch.tensor(data.mean) / 255, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4, rtol=0)


@pytest.mark.data
def test_real_imagenet_sample(data_dir, tmp_path):
    (tmp_path / "imagenet").symlink_to(data_dir / "imagenet-sample")
    data = imagenet(tmp_path, "test", seed=0, val_fraction=0.5, image_size=64, workers=0)
    images, labels = (torch.cat(column) for column in zip(*data.eval_batches(), strict=True))
    assert images.shape == (200, 3, 64, 64)
    assert labels.tolist() == list(range(200))
    assert images.mean(dim=(0, 2, 3)).abs().max() < 0.5  # real photographs, normalized by ImageNet's own constants
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    pixels = images * std + mean
    gray = (pixels.amax(1) - pixels.amin(1)).flatten(1).amax(1) < 1e-5
    assert gray.sum() >= 4
