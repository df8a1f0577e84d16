"""ImageNet's folders by the loader of torch, and by DALI where it is installed."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from lawn.data.batching import Batching
from lawn.data.folders import FolderImages
from lawn.data.imagenet import imagenet
from lawn.data.jpeg import decode
from lawn.data.prefetch import on_device
from lawn.errors import ConfigError, DataError
from tests.helpers import write_folders

needs_dali = pytest.mark.skipif(not (find_spec("nvidia") and find_spec("nvidia.dali")), reason="no DALI")
LOADERS = ["torch", pytest.param("dali", marks=[needs_dali, pytest.mark.slow])]


def load(root: Path, **keys) -> FolderImages:
    data = imagenet(root, "test", **{"seed": 0, "val_fraction": 0.25, "image_size": 16, "workers": 0, **keys})
    assert isinstance(data, FolderImages)
    return data


def epoch(data: FolderImages, seed: int, batching: Batching) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of one rank, in order; what does not count is left out."""
    parts = [batch for part, batch in data.train_batches(batching, torch.Generator().manual_seed(seed)) if part.share]
    images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return images, labels


def test_imagenet_folders(tmp_path):
    write_folders(tmp_path)
    data = imagenet(tmp_path, "test", seed=0, val_fraction=0.25, image_size=32, workers=0)
    assert (data.num_train, data.num_classes, data.shape) == (12, 3, (3, 32, 32))
    assert data.warnings == [
        "imagenet: 3 classes, published are 1000",
        "imagenet: 12 training images, published are 1281167",
        "imagenet: 12 validation images, published are 50000",
    ]
    batches = list(data.train_batches(Batching(5), torch.Generator().manual_seed(0)))
    assert [tuple(images.shape) for _, (images, _) in batches] == [(5, 3, 32, 32), (5, 3, 32, 32), (2, 3, 32, 32)]
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


@pytest.mark.parametrize(
    ("damage", "workers", "loader"),
    [
        ("cut", 0, "torch"),
        ("text", 0, "torch"),
        ("empty", 0, "torch"),
        ("cut", 1, "torch"),
        pytest.param("cut", 1, "dali", marks=[needs_dali, pytest.mark.slow]),
        pytest.param("empty", 1, "dali", marks=[needs_dali, pytest.mark.slow]),
    ],
)
def test_damaged_images_are_named(tmp_path, damage, workers, loader):
    write_folders(tmp_path)
    path = tmp_path / "imagenet" / "train" / "n00000001" / "2.JPEG"
    path.write_bytes({"cut": path.read_bytes()[:500], "text": b"<html>not found</html>", "empty": b""}[damage])
    data = load(tmp_path, workers=workers, loader=loader)
    with pytest.raises(DataError, match=r"^/.*n00000001/2.JPEG: cannot be decoded \(.*remove it$") as error:
        list(data.train_batches(Batching(5), torch.Generator().manual_seed(0)))
    assert "\n" not in str(error.value)
    (line,) = data.damaged()
    assert line.startswith(str(path))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_with_a_line_break_in_its_name_is_one_line(tmp_path, workers):
    write_folders(tmp_path)
    path = tmp_path / "imagenet" / "train" / "n00000001" / "2.JPEG"
    path.write_bytes(b"")
    path.rename(path.with_name("2\n3.JPEG"))
    with pytest.raises(DataError, match=r"^/.*/2 3.JPEG: cannot be decoded"):
        list(load(tmp_path, workers=workers).train_batches(Batching(5), torch.Generator().manual_seed(0)))


def test_imagenet_absent(tmp_path):
    with pytest.raises(DataError, match=r"put its images into .*train/<wnid>/\*.JPEG yourself"):
        imagenet(tmp_path, "test", seed=0, val_fraction=0.1, image_size=32, workers=0)
    write_folders(tmp_path)
    (tmp_path / "imagenet" / "train" / "n99999999").mkdir()
    with pytest.raises(
        DataError, match=r"Found no valid file for the classes n99999999\..*; remove these folders, or put images into"
    ):
        imagenet(tmp_path, "test", seed=0, val_fraction=0.1, image_size=32, workers=0)


def test_class_folders_that_differ_are_named(tmp_path):
    write_folders(tmp_path)
    root = tmp_path / "imagenet"
    for k in range(7):
        shutil.copytree(root / "train" / "n00000000", root / "train" / f"m{k}")
    (root / "val" / "n00000002").rename(root / "val" / "n2")
    with pytest.raises(DataError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"{root}: train and val must have the same class folders; only train has m0, m1, m2, m3, m4 and 3 more, "
        "only val has n2"
    )


