"""Backbones by name: networks that map images to features, built for the images of a scenario.

Each factory takes the shape of one image and options. It returns a module with ``width`` and ``features(x)``
(`clframe.model.Backbone`), which returns the features when it is called.
"""

from __future__ import annotations

import contextlib
import sys
from itertools import pairwise
from typing import Literal
from urllib.error import URLError
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe.errors import DataError, UsageError, did_you_mean
from clframe.options import Count


class FeatureNet(nn.Module):
    """A network whose output is its features.

    Args:
        net: a module that maps images [B, ...] to features [B, width].
        width: number of features.
    """

    def __init__(self, net: nn.Module, width: int) -> None:
        super().__init__()
        self.net = net
        self.width = width

    def features(self, x: Tensor) -> Tensor:
        """Return the features [B, width] of the images `x`."""
        features: Tensor = self.net(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Return the features [B, width] of the images `x`, as `features` does."""
        return self.features(x)


def mlp(input_shape: tuple[int, ...], *, hidden: list[Count] = [400, 400]) -> nn.Module:  # noqa: B006
    """Fully connected layers with ReLU after each, on the flattened image.

    Options:
        hidden: width of each layer.
    """
    if not hidden:
        raise UsageError("`model.hidden` is empty: `mlp` needs the width of one layer at least.")
    inputs = torch.Size(input_shape).numel()
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise([inputs, *hidden]):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return FeatureNet(nn.Sequential(*layers), hidden[-1])


def mlp_100(input_shape: tuple[int, ...]) -> nn.Module:
    """Two fully connected layers of 100 with ReLU after each, on the flattened image."""
    return mlp(input_shape, hidden=[100, 100])


def cnn_small(input_shape: tuple[int, ...], *, widths: list[Count] = [32, 32, 64]) -> nn.Module:  # noqa: B006
    """3x3 convolutions, each with BatchNorm and ReLU, then the average pixel; the second convolution has stride 2.

    For images from 8x8 (scikit-learn's digits) to 28x28 (MNIST).

    Options:
        widths: channels of each convolution.
    """
    if not widths:
        raise UsageError("`model.widths` is empty: `cnn-small` needs the width of one convolution at least.")
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise([_channels(input_shape, "cnn-small"), *widths])):
        layers += [_conv(fan_in, fan_out, 2 if i == 1 else 1), nn.BatchNorm2d(fan_out), nn.ReLU()]
    return FeatureNet(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), widths[-1])


def resnet32(input_shape: tuple[int, ...], *, last_relu: bool = True) -> nn.Module:
    """ResNet-32 for CIFAR: three stages of five blocks, of width 16, 32, 64; shortcuts without parameters.

    He et al., Deep residual learning for image recognition (2016), section 4.2, option A.

    Options:
        last_relu: end in a ReLU, as He et al. do; without it features can be negative, as in iCaRL's network.
    """
    channels = _channels(input_shape, "resnet32")
    return ResNet(channels, widths=(16, 32, 64), blocks=5, shortcut="A", last_relu=last_relu)


def resnet18(
    input_shape: tuple[int, ...], *, form: Literal["cifar", "imagenet"] = "cifar", last_relu: bool = True
) -> nn.Module:
    """ResNet-18: four stages of two blocks, of width 64, 128, 256, 512; projections as shortcuts.

    He et al., Deep residual learning for image recognition (2016), table 1, option B. The parameters are
    named as in torchvision's ``resnet18``, so that its weights can be loaded into the ``imagenet`` form.

    Options:
        form: `imagenet` begins with a 7x7 convolution of stride 2 and max pooling, for images near 224x224;
            `cifar` with a 3x3 convolution, for images near 32x32.
        last_relu: end in a ReLU.
    """
    channels = _channels(input_shape, "resnet18")
    widths = (64, 128, 256, 512)
    return ResNet(channels, widths=widths, blocks=2, shortcut="B", last_relu=last_relu, large=form == "imagenet")


class ResNet(nn.Module):
    """A residual network of basic blocks, up to and including the average over the image.

    Args:
        channels: number of channels of the images.
        widths: number of channels of each stage; every stage but the first halves the image.
        blocks: number of blocks of each stage.
        shortcut: where the shape changes, ``A`` takes every second pixel and adds channels of zeros, ``B`` is a 1x1
            convolution with BatchNorm.
        last_relu: end in a ReLU.
        large: begin with a 7x7 convolution of stride 2 and max pooling, not with a 3x3 convolution.
    """

    def __init__(
        self,
        channels: int,
        widths: tuple[int, ...],
        blocks: int,
        shortcut: Literal["A", "B"],
        last_relu: bool = True,
        large: bool = False,
    ) -> None:
        super().__init__()
        if large:
            self.conv1 = nn.Conv2d(channels, widths[0], 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = _conv(channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        self.stages = len(widths)
        fan_in = widths[0]
        for stage, fan_out in enumerate(widths):
            layer = nn.Sequential()
            for i in range(blocks):
                last = stage == len(widths) - 1 and i == blocks - 1
                stride = 2 if stage and not i else 1
                layer.append(BasicBlock(fan_in, fan_out, stride, shortcut, relu=last_relu or not last))
                fan_in = fan_out
            self.add_module(f"layer{stage + 1}", layer)
        self.width = widths[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """Return the features [B, width] of the images `x`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features [B, width] of the images `x`, as `features` does."""
        return self.features(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, beside a shortcut (see `ResNet`)."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, shortcut: Literal["A", "B"], relu: bool) -> None:
        super().__init__()
        self.conv1 = _conv(fan_in, fan_out, stride)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = _conv(fan_out, fan_out)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.relu = nn.ReLU()
        self.last = nn.ReLU() if relu else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or fan_in != fan_out:
            if shortcut == "A":
                self.downsample = Subsample(stride, fan_out - fan_in)
            else:
                projection = nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=False)
                self.downsample = nn.Sequential(projection, nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C', H / stride, W / stride]."""
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        summed: Tensor = self.last(out + self.downsample(x))
        return summed


class Subsample(nn.Module):
    """The shortcut of option A of He et al.: every `stride`-th pixel, and `extra` channels of zeros, half in front."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C + extra, H / stride, W / stride]."""
        front = self.extra // 2
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, front, self.extra - front))


