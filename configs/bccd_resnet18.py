"""Faster R-CNN on blood cells (github.com/Shenggan/BCCD_Dataset), trained from nothing in minutes on a CPU.

Not an experiment of the paper: ResNet-18 with a quarter of the filters, images of 300x400 pixels, and BN that is
trained, each image by itself, as there are no weights to begin with.

    python train.py configs/bccd_resnet18.py --data.dir BCCD     (the folder with Annotations, ImageSets, JPEGImages)
"""

from resnet_jax.config import Config, DataConfig, DetectionConfig, ModelConfig, OptimConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(family="imagenet", depth=18, width=0.25, shortcut="B", bn_group_size=1),
        data=DataConfig(
            name="voc",
            train_sets=("trainval",),
            test_sets=("test",),
            batch_size=2,
            eval_batch_size=2,
            mean=(0.738, 0.696, 0.714),
            std=(0.25, 0.25, 0.25),
        ),
        optim=OptimConfig(
            learning_rate=0.02, boundaries=(1500, 1800), weight_decay=1e-4, warmup="linear", warmup_steps=100
        ),
        detection=DetectionConfig(
            shorter_side=300,
            longer_side=400,
            anchor_scales=(1.5, 3.0, 6.0),
            rpn_filters=128,
            train_proposals=(2000, 300),
            test_proposals=(1000, 300),
            min_size=8.0,
            regions=64,
            background_iou=(0.0, 0.5),
            metric="voc12",
        ),
        run=RunConfig(steps=2000, log_every=50, eval_every=1000, save_every=500),
    )
