"""JPEG images, from the bytes of a file to a batch: workers decode and crop them, the device normalizes them."""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import IO, Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lawn.child_signals import end_on_parents_sigterm, signals_blocked
from lawn.data.prefetch import on_device
from lawn.errors import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training set, for pixels from 0 to 1
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a training crop: its share of the area, its aspect ratio
Crop = Callable[[Any], Tensor]
# A spawned rank would otherwise spawn its workers too, and each would import torch for seconds.
METHOD = "fork" if sys.platform == "linux" else "spawn"


class JPEGImages:
    """Base class of the datasets of JPEG images, in folders or shards."""

    def __init__(self, num_classes: int, image_size: int, workers: int, warnings: list[str]) -> None:
        self.num_classes = num_classes
        self.shape = (3, image_size, image_size)
        self.workers = workers
        self.warnings = warnings
        self.device = torch.device("cpu")
        self.augment, self.plain = crops(image_size)

    def to(self, device: torch.device) -> Self:
        self.device = device
        return self

    def order_depends_on(self, world_size: int) -> list[int]:
        """What the order of an epoch depends on, besides its seed, on so many ranks."""
        return []

    def _loader(self, dataset: Any, **options: Any) -> DataLoader:
        """A loader that does not draw from the global random generator."""
        return DataLoader(
            dataset,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
            multiprocessing_context=METHOD if self.workers else None,
            worker_init_fn=end_on_parents_sigterm,
            **options,
        )

    def _iterate(self, loader: DataLoader) -> Iterator[Any]:
        """The loader's batches; starts its workers, with signals blocked."""
        with signals_blocked(METHOD):
            return iter(loader)

    def _batches(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        """The loader's batches on the device: float images [B, 3, S, S] and labels [B]."""
        try:
            for images, labels in on_device(self._iterate(loader), self.device):
                yield normalized(images), labels
            return
        except DataError as error:  # a worker's error comes with its traceback as text
            line = " ".join(str(error).rpartition("DataError: ")[2].splitlines())  # names may have line breaks
            error.__traceback__ = None  # its frames would keep the loader alive, whose collection waits 5 s
        raise DataError(line)


def draw_epoch(seed: int, samples: int) -> tuple[Tensor, Tensor]:
    """The random order of an epoch and the augmentation seed of each sample: both int64 [samples]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(samples, generator=generator), torch.randint(2**32, (samples,), generator=generator)


def decode(file: str | IO[bytes], name: str = "", remedy: str = "put the image there again, or remove it") -> Any:
    """The image of a file, converted to RGB. Raises DataError that names the file and the remedy."""
    from PIL import Image  # comes with torchvision

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise many types
        reason = str(error).partition("\n")[0]
        raise DataError(f"{name or file}: cannot be decoded ({reason}); {remedy}") from error


def crops(size: int) -> tuple[Crop, Crop]:
    """Transforms to uint8 [size, size, 3]: random crop and flip for training, center crop for evaluation."""
    from torchvision.transforms import v2  # seconds to import: only for those who use it

    augment = v2.Compose([v2.RandomResizedCrop(size, SCALE, RATIO), v2.RandomHorizontalFlip(), _pixels])
    plain = v2.Compose([v2.Resize(short_side(size)), v2.CenterCrop(size), _pixels])
    return augment, plain


def short_side(size: int) -> int:
    """The short side, in pixels, of an image whose center of `size` pixels is evaluated."""
    return round(size * 256 / 224)


def seeded(crop: Crop, image: Any, seed: int) -> Tensor:
    """The crop drawn by `seed`; the state of the global random generator does not matter and does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        return crop(image)


def normalized(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W], in the same memory layout (channels_last)."""
    mean, std = _statistics(images.device)
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in units of pixels. Cached, because a copy to a GPU waits for its work."""
    mean, std = 255 * torch.tensor([MEAN, STD], device=device)
    return mean, std


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image))
