"""ResNet-50 from timm."""

from torch import nn


def resnet50(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Create a ResNet-50; the last batch normalization of each block starts with a scale of zero (Goyal et al. 2018).

    Args:
        shape: shape (channels, height, width) of an image.
        num_classes: number K of classes.

    Returns:
        A network that maps images [B, C, H, W] to logits [B, K].
    """
    import timm  # slow to import

    return timm.create_model("resnet50", in_chans=shape[0], num_classes=num_classes, zero_init_last=True)
