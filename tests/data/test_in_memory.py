import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lawn.data import cifar
from lawn.data.batching import Batching
from lawn.data.cifar import cifar10
from lawn.data.digits import digits
from lawn.data.in_memory import InMemoryImages, crop_flip, draw_crops
from lawn.errors import ConfigError, DataError
from tests.helpers import write_cifar


def test_crop_and_flip_are_those_of_a_loop():
    images = torch.arange(5 * 2 * 6 * 4, dtype=torch.int64).view(5, 2, 6, 4)
    padded = torch.nn.functional.pad(images, [2] * 4)
    index = torch.tensor([4, 0, 2, 2])
    offsets, mirrored = draw_crops(len(index), 5, torch.Generator().manual_seed(3), torch.device("cpu"))
    got = crop_flip(padded, index, (2, 6, 4), offsets, mirrored)
    generator = torch.Generator().manual_seed(3)
    top, left = torch.randint(5, (2, 4), generator=generator)
    flip = torch.randint(2, (4,), generator=generator)
    for k in range(4):
        crop = padded[index[k], :, top[k] : top[k] + 6, left[k] : left[k] + 4]
        assert torch.equal(got[k], crop.flip(-1) if flip[k] else crop)


def test_an_epoch_is_a_permutation_and_normalized():
    data = digits(Path(), "test", seed=0, val_fraction=0.2)
    batches = [batch for _, batch in data.train_batches(Batching(100), torch.Generator().manual_seed(0))]
    images, labels = (torch.cat(c) for c in zip(*batches, strict=True))
    assert (len(labels), len(data.test_labels), data.num_train, data.shape) == (1437, 360, 1437, (1, 8, 8))
    assert torch.equal(labels.bincount(), data.train_labels.bincount())
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1) < 1e-3
    (evaluated, _), *_ = data.eval_batches(batch_size=5)
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
    assert data.mean == pytest.approx([data.train_images.double().mean().item()])  # of these 50 alone
    assert data.std == pytest.approx([data.train_images.double().std(correction=0).item()])
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
    _, (images, _) = next(data.train_batches(Batching(8), torch.Generator().manual_seed(0)))
    assert images.shape == (8, 3, 32, 32)
    assert images.dtype == torch.float32


@pytest.mark.parametrize("world", [1, 3])
def test_crops_do_not_depend_on_ranks_and_micro_batches(tmp_path, world):
    write_cifar(tmp_path / "cifar10")
    data = cifar10(tmp_path, "test", seed=0, val_fraction=0.1)
    whole = torch.cat([images for _, (images, _) in data.train_batches(Batching(25), torch.Generator().manual_seed(0))])
    shared = torch.zeros_like(whole)
    for rank in range(world):
        for part, (images, _) in data.train_batches(Batching(25, 4, rank, world), torch.Generator().manual_seed(0)):
            shared[part.start : part.stop] = images
    assert torch.equal(shared, whole)


