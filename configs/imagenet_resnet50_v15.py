"""ResNet-50 "v1.5" on ImageNet by NVIDIA's recipe: shorter and more accurate than the paper's, and no part of it.

Source: NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets, the README and the FP32 script of resnet50v1.5.
There 90 epochs give about 77.0 % top-1 accuracy (23.0 % error, centre crop), with 2,048 images in a batch and the rate
in proportion: `--data.batch-size 2048 --optim.learning-rate 2.048 --optim.warmup-steps 5005 --run.steps 56301`, and on
one device `--optim.accumulation-steps 8`. Differences that remain: there the rate changes once an epoch, and the bias
of the last layer and the BN of projections have weight decay, too.
"""

from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            family="imagenet",
            depth=50,
            shortcut="B",
            stride_on="3x3",  # what "v1.5" means
            pool_padding="torch",
            bn_group_size=128,  # images on each of 8 GPUs
        ),
        data=DataConfig(
            name="imagenet",
            batch_size=256,
            eval_batch_size=256,
            crop="area",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        optim=OptimConfig(
            learning_rate=0.256,
            schedule="cosine",
            momentum=0.875,
            momentum_style="torch",
            weight_decay=1 / 32_768,
            weight_decay_on="kernels",
            warmup="linear",
            warmup_steps=40_036,  # 8 epochs of 1,281,167 images
            label_smoothing=0.1,
        ),
        run=RunConfig(steps=450_410, log_every=100, eval_every=5_000, save_every=5_000),  # 90 epochs
    )
