"""Faster R-CNN on ResNet-101, VOC 2007 and 2012 (Table 7: 76.4 % on VOC 2007 test).

python train.py configs/voc_resnet101.py --data.dir VOCdevkit --init-from IMAGENET_RESNET101
"""

from resnet_jax.config import Config
from resnet_jax.recipes import voc_recipe


def get_config() -> Config:
    return voc_recipe("imagenet", 101)