def test_cifar_absent_and_offline(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    names = (
        "put cifar-10-binary.tar.gz from there, or all of its cifar-10-batches-bin/, or train.npz and test.npz, into"
    )
    with pytest.raises(DataError, match=names):
        cifar10(tmp_path, "test", seed=0, val_fraction=0.1)
    assert list(tmp_path.iterdir()) == []


def write_release(folder: Path, monkeypatch, others: dict[str, bytes]) -> dict[str, np.ndarray]:
    """An archive of the form of the published one, with other members beside; its records, by part."""
    release = getattr(cifar, folder.name.upper())
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    records = {}
    with tarfile.open(folder / release.archive, "w:gz") as tar:
        for name, content in others.items():
            tar.addfile(sized(name, content), io.BytesIO(content))
        link = tarfile.TarInfo(str(release.members["test"][0]) + "/link")
        link.type, link.linkname = tarfile.SYMTYPE, str(folder.parents[1])
        tar.addfile(link)
        for part, members in release.members.items():
            records[part] = rng.integers(0, 10, (4 * len(members), release.labels + 3072), dtype=np.uint8)
            for k, name in enumerate(members):
                content = records[part][4 * k : 4 * k + 4].tobytes()
                tar.addfile(sized(name, content), io.BytesIO(content))
    md5 = hashlib.md5((folder / release.archive).read_bytes()).hexdigest()
    monkeypatch.setattr(cifar, folder.name.upper(), replace(release, md5=md5))
    return records


def sized(name: str, content: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_unpacked_files_of_cifar_are_read(tmp_path, monkeypatch, name):
    release, folder = getattr(cifar, name.upper()), tmp_path / name
    write_release(folder, monkeypatch, {})
    packed = getattr(cifar, name)(tmp_path, "test", seed=0, val_fraction=0.25)
    with tarfile.open(folder / release.archive) as tar:
        for member in release.members["train"] + release.members["test"]:
            (folder / member).parent.mkdir(exist_ok=True)
            (folder / member).write_bytes(tar.extractfile(member).read())
    for cached in (release.archive, "train.npz", "test.npz"):
        (folder / cached).unlink()
    unpacked = getattr(cifar, name)(tmp_path, "test", seed=0, val_fraction=0.25)
    assert unpacked.fingerprint == packed.fingerprint
    cut = folder / release.members["train"][-1]
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    shorter = getattr(cifar, name)(tmp_path, "test", seed=0, val_fraction=0.25)
    assert len(shorter.train_labels) < len(packed.train_labels)
    cut.write_bytes(whole)
    assert getattr(cifar, name)(tmp_path, "test", seed=0, val_fraction=0.25).fingerprint == packed.fingerprint
    cut.write_bytes(bytes([*whole[: release.labels - 1], 200, *whole[release.labels :]]))
    with pytest.raises(DataError, match=rf"{cut}: damaged \(a label of 200\); delete it"):
        getattr(cifar, name)(tmp_path, "test", seed=0, val_fraction=0.25)
    cut.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"{cut}: \d+ bytes are no records of 307\d; delete it"):
        getattr(cifar, name)(tmp_path, "test", seed=0, val_fraction=0.25)
    cut.write_bytes(whole[: len(whole) // 2])
    test = folder / release.members["test"][-1]
    whole_test = test.read_bytes()
    test.write_bytes(whole_test[:-1])
    with pytest.raises(DataError, match=rf"{test}: \d+ bytes"):  # after the other part has been read
        getattr(cifar, name)(tmp_path, "test", seed=0, val_fraction=0.25)
    cut.write_bytes(whole)
    test.write_bytes(whole_test)
    assert getattr(cifar, name)(tmp_path, "test", seed=0, val_fraction=0.25).fingerprint == packed.fingerprint


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_archive_of_cifar_is_read_and_nothing_else_of_it_written(tmp_path, monkeypatch, name):
    root = tmp_path / "data"
    release = getattr(cifar, name.upper())
    outside = {"../../escape": b"x", "../escape": b"x", str(tmp_path / "absolute"): b"x"}
    records = write_release(root / name, monkeypatch, outside)
    getattr(cifar, name)(root, "test", seed=0, val_fraction=0.25)
    for part, written in records.items():
        with np.load(root / name / f"{part}.npz") as file:
            images, labels = file["images"], file["labels"]
        assert labels.tolist() == written[:, release.labels - 1].tolist()
        for image, record in zip(images, written, strict=True):
            for channel, row, column in [(0, 0, 0), (1, 5, 31), (2, 31, 7)]:
                assert image[row, column, channel] == record[release.labels + 1024 * channel + 32 * row + column]
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == {
        f"data/{name}/{file}" for file in (release.archive, "train.npz", "test.npz")
    }


def test_another_archive_than_the_published_one_is_not_opened(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / cifar.CIFAR10.archive).write_bytes(b"anything")
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz: not the published file \(MD5 sum c32a.*delete"):
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
        ({"images": np.zeros((4, 32, 32, 3), np.uint8), "labels": np.zeros(4, int)}, "the same value everywhere"),
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


@pytest.mark.data
def test_real_cifar(data_dir):
    data = cifar10(data_dir, "test", seed=0, val_fraction=0.1)
    assert isinstance(data, InMemoryImages)
    assert data.warnings == []
    assert data.train_labels.bincount().tolist() == [5000] * 10
    torch.testing.assert_close(torch.tensor(data.mean) / 255, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4, rtol=0)
