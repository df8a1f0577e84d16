"""A straightforward baseline for training on images, to compare the benchmarks with: a DataLoader with torchvision's
transforms, the model as it is made, in fp32, torch's Adam."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lawn.data.cifar import PADDING

WORKERS = os.cpu_count() or 1


class Pictures(Dataset):
    """An array of images, one by one, as torchvision's datasets return them."""

    def __init__(self, file: Path, transform: Callable[[Image.Image], Tensor], count: int | None) -> None:
        with np.load(file) as content:
            self.images, self.labels = content["images"][:count], content["labels"][:count].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain_cifar(root: Path, count: int | None = None) -> Dataset:
    augment = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=PADDING),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ]
    )
    return Pictures(root / "cifar10" / "train.npz", augment, count)


def plain_imagenet(root: Path, size: int) -> Dataset:
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return ImageFolder(str(root / "imagenet" / "train"), augment)


def discard(image: Image.Image) -> int:
    return 0


def plain_loader(samples: Dataset, batch_size: int, device: torch.device) -> DataLoader:
    pinned = device.type == "cuda"
    return DataLoader(
        samples, batch_size, shuffle=True, num_workers=WORKERS, pin_memory=pinned, persistent_workers=True
    )


class Plain:
    """The plain loop."""

    def __init__(self, model: nn.Module, loader: DataLoader, device: torch.device) -> None:
        self.model, self.loader, self.device = model, loader, device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def epoch(self) -> None:
        self.model.train()
        for images, labels in self.loader:
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images), labels).backward()
            self.optimizer.step()