def from_torchvision(input_shape: tuple[int, ...], variant: str, *, weights: bool | str = False) -> nn.Module:
    """Build a classifier of torchvision without its last linear layer, named ``torchvision:resnet50``, for example.

    Raises:
        UsageError: if torchvision has no such classifier or weights, or it cannot take the scenario's images.
        DataError: if the weights cannot be downloaded, or their file is damaged.

    Options:
        weights: torchvision weights to start from: true for the default ones, or a name, such as IMAGENET1K_V1.
    """
    from torchvision import models

    name = f"torchvision:{variant}"
    if variant not in (known := models.list_models(module=models)):
        raise UsageError(f"torchvision has no classifier `{variant}`.{did_you_mean(variant, known)}")
    if _channels(input_shape, name) != 3:
        raise UsageError(
            f"`{name}` takes images of 3 channels, and the scenario's have {input_shape[0]}: choose another "
            "model, or a scenario with color images."
        )
    chosen = None
    if weights:
        chosen = _weights(models.get_model_weights(variant), "DEFAULT" if weights is True else weights, name)
    net = models.get_model(variant, weights=chosen)
    if hasattr(net, "aux_logits"):
        raise UsageError(f"`{name}` has auxiliary classifiers, which a backbone cannot have: choose another model.")
    last, classifier = next(
        ((n, m) for n, m in reversed(list(net.named_modules())) if isinstance(m, nn.Linear)), ("", None)
    )
    if classifier is None:
        raise UsageError(f"`{name}` has no linear layer at its end that could be replaced: choose another model.")
    net.set_submodule(last, nn.Identity())
    width = classifier.in_features
    _check(net, input_shape, width, name)
    return FeatureNet(net, width)


def _weights(enum: type, weights: str, name: str) -> object:
    """Return the member `weights` of torchvision's `enum`, after making sure that its file holds tensors only.

    Args:
        enum: the weights that torchvision offers for the classifier.
        weights: name of a member of `enum`.
        name: name of the backbone, for error sentences.

    Raises:
        UsageError: if `enum` has no such member.
        DataError: if the file cannot be downloaded or read.
    """
    if weights not in (choices := list(getattr(enum, "__members__", {}))):
        raise UsageError(
            f"`model.weights` is {weights!r}, which `{name}` does not have.{did_you_mean(weights, choices)}"
        )
    chosen = getattr(enum, weights)
    try:
        # torchvision's own loading unpickles any object in a file; after this, the file is known to be safe
        with contextlib.redirect_stdout(sys.stderr):  # where torch announces a download
            chosen.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (URLError, TimeoutError, ConnectionError) as error:
        raise DataError(
            f"The weights of `{name}` could not be downloaded ({getattr(error, 'reason', error)}): put the "
            f"file of {chosen.url} into {torch.hub.get_dir()}/checkpoints, or leave out `model.weights`."
        ) from error
    except Exception as error:  # which exception torch.load raises depends on the damage
        path = f"{torch.hub.get_dir()}/checkpoints/{urlsplit(chosen.url).path.rsplit('/', 1)[-1]}"
        raise DataError(
            f"The weights of `{name}` could not be read from {path}: delete the file, or put that of "
            f"{chosen.url} there."
        ) from error
    return chosen


def _check(net: nn.Module, input_shape: tuple[int, ...], width: int, name: str) -> None:
    """Raise `UsageError` if `net` does not map images of `input_shape` to [B, width]."""
    net.eval()  # no running statistics move, no random numbers are drawn
    try:
        with torch.no_grad():
            out = net(torch.zeros(2, *input_shape))
    except Exception as error:  # a backbone may raise any exception for unsupported input sizes
        size = "x".join(map(str, input_shape[1:]))
        raise UsageError(f"`{name}` cannot take images of {size} pixels ({error}): choose another model.") from error
    net.train()
    if not isinstance(out, Tensor) or out.shape != (2, width):
        raise UsageError(f"`{name}` does not end in a linear layer on features [B, D]: choose another model.")


def _channels(input_shape: tuple[int, ...], name: str) -> int:
    """Return the number of channels of the images, or raise `UsageError` if their shape is not that of images."""
    if len(input_shape) != 3:
        raise UsageError(
            f"`{name}` takes images [channels, height, width], and the scenario's shape is {input_shape}: choose "
            "another model, such as mlp."
        )
    return input_shape[0]


def _conv(fan_in: int, fan_out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution without bias that keeps the size of the image, but for the stride."""
    return nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
