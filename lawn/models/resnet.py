"""ResNet-50 from timm, with the last batch-norm gain of every block at zero (Goyal et al. 2018)."""

from torch import nn


def resnet50(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    import timm  # seconds to import: only for those who use it

    return timm.create_model("resnet50", in_chans=shape[0], num_classes=num_classes, zero_init_last=True)
