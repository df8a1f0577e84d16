"""Shards of a dozen images: 5, 5 and 2 for training, and as many for evaluation."""

import io
import json
import pickle
import shutil
import sys
import tarfile
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from lawn.data.batching import Batching
from lawn.data.fingerprint import differences
from lawn.data.folders import CHECKSUM
from lawn.data.imagenet import imagenet
from lawn.data.shards import ShardImages
from lawn.errors import ConfigError, DataError
from lawn.files import locked
from scripts.make_shards import LOCK, main
from tests.helpers import compose, write_folders

KEYS = {"seed": 0, "val_fraction": 0.1, "image_size": 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Holds `imagenet`, folders, and `shards` made of them."""
    root = tmp_path_factory.mktemp("shards")
    write_folders(root)
    assert main([str(root / "imagenet"), str(root / "shards"), "--maxcount", "5"]) == 0
    return root


@pytest.fixture
def shards(root, tmp_path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(root / "shards", tmp_path / "shards"))


def load(shards: Path | str, split: str = "test", workers: int = 0, **keys) -> ShardImages:
    data = imagenet(Path(), split, shards=str(shards), workers=workers, **{**KEYS, **keys})
    assert isinstance(data, ShardImages)
    return data


def rows(images: torch.Tensor, labels: torch.Tensor) -> list[tuple[bytes, int]]:
    return [(image.numpy().tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True)]


def epoch(data: ShardImages, seed: int, batching: Batching) -> list[tuple[bytes, int]]:
    """The samples of one rank that count; that the parts have the sizes they are to have is checked on the way."""
    seen = []
    for part, (images, labels) in data.train_batches(batching, torch.Generator().manual_seed(seed)):
        assert images.shape == (part.stop - part.start, 3, 16, 16)
        seen += rows(images, labels) if part.share else []
    return seen


def test_evaluation_has_every_image_once(root):
    folders = imagenet(root, "test", workers=0, **KEYS)
    expected = Counter(row for batch in folders.eval_batches() for row in rows(*batch))
    assert len(expected) == 12
    for world, workers in ((1, 0), (1, 2), (2, 0), (5, 0), (13, 0)):
        data = load(root / "shards", workers=workers)
        seen = [
            row for r in range(world) for batch in data.eval_batches(r, world, batch_size=2) for row in rows(*batch)
        ]
        assert Counter(seen) == expected


@pytest.mark.parametrize(("batch_size", "micro"), [(12, None), (5, 2), (7, 3), (2, None)])
def test_an_epoch_has_every_image_once_however_it_is_shared_out(root, batch_size, micro):
    data = load(root / "shards")
    expected = Counter(epoch(data, 3, Batching(12)))
    assert len(expected) == 12
    assert Counter(label for _, label in expected) == {0: 4, 1: 4, 2: 4}
    for world in (1, 2, 3, 7):  # there are three shards
        seen = [row for rank in range(world) for row in epoch(data, 3, Batching(batch_size, micro, rank, world))]
        assert Counter(seen) == expected


def test_workers_share_an_epoch_and_the_seed_decides_it(root):
    data = load(root / "shards", workers=2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (epoch(data, seed, Batching(7, 2)) for seed in (3, 3, 4))
    assert first == again
    assert Counter(first) == Counter(epoch(load(root / "shards"), 3, Batching(12)))
    assert not set(first) & set(other)
    assert [label for _, label in first] != [label for _, label in other]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_the_places_of_evaluation_images(root, workers, world):
    """Outcomes of runs with other workers or ranks are compared image by image."""
    expected = [row for batch in load(root / "shards").eval_batches(batch_size=2) for row in rows(*batch)]
    found: list[tuple[bytes, int]] = []
    for rank in range(world):
        data = load(root / "shards", workers=workers)
        mine = [row for batch in data.eval_batches(rank, world, batch_size=2) for row in rows(*batch)]
        places = data.eval_places(rank, world, batch_size=2).tolist()
        found += [row for _, row in sorted(zip(places, mine, strict=True), key=lambda pair: pair[0])]
    assert found == expected


def test_statistics_and_validation(root):
    data = load(root / "shards")
    assert list(data.statistics().values()) == [12, 12, 3, 3]
    assert len(data.warnings) == 3
    data = load(root / "shards", "val")
    assert (data.num_train, sum(len(labels) for _, labels in data.eval_batches())) == (10, 2)
    assert len(epoch(data, 0, Batching(4))) == 10
    assert load(root / "shards", "val", val_fraction=0.3).num_train == 5
    with pytest.raises(ConfigError, match=r"dataset.val_fraction=0.8: .* whole shards, and .*shards has 3; make small"):
        load(root / "shards", "val", val_fraction=0.8)


def test_shards_behind_urls(root, tmp_path):
    expected = epoch(load(root / "shards"), 0, Batching(5))
    assert epoch(load(f"pipe:cat {root}/shards/{{}}"), 0, Batching(5)) == expected
    assert epoch(load(f"file:{root}/shards/"), 0, Batching(5)) == expected
    for elsewhere in (f"pipe:cat {root}/shards/{{}}", f'pipe:cat "{root}/shards/{{}}" -', f"file:{root}/shards/{{}}"):
        assert load(elsewhere).fingerprint == load(root / "shards").fingerprint
    list(load(f"pipe:cat {root}/shards/{{}}").eval_batches(0, 5))  # reads less than a shard
    with pytest.raises(
        DataError, match=r"^pipe:cat .*: the command that reads it ended with code 1; python -m scripts"
    ):
        load(f"pipe:cat {tmp_path}/{{}} 2>/dev/null")
    with pytest.raises(DataError, match=r"^s3://bucket/index.json: .*no gopen handler"):
        load("s3://bucket")


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_shards_of_a_web_server(root, tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert epoch(load(f"{url}/shards"), 0, Batching(5)) == epoch(load(root / "shards"), 0, Batching(5))
        with pytest.raises(DataError, match=r"^http://.*/index.json: the command that reads it ended with code 22;"):
            load(f"{url}/nothing")
        server.shutdown()


def rewrite(path: Path, name: str, content: bytes | None) -> None:
    """Replace, add or (None) remove a file of a tar."""
    with tarfile.open(path) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar]
    files = [(n, content if n == name else data) for n, data in files if n != name or content is not None]
    if content is not None and name not in dict(files):
        files.append((name, content))
    with tarfile.open(path, "w") as tar:
        for n, data in files:
            info = tarfile.TarInfo(n)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def names(path: Path, suffix: str) -> list[str]:
    with tarfile.open(path) as tar:
        return [name for name in tar.getnames() if name.endswith(suffix)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", r"train-000001.tar: unexpected end of data after 0 samples; get the shard again$"),
        ("cut between files", r"train-000001.tar: 3 samples, but index.json has 5; get both again$"),
        ("shorter", r"train-000001.tar: 3 samples, but index.json has 5; get both again$"),
        ("longer", r"train-000001.tar: 6 samples, but index.json has 5; get both again$"),
        ("text", r"train-000001.tar: .* after 0 samples; get the shard again$"),
        ("empty", r"train-000001.tar: .* after 0 samples; get the shard again$"),
        ("absent", r"train-000001.tar: No such file or directory after 0 samples; get the shard again$"),
        (
            "image",
            r"train-000001.tar: 0000000\d/n\d+/\d_JPEG: cannot be decoded \(.*; get the shard again, or make",
        ),
        ("no image", r"train-000001.tar: 0000000\d/n\d+/\d_JPEG: cannot be decoded"),
        ("class", r"train-000001.tar: 0000000\d/n\d+/\d_JPEG: its class is b'3', index.json has 3; get"),
        ("no class", r"train-000001.tar: 0000000\d/n\d+/\d_JPEG: its class is b'', index.json has 3; get"),
    ],
)
def test_damage_is_named(shards, damage, message):
    path = shards / "train-000001.tar"
    jpeg, label = names(path, ".jpg")[2], names(path, ".cls")[2]
    if damage.startswith("cut"):
        with tarfile.open(path) as tar:
            start = {member.name: member.offset for member in tar}[names(path, ".cls")[3]]
        path.write_bytes(path.read_bytes()[: 2000 if damage == "cut" else start])
    elif damage in ("text", "empty"):
        path.write_bytes(b"<html>" * 500 if damage == "text" else b"")
    elif damage == "absent":
        path.unlink()
    elif damage == "shorter":
        for name in (*names(path, ".jpg")[3:], *names(path, ".cls")[3:]):
            rewrite(path, name, None)
    else:
        name, content = {
            "longer": ("one/more.jpg", b""),
            "image": (jpeg, b"\xff\xd8\xff broken"),
            "no image": (jpeg, None),
            "class": (label, b"3"),
            "no class": (label, None),
        }[damage]
        rewrite(path, name, content)
    with pytest.raises(DataError, match=message) as error:
        epoch(load(shards, workers=int(damage in ("cut", "image"))), 0, Batching(5))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("train-000000.tar", r"begins with 00000000/n\d+/\d_JPEG, but index.json has 00000005/n\d+/\d_JPEG"),
        ("val-000001.tar", r"begins with 00000005/n00000001/1_JPEG, but index.json has 00000005/n\d+/\d_JPEG"),
    ],
)
def test_another_shard_of_the_same_size_is_not_trained_on(shards, other, message):
    """As a synchronization leaves it that was interrupted, or a file with a wrong name."""
    shutil.copy(shards / other, shards / "train-000001.tar")
    with pytest.raises(DataError, match=rf"train-000001.tar: {message}; get both again$"):
        epoch(load(shards), 0, Batching(5))


def test_an_edited_index_is_read(shards):
    """Without a shard, or without a sample that could not be decoded."""
    index = json.loads((shards / "index.json").read_text())
    del index["train"]["train-000000.tar"]
    index["train"]["train-000001.tar"] = 4
    (shards / "index.json").write_text(json.dumps(index))
    rewrite(shards / "train-000001.tar", names(shards / "train-000001.tar", ".jpg")[2], None)
    rewrite(shards / "train-000001.tar", names(shards / "train-000001.tar", ".cls")[2], None)
    assert len(epoch(load(shards), 0, Batching(5))) == 6


def test_the_fingerprint_tells_what_was_packed(root, shards, tmp_path):
    """That of the folders, and another one of shards with the same names and sizes; an older index has none."""
    folders = imagenet(root, "test", workers=0, **KEYS).fingerprint
    packed = load(shards).fingerprint
    assert packed[CHECKSUM] == folders[CHECKSUM]
    assert differences(folders, packed) == ""
    write_folders(tmp_path)
    image = tmp_path / "imagenet" / "train" / "n00000001" / "2.JPEG"
    image.rename(image.with_name("other.JPEG"))
    assert main([str(tmp_path / "imagenet"), str(tmp_path / "made"), "--maxcount", "5"]) == 0
    assert differences(packed, load(tmp_path / "made").fingerprint).startswith(CHECKSUM)
    index = json.loads((shards / "index.json").read_text())
    del index["checksum"], index["first keys"]
    (shards / "index.json").write_text(json.dumps(index))
    assert differences(packed, load(shards).fingerprint) == ""


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_not_loaded(shards, tmp_path):
    expected = epoch(load(shards), 0, Batching(5))
    for path in shards.glob("*.tar"):
        for name in names(path, ".jpg"):
            for kind in ("pyd", "pkl", "pickle", "pth", "ten"):
                rewrite(path, name.replace(".jpg", f".{kind}"), pickle.dumps(Bomb(tmp_path / "went-off")))
        with tarfile.open(path) as tar:  # the files of a sample side by side, as webdataset wants them
            files = sorted((member.name, tar.extractfile(member).read()) for member in tar)
        path.unlink()
        with tarfile.open(path, "w") as tar:
            for name, data in files:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert epoch(load(shards), 0, Batching(5)) == expected
    assert sum(len(labels) for _, labels in load(shards).eval_batches()) == 12
    assert not (tmp_path / "went-off").exists()


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"classes": [], "train": {"a.tar": 1}, "val": {"b.tar": 1}}',
        '{"classes": ["a"], "train": {}, "val": {"b.tar": 1}}',
        '{"classes": ["a"], "train": {"a.tar": 0}, "val": {"b.tar": 1}}',
        '{"classes": ["a"], "train": {"a.tar": true}, "val": {"b.tar": 1}}',
        '{"classes": ["a"], "train": {"a.tar": "1"}, "val": {"b.tar": 1}}',
        '{"classes": ["a"], "train": ["a.tar"], "val": {"b.tar": 1}}',
        '{"classes": ["a"], "train": {"../a.tar": 1}, "val": {"b.tar": 1}}',
        '{"classes": ["a"], "train": {"a.tar; touch b": 1}, "val": {"b.tar": 1}}',
        '{"classes": ["a"], "train": {"-a.tar": 1}, "val": {"b.tar": 1}}',
    ],
)
def test_an_index_that_is_none(tmp_path, index):
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(DataError, match=r"^/.*/index.json: not an index of shards; python -m scripts.make_shards"):
        load(tmp_path)


def test_an_index_that_is_absent(tmp_path):
    with pytest.raises(DataError, match=r"^/.*/index.json: No such file or directory; python -m scripts.make_shards"):
        load(tmp_path)


def test_keys_that_exclude_each_other(monkeypatch):
    for override, message in (("limit=5", r"dataset.limit=5: needs folders"), ("loader=dali", "dataset.loader=dali: ")):
        with pytest.raises(ConfigError, match=message):
            compose("dataset=imagenet", "dataset.shards=somewhere", f"dataset.{override}")
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.filters", None)
    monkeypatch.delitem(sys.modules, "lawn.data.shards")
    with pytest.raises(ConfigError, match=r"dataset.shards: .* not installed; pip install '.\[shards\]'$"):
        load("somewhere")


def test_a_folder_that_another_process_writes_shards_to_is_refused(root, tmp_path, capsys):
    """Both would write the same names, and one index would be that of the other's shards."""
    with locked(tmp_path / LOCK):
        assert main([str(root / "imagenet"), str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: another process writes shards there\n"
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert main([str(root / "imagenet"), str(tmp_path)]) == 0


def test_the_script_keeps_bytes_and_refuses_to_overwrite(root, tmp_path, capsys):
    index = json.loads((root / "shards" / "index.json").read_text())
    assert index["classes"] == ["n00000000", "n00000001", "n00000002"]
    assert index["train"] == {"train-000000.tar": 5, "train-000001.tar": 5, "train-000002.tar": 2}
    with tarfile.open(root / "shards" / "val-000000.tar") as tar:
        first = tar.extractfile("00000000/n00000000/0_JPEG.jpg").read()
    assert first == (root / "imagenet" / "val" / "n00000000" / "0.JPEG").read_bytes()
    again = ["--maxcount", "5"]
    assert main([str(root / "imagenet"), str(tmp_path / "100%d"), *again]) == 0
    for path in (root / "shards").iterdir():
        assert (tmp_path / "100%d" / path.name).read_bytes() == path.read_bytes()
    capsys.readouterr()
    assert main([str(root / "imagenet"), str(root / "shards")]) == 1
    assert main([str(tmp_path), str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err.count("\n") == 2
    assert not (tmp_path / "new").exists()


def test_the_script_names_shards_of_another_run(root, shards, capsys):
    """One that was killed, and wrote smaller ones."""
    (shards / "index.json").unlink()
    assert main([str(root / "imagenet"), str(shards)]) == 0
    assert "4 other shards, such as train-000001.tar; delete them" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["train", "val"])
def test_the_script_packs_no_damaged_image(tmp_path, capsys, part):
    write_folders(tmp_path)
    path = tmp_path / "imagenet" / part / "n00000001" / "2.JPEG"
    path.write_bytes(path.read_bytes()[:-300])
    assert main([str(tmp_path / "imagenet"), str(tmp_path / "shards")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: cannot be decoded (")
    assert err.endswith("; put the image there again, or remove it\n")
    assert not (tmp_path / "shards" / "index.json").exists()
    path.unlink()
    assert main([str(tmp_path / "imagenet"), str(tmp_path / "shards")]) == 0
