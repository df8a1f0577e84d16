"""Photographs, from the bytes of a file to a batch: decoded and cropped by workers, normalized on the device."""

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

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training set, in units of 1; constants
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a training crop: its share of the area, its width by its height
Crop = Callable[[Any], Tensor]
# A rank that was spawned would spawn its workers too, each of which would import torch for seconds.
METHOD = "fork" if sys.platform == "linux" else "spawn"


class JPEGImages:
    """What datasets of photographs have in common, wherever their files lie."""

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

    def _loader(self, dataset: Any, **options: Any) -> DataLoader:
        """A loader that leaves the global random numbers alone."""
        return DataLoader(
            dataset,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
            multiprocessing_context=METHOD if self.workers else None,
            worker_init_fn=end_on_parents_sigterm,
            **options,
        )

    def _begun(self, loader: DataLoader) -> Iterator[Any]:
        """The loader's batches, with its workers at work."""
        with signals_blocked(METHOD):
            return iter(loader)

    def _batches(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        """The loader's batches on the device: float images [B, 3, S, S] and labels [B]."""
        try:
            for images, labels in on_device(self._begun(loader), self.device):
                yield normalized(images), labels
            return
        except DataError as error:  # from a worker it comes with the worker's traceback around it
            line = str(error).splitlines()[-1].partition("DataError: ")[2] or str(error)
            error.__traceback__ = None  # its frames would keep the loader for the garbage collector: it waits for 5 s
        raise DataError(line)


def epoch(seed: int, samples: int) -> tuple[Tensor, Tensor]:
    """The random order of an epoch, and for each sample the seed of its augmentation: int64 [samples] both."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(samples, generator=generator), torch.randint(2**32, (samples,), generator=generator)


def decode(file: str | IO[bytes], name: str = "", remedy: str = "put the image there again, or remove it") -> Any:
    """The image of a file in RGB, be it grayscale or CMYK. Raises DataError that names the file and the remedy."""
    from PIL import Image  # comes with torchvision

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # a decoder raises what the damage makes it raise
        reason = str(error).partition("\n")[0]
        raise DataError(f"{name or file}: cannot be decoded ({reason}); {remedy}") from error


def crops(size: int) -> tuple[Crop, Crop]:
    """From a decoded image to uint8 [size, size, 3]: the random crop and flip of training, the center of evaluation."""
    from torchvision.transforms import v2  # seconds to import: only for those who use it

    augment = v2.Compose([v2.RandomResizedCrop(size, SCALE, RATIO), v2.RandomHorizontalFlip(), _pixels])
    plain = v2.Compose([v2.Resize(short_side(size)), v2.CenterCrop(size), _pixels])
    return augment, plain


def short_side(size: int) -> int:
    """Of the resized image whose center of that size is evaluated, in pixels."""
    return round(size * 256 / 224)


def seeded(crop: Crop, image: Any, seed: int) -> Tensor:
    """The crop that `seed` draws, whatever was drawn before; what is drawn afterwards does not depend on it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for the GPUs too
        return crop(image)


def normalized(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] as float [B, 3, H, W], in memory as it was (channels_last)."""
    mean, std = _statistics(images.device)
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation in units of pixels. Kept, since a copy to a GPU would wait for all that goes on there."""
    mean, std = 255 * torch.tensor([MEAN, STD], device=device)
    return mean, std


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image))