def test_images_that_are_not_sorted_into_classes(tmp_path):
    write_folders(tmp_path)
    val = tmp_path / "imagenet" / "val"
    for path in list(val.iterdir()):
        (path / "0.JPEG").rename(val / f"ILSVRC2012_val_{path.name}.JPEG")
        shutil.rmtree(path)
    message = (
        rf"{val}: 3 images but no class folders, as ILSVRC ships val; sort them into {val}/<wnid>, or .*ImageNet\('"
    )
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_images_of_any_kind_equal_those_of_torchvision(tmp_path):
    """Pixel for pixel, in its order."""
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned to the right
    for part in ("train", "val"):
        zoo, linked = tmp_path / "imagenet" / part / "zoo", tmp_path / "elsewhere" / part
        zoo.mkdir(parents=True)
        linked.mkdir(parents=True)
        for mode in ("RGB", "L", "CMYK"):
            color.convert(mode).save(zoo / f"{mode}.JPEG")
        color.save(zoo / "UPPER.JPG", "JPEG", exif=turned)
        for mode in ("P", "1", "RGBA", "LA"):
            color.convert(mode).save(zoo / f"{mode}.jpeg", "PNG")
        color.resize((1, 1)).save(zoo / "tiny.png")
        (zoo / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (zoo / "notes.txt").write_text("no image")
        color.rotate(180).save(linked / "linked.webp")
        (zoo.parent / "another").symlink_to(linked)
        (zoo.parent / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    data, expected = load(tmp_path), ImageFolder(str(tmp_path / "imagenet" / "train"))
    assert data.num_classes == len(expected.classes) == 2
    assert data.train.labels.tolist() == expected.targets == [0] + 9 * [1]
    for path, (image, _) in zip(data.train.paths, expected, strict=True):
        assert np.array_equal(np.asarray(decode(os.fsdecode(path))), np.asarray(image)), path
    assert sum(len(labels) for _, (_, labels) in data.train_batches(Batching(4), torch.Generator())) == 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    write_folders(root)
    return root


def test_workers_change_nothing_and_live_on(folders):
    alone, helped = load(folders), load(folders, workers=2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    next(helped.train_batches(Batching(3), torch.Generator().manual_seed(9)))  # the epoch is not finished
    processes = {worker.pid for worker in helped._train_loader._iterator._workers}
    epochs = []
    for seed, batching in ((4, Batching(5)), (5, Batching(7, 2))):
        epochs.append(epoch(alone, seed, batching))
        assert all(map(torch.equal, epochs[-1], epoch(helped, seed, batching)))
    assert {worker.pid for worker in helped._train_loader._iterator._workers} == processes
    for one, other in zip(alone.eval_batches(batch_size=5), helped.eval_batches(batch_size=5), strict=True):
        assert all(map(torch.equal, one, other))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(epochs[0][0].flatten(1).sum(1).sort()[0], epochs[1][0].flatten(1).sum(1).sort()[0])


@pytest.mark.parametrize(("batch_size", "micro"), [(5, None), (7, 2), (12, 4), (2, None)])
def test_an_image_of_an_epoch_does_not_depend_on_ranks(folders, batch_size, micro):
    data = load(folders)
    alone, labels = epoch(data, 3, Batching(12))
    assert labels.bincount().tolist() == [4, 4, 4]
    for world in (1, 2, 3):
        shared = torch.zeros_like(alone)
        for rank in range(world):
            generator = torch.Generator().manual_seed(3)
            batching = Batching(batch_size, micro, rank, world)
            for part, (images, of_them) in data.train_batches(batching, generator):
                assert torch.equal(of_them, labels[part.start : part.stop])
                shared[part.start : part.stop] = images
        assert torch.equal(shared, alone)


@pytest.mark.parametrize("loader", LOADERS)
def test_ranks_share_the_evaluation(folders, loader):
    data = load(folders, loader=loader)
    whole = torch.cat([images for images, _ in data.eval_batches()])
    for world in (2, 5):
        parts = [batch for rank in range(world) for batch in data.eval_batches(rank, world, batch_size=2)]
        torch.testing.assert_close(torch.cat([images for images, _ in parts]), whole)
        assert torch.cat([labels for _, labels in parts]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert list(data.eval_batches(0, 13)) == []  # more ranks than images


def test_pixels_lie_in_memory_as_convolutions_like_them(folders):
    _, (images, _) = next(load(folders).train_batches(Batching(12), torch.Generator()))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == torch.float32
    assert abs(images.mean()) < 0.5


@needs_dali
def test_dali_has_the_order_of_torch_and_images_alike(folders):
    data, reference = load(folders, loader="dali", image_size=28), load(folders, image_size=28)
    seen = []
    for rank in range(2):
        batching = Batching(5, 2, rank, 2)
        first, again = (epoch(data, 3, batching) for _ in range(2))
        assert all(map(torch.equal, first, again))
        assert torch.equal(first[1], epoch(reference, 3, batching)[1])
        assert not torch.equal(first[0], epoch(data, 4, batching)[0])
        seen.append(first)
    assert sum(len(labels) for _, labels in seen) == 12
    (ours, _), (theirs, _) = next(data.eval_batches()), next(reference.eval_batches())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.5 / 255 / 0.224)  # a gray level


def test_dali_that_is_not_installed(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "lawn.data.dali", raising=False)
    with pytest.raises(ConfigError, match=r"dataset.loader=dali: .* not installed; pip install '.\[dali\]'$"):
        load(folders, loader="dali")


def test_batches_pass_through_on_the_cpu():
    batches = [(torch.arange(k), torch.ones(k)) for k in range(4)]
    for given, got in zip(batches, on_device(iter(batches), torch.device("cpu")), strict=True):
        assert all(map(torch.equal, given, got))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_arrive_whole_on_the_gpu():
    device = torch.device("cuda", 0)
    batches = [(torch.randint(256, (64, 128, 128, 3), dtype=torch.uint8), torch.arange(k, k + 64)) for k in range(20)]
    pinned = ((images.pin_memory(), labels.pin_memory()) for images, labels in batches)
    work = torch.ones(2000, 2000, device=device)
    sums = []
    for images, labels in on_device(pinned, device):
        assert images.device == labels.device == device
        for _ in range(20):
            work = work @ work / 2000  # the device is behind, as in training
        sums.append((images.double().sum() + 0 * work.sum(), labels.sum()))
        del images, labels  # their memory may be given to the next batch
    for (pixels, classes), (images, labels) in zip(sums, batches, strict=True):
        assert pixels.item() == images.double().sum()
        assert classes.item() == labels.sum()


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
