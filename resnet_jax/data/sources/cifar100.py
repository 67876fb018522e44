"""CIFAR-100, from its official folders or archives, by its 100 classes or its 20 superclasses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resnet_jax.data.sources.cifar import Form, Official, decode_pickle, decode_records, load_splits
from resnet_jax.data.types import Dataset

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
SHA256 = {  # of the official archives, as TensorFlow Datasets and Keras say
    "cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    "cifar-100-python.tar.gz": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
}
RECORDS = {"train.bin": 50_000, "test.bin": 10_000}
PICKLES = {  # MD5 of the official Python files, as torchvision says
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
FINE = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip
COARSE = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices",
    "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes", "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates",
    "people", "reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2",
)  # fmt: skip


def load_cifar100(name: str, data_dir: str | Path) -> Dataset:
    """Return CIFAR-100: 50,000 training and 10,000 test images [N, 32, 32, 3] uint8, in the official order.

    name: "cifar100", or "cifar100-coarse" for the superclasses; data_dir and errors: see cifar.load_splits().
    """
    coarse = name == "cifar100-coarse"
    class_names = COARSE if coarse else FINE

    def decode_binary(file: str, content: bytes) -> Any:
        return decode_records(content, RECORDS[file], 2, 0 if coarse else 1, len(class_names))

    def decode_python(file: str, content: bytes) -> Any:
        return decode_pickle(content, PICKLES[file], b"coarse_labels" if coarse else b"fine_labels")

    forms = (
        Form("cifar-100-binary", "cifar-100-binary.tar.gz", tuple(RECORDS), decode_binary),
        Form("cifar-100-python", "cifar-100-python.tar.gz", tuple(PICKLES), decode_python),
    )
    train, test = load_splits(data_dir, Official("CIFAR-100", forms, URL, SHA256))
    return Dataset(name, train, test, class_names)
