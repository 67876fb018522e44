"""All readers, by name."""

from __future__ import annotations

from reliability.fuzz.cifar_readers import CIFAR_READERS
from reliability.fuzz.image_readers import IMAGE_READERS
from reliability.fuzz.run_readers import RUN_READERS
from reliability.fuzz.weight_readers import WEIGHT_READERS

READERS = {reader.name: reader for reader in (*CIFAR_READERS, *IMAGE_READERS, *WEIGHT_READERS, *RUN_READERS)}
