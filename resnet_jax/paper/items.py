"""The tables and figures of the paper: what each shows, and the errors that the paper prints in it."""

from __future__ import annotations

import dataclasses
from typing import Literal

FLOPS = {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}  # multiply-adds of an image in 1e9, by depth (Table 1)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of test errors.

    Attributes:
      title: the paper's caption in short.
      labels: names of the first columns.
      errors: names of the columns of numbers.
      protocol: that the networks are tested by.
      lines: (labels, the paper's errors in %, our network or None); a label that is missing is our count of parameters.
    """

    title: str
    labels: tuple[str, ...]
    errors: tuple[str, ...]
    protocol: Literal["single", "10crop", "multiscale"]
    lines: tuple[tuple[tuple[str, ...], tuple[str, ...], str | None], ...]


TABLES = {
    "table2": Table(
        "Table 2: top-1 error (%, 10-crop testing) on ImageNet validation; ResNets with option A",
        ("depth", "network"),
        ("top-1 error",),
        "10crop",
        (
            (("18 layers", "plain"), ("27.94",), "imagenet_plain18"),
            (("18 layers", "ResNet"), ("27.88",), "imagenet_resnet18"),
            (("34 layers", "plain"), ("28.54",), "imagenet_plain34"),
            (("34 layers", "ResNet"), ("25.03",), "imagenet_resnet34A"),
        ),
    ),
    "table3": Table(
        "Table 3: error (%, 10-crop testing) on ImageNet validation",
        ("model",),
        ("top-1 error", "top-5 error"),
        "10crop",
        (
            (("VGG-16",), ("28.07", "9.33"), "imagenet_vgg16"),
            (("GoogLeNet",), ("", "9.15"), None),
            (("PReLU-net",), ("24.27", "7.38"), None),
            (("plain-34",), ("28.54", "10.02"), "imagenet_plain34"),
            (("ResNet-34 A",), ("25.03", "7.76"), "imagenet_resnet34A"),
            (("ResNet-34 B",), ("24.52", "7.46"), "imagenet_resnet34B"),
            (("ResNet-34 C",), ("24.19", "7.40"), "imagenet_resnet34C"),
            (("ResNet-50",), ("22.85", "6.71"), "imagenet_resnet50"),
            (("ResNet-101",), ("21.75", "6.05"), "imagenet_resnet101"),
            (("ResNet-152",), ("21.43", "5.71"), "imagenet_resnet152"),
        ),
    ),
    "table4": Table(
        "Table 4: error (%) of single models on ImageNet validation (ours: fully convolutional, five scales, mirrored)",
        ("method",),
        ("top-1 error", "top-5 error"),
        "multiscale",
        (
            (("VGG (ILSVRC'14)",), ("", "8.43 (test)"), None),
            (("GoogLeNet (ILSVRC'14)",), ("", "7.89"), None),
            (("VGG (v5)",), ("24.4", "7.1"), None),
            (("PReLU-net",), ("21.59", "5.71"), None),
            (("BN-inception",), ("21.99", "5.81"), None),
            (("ResNet-34 B",), ("21.84", "5.71"), "imagenet_resnet34B"),
            (("ResNet-34 C",), ("21.53", "5.60"), "imagenet_resnet34C"),
            (("ResNet-50",), ("20.74", "5.25"), "imagenet_resnet50"),
            (("ResNet-101",), ("19.87", "4.60"), "imagenet_resnet101"),
            (("ResNet-152",), ("19.38", "4.49"), "imagenet_resnet152"),
        ),
    ),
    "table6": Table(
        "Table 6: error (%) on the CIFAR-10 test set",
        ("method", "layers", "parameters, paper", "parameters, ours"),
        ("error",),
        "single",
        (
            (("Maxout", "", "", ""), ("9.38",), None),
            (("NIN", "", "", ""), ("8.81",), None),
            (("DSN", "", "", ""), ("8.22",), None),
            (("FitNet", "19", "2.5M", ""), ("8.39",), None),
            (("Highway", "19", "2.3M", ""), ("7.54 (7.72 ± 0.16)",), None),
            (("Highway", "32", "1.25M", ""), ("8.80",), None),
            (("ResNet", "20", "0.27M"), ("8.75",), "cifar10_resnet20"),
            (("ResNet", "32", "0.46M"), ("7.51",), "cifar10_resnet32"),
            (("ResNet", "44", "0.66M"), ("7.17",), "cifar10_resnet44"),
            (("ResNet", "56", "0.85M"), ("6.97",), "cifar10_resnet56"),
            (("ResNet", "110", "1.7M"), ("6.43 (6.61 ± 0.16)",), "cifar10_resnet110"),
            (("ResNet", "1202", "19.4M"), ("7.93",), "cifar10_resnet1202"),
        ),
    ),
}

# Table 5: the top-5 error of other ensembles, and of six ResNets, in %.
OTHER_ENSEMBLES = {
    "VGG (ILSVRC'14)": "7.32",
    "GoogLeNet (ILSVRC'14)": "6.66",
    "VGG (v5)": "6.8",
    "PReLU-net": "4.94",
    "BN-inception": "4.82",
}
ENSEMBLE = ("ResNet (ILSVRC'15)", "3.57")

Kind = Literal["train", "test"]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes: which networks, which errors."""

    title: str
    networks: tuple[str, ...]
    kinds: tuple[Kind, ...] = ("train", "test")
    ylabel: str = "error (%)"


@dataclasses.dataclass(frozen=True)
class Curves:
    """A figure of training curves; the ends of the paper's axes are in 1e4 iterations and % of error."""

    title: str
    panels: tuple[Panel, ...]
    iterations: float
    errors: tuple[float, float]


_PLAIN = ("cifar10_plain20", "cifar10_plain32", "cifar10_plain44", "cifar10_plain56")
_RESNETS = ("cifar10_resnet20", "cifar10_resnet32", "cifar10_resnet44", "cifar10_resnet56", "cifar10_resnet110")
CURVES = {
    "figure1": Curves(
        'Figure 1: training error (left) and test error (right) on CIFAR-10 of "plain" networks',
        (
            Panel("", ("cifar10_plain20", "cifar10_plain56"), ("train",), "training error (%)"),
            Panel("", ("cifar10_plain20", "cifar10_plain56"), ("test",), "test error (%)"),
        ),
        6.4,
        (0, 20),
    ),
    "figure4": Curves(
        "Figure 4: training on ImageNet; dashed: training error, bold: validation error of the center crops",
        (
            Panel("plain", ("imagenet_plain18", "imagenet_plain34")),
            Panel("ResNet", ("imagenet_resnet18", "imagenet_resnet34A")),
        ),
        60,
        (20, 60),
    ),
    "figure6": Curves(
        "Figure 6: training on CIFAR-10; dashed: training error, bold: test error",
        (
            Panel("plain", _PLAIN),
            Panel("ResNet", _RESNETS),
            Panel("ResNet", ("cifar10_resnet110", "cifar10_resnet1202")),
        ),
        6.4,
        (0, 20),
    ),
}

# Figure 7, and what the paper says of it: (network of the smaller responses, of the larger ones, the words).
RESPONSES = ("cifar10_plain20", "cifar10_plain56", "cifar10_resnet20", "cifar10_resnet56", "cifar10_resnet110")
_RESIDUAL = "ResNets have generally smaller responses than their plain counterparts"
_DEEPER = "the deeper ResNet has smaller magnitudes of responses"
CLAIMS = (
    ("resnet20", "plain20", _RESIDUAL),
    ("resnet56", "plain56", _RESIDUAL),
    ("resnet56", "resnet20", _DEEPER),
    ("resnet110", "resnet56", _DEEPER),
)

NAMES = (*sorted(("table1", "table5", *TABLES)), *CURVES, "figure7")
