"""VGG-19 for CIFAR (Simonyan & Zisserman 2014; paper section 4.2)."""

from torch import Tensor, nn

from lawn.errors import ConfigError

STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # width and number of convolutions


class VGG19(nn.Module):
    """VGG-19 with one fully connected layer, for 32 x 32 images.

    It has 16 convolutions 3 x 3 with ReLU in five stages, max pooling after each stage and a linear layer. Convolutions
    have He initialization. Without batch normalization and biases the network is positively homogeneous in each layer.

    Args:
        shape: shape (channels, 32, 32) of an image.
        num_classes: number K of classes.
        batch_norm: whether batch normalization follows each convolution, which then has no bias.
        bias: whether the layers have biases.

    Raises:
        ConfigError: if images are not 32 x 32.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int, *, batch_norm: bool, bias: bool = True) -> None:
        super().__init__()
        if shape[1:] != (32, 32):
            raise ConfigError(f"model=vgg19: its CIFAR form takes 32 x 32 images, not {shape[1]} x {shape[2]}")
        layers: list[nn.Module] = []
        channels = shape[0]
        for width, depth in STAGES:
            for _ in range(depth):
                layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=bias and not batch_norm))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes, bias=bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, 32, 32] to logits [B, K]."""
        return self.head(self.features(images).flatten(1))
