"""VGG-19 in its CIFAR form (Simonyan & Zisserman 2014; paper section 4.2: one fully connected final layer)."""

from torch import Tensor, nn

from lawn.errors import ConfigError

STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # width and number of convolutions


class VGG19(nn.Module):
    """16 convolutions 3 x 3, each with batch norm (`batch_norm=True`) and ReLU, max pooling after each stage, and
    one linear layer 512 -> classes. Without batch norm the convolutions have biases, unless `bias=False`, which makes
    the network fully homogeneous. He initialization."""

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
        """Images [B, C, 32, 32] to logits [B, classes]."""
        return self.head(self.features(images).flatten(1))
