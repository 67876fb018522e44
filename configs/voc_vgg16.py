"""Faster R-CNN on VGG-16, VOC 2007 and 2012 (Table 7: 73.2 % on VOC 2007 test).

python train.py configs/voc_vgg16.py --data.dir VOCdevkit --init-from VGG16
"""

from resnet_jax.config import Config
from resnet_jax.recipes import voc_recipe


def get_config() -> Config:
    return voc_recipe("vgg", 16)
