"""A step and an inference of Faster R-CNN beside PyTorch's, with the same weights: python -m benchmarks.detection.

The peer is written plainly for this: suppression as a loop over the boxes that are kept, RoI pooling by
adaptive_max_pool2d region by region, as torchvision's operators do not load beside a CPU build of PyTorch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.driver import positive
from resnet_jax.cli.arguments import ArgumentParser, run_command
from resnet_jax.config import Config, DataConfig, DetectionConfig, ModelConfig, OptimConfig
from resnet_jax.convert.names import layout_of, tensors_from_variables
from resnet_jax.convert.pytorch import build
from resnet_jax.data.annotated import Boxed
from resnet_jax.data.types import Preprocessing
from resnet_jax.detection.proposals import propose
from resnet_jax.detection.roi import roi_pool
from resnet_jax.detection_steps import detection_gradients, find_in_images
from resnet_jax.models.detector import Detector, build_detector
from resnet_jax.models.stacking import init_variables
from resnet_jax.optim import build_optimizer
from resnet_jax.parallel.devices import processor
from resnet_jax.steps import TrainStep, create_train_state

_CLASSES, _OBJECTS = 20, 8


def main(args: Sequence[str]) -> int:
    """Print a JSON line of each part: seconds of ours, of PyTorch, and their ratio."""
    parser = ArgumentParser(prog="python -m benchmarks.detection", description=__doc__, allow_abbrev=False)
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 101), default=18, help="default 18")
    parser.add_argument("--size", type=positive(int), nargs=2, default=(600, 1000), help="height and width")
    parser.add_argument("--turns", type=positive(int), default=3, help="default 3")
    options = parser.parse_args(args)
    height, width = options.size
    config = Config(
        model=ModelConfig(family="imagenet", depth=options.depth, shortcut="B", stride_on="3x3", frozen_bn=True),
        data=DataConfig(name="voc", batch_size=1),
        optim=OptimConfig(weight_decay=5e-4, trainable=("stage2", "stage3", "stage4", "head")),
        detection=DetectionConfig(
            shorter_side=min(options.size), longer_side=max(options.size), background_iou=(0, 0.5)
        ),
    )
    model = build_detector(config, _CLASSES)
    variables = _make_weights(model)
    peer = _Peer(config.detection, model, variables)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(1, height, width, 3)).astype(np.float32)
    batch = _batch(images, rng)
    compiled, compile_seconds = _compile(config, model, variables, batch)
    torch_batch = tuple(
        torch.from_numpy(np.asarray(a)) for a in (images.transpose(0, 3, 1, 2), batch.boxes[0], batch.classes[0])
    )
    peer_parts = peer.parts(*torch_batch)
    agreement = _compare(compiled["inference"], peer_parts["inference"])
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in compiled}
    for _ in range(options.turns):
        for name, (mine, theirs) in seconds.items():
            mine.append(_timed(compiled[name]))
            theirs.append(_timed(peer_parts[name]))
    for name, (mine, theirs) in seconds.items():
        a, b = float(np.median(mine)), float(np.median(theirs))
        print(
            json.dumps({"part": name, "ours": round(a, 3), "pytorch": round(b, 3), "ratio": round(a / b, 2)}),
            flush=True,
        )
    versions = {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "device": processor(),
        "threads": torch.get_num_threads(),
    }
    more = {"depth": options.depth, "size": [height, width], "compile_seconds": round(compile_seconds, 1)}
    print(json.dumps({**more, **agreement, **versions}))
    return 0


def _timed(compute: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(compute())
    return time.perf_counter() - began


def _make_weights(model: Detector) -> dict[str, Any]:
    """Initialize a detector so that scores spread, as trained ones do, and activations keep their size."""
    variables = init_variables(model, jax.random.key(0), (64, 64, 3))
    louder = {"rpn": 3.0, "scores": 10.0, "deltas": 10.0}

    def of_leaf(path: Any, leaf: jax.Array) -> jax.Array:
        last_bn = path[-1].key == "scale" and path[-2].key == ("bn2" if model.trunk.block == "basic" else "bn3")
        return leaf * (0.2 if last_bn else louder.get(path[0].key, 1.0))

    return {**variables, "params": jax.tree_util.tree_map_with_path(of_leaf, variables["params"])}


def _batch(images: np.ndarray, rng: np.random.Generator) -> Boxed:
    height, width = images.shape[1:3]
    corners = rng.uniform(0, 0.6, (_OBJECTS, 2)) * [width, height]
    sides = rng.uniform(0.15, 0.4, (_OBJECTS, 2)) * [width, height]
    boxes = np.concatenate([corners, corners + sides - 1], 1).astype(np.float32)[None]
    size, one = np.array([[height, width]], np.int32), np.zeros(1, np.int32)
    classes = np.arange(1, _OBJECTS + 1, dtype=np.int32)[None]
    return Boxed(images, size, size, np.ones(1, np.float32), boxes, classes, one, one, one - 1)


def _compile(
    config: Config, model: Detector, variables: Any, batch: Boxed
) -> tuple[dict[str, Callable[[], Any]], float]:
    """Compile the programs on one image; return what is timed, and the seconds that the step took to compile."""
    detection = config.detection
    optimizer = build_optimizer(config.optim, optax.constant_schedule(1e-3), model.trainable)
    compute = partial(detection_gradients, model=model, config=detection, filled=True)
    step = TrainStep(compute, optimizer, optax.constant_schedule(1e-3), jax.random.key(0))
    state = create_train_state(optimizer, variables)
    began = time.perf_counter()
    train = jax.jit(step).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - began
    identity = Preprocessing(np.zeros(3, np.float32), np.ones(3, np.float32))
    find = partial(find_in_images, model=model, config=detection, preprocessing=identity, filled=True)
    as_bytes = batch._replace(images=batch.images * 255)  # normalize() divides by 255
    images = jnp.asarray(batch.images)
    detect = jax.jit(find)
    trunk = jax.jit(lambda x: model.apply(variables, x, None, train=False, method="of_images"))
    of_images: Any = trunk(images)
    anchors = jnp.asarray(model.anchors(*of_images.feature_map.shape[1:3]))
    before, after = detection.test_proposals
    propose_ours = jax.jit(partial(propose, before=before, after=after))
    given = (of_images.logits[0], of_images.deltas[0], anchors, batch.sizes[0], np.float32(1))
    regions, _ = propose_ours(*given)
    pool = jax.jit(lambda x, r: roi_pool(x, r, 1 / 16, model.pooled_size))
    regions_of = jax.jit(lambda m, r: model.apply(variables, m, r, train=False, method="of_regions"))
    parts: dict[str, Callable[[], Any]] = {
        "training step": lambda: train(state, batch),
        "inference": lambda: detect(variables, as_bytes),
        "trunk and RPN": lambda: trunk(images),
        "proposals": lambda: propose_ours(*given),
        "RoI pooling of 300": lambda: pool(of_images.feature_map[0], regions),
        "pooling and conv5_x of 300": lambda: regions_of(of_images.feature_map, regions[None]),
    }
    return parts, compile_seconds


def _compare(ours: Callable[[], Any], theirs: Callable[[], Any]) -> dict[str, float]:
    """Return the largest differences of scores and boxes, in pixels, between the best detections, and their number."""
    mine, (scores, boxes) = ours().found, theirs()
    count = min(50, len(scores))
    return {
        "compared": count,
        "difference_of_scores": float(
            np.abs(np.asarray(mine.scores[0][:count]) - scores[:count].numpy()).max(initial=0)
        ),
        "difference_of_boxes": float(np.abs(np.asarray(mine.boxes[0][:count]) - boxes[:count].numpy()).max(initial=0)),
    }


class _Peer:
    """Faster R-CNN in PyTorch, with our weights."""

    def __init__(self, config: DetectionConfig, model: Detector, variables: Any):
        self.config, self.model = config, model
        params = jax.device_get(variables["params"])
        whole: Any = model.trunk.clone(end=None, backbone_only=False, num_classes=2)
        fc = {"kernel": np.zeros((whole.filters[-1] * (1 if whole.block == "basic" else 4), 2), np.float32)}
        fc["bias"] = np.zeros(2, np.float32)
        stats = variables["batch_stats"]
        joined = {
            "params": {**params["trunk"], **params["tail"], "fc": fc},
            "batch_stats": {**stats["trunk"], **stats["tail"]},
        }
        tensors = tensors_from_variables(joined, whole, layout_of(whole))
        network: Any = build(whole)
        network.load_state_dict({key: torch.from_numpy(np.array(v)) for key, v in tensors.items()}, strict=False)
        stem = [network.conv1, network.bn1, nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]
        self.trunk = nn.Sequential(*stem, network.layer1, network.layer2, network.layer3).eval()
        self.tail = network.layer4.eval()
        for part in (*stem, network.layer1):
            part.requires_grad_(False)
        self.rpn = {key: _conv(params["rpn"][key]) for key in ("conv", "scores", "deltas")}
        self.scores, self.deltas = (_linear(params[key]) for key in ("scores", "deltas"))
        trained = [
            *self.trunk.parameters(),
            *self.tail.parameters(),
            *self.scores.parameters(),
            *self.deltas.parameters(),
        ]
        trained += [p for conv in self.rpn.values() for p in conv.parameters()]
        self.optimizer = torch.optim.SGD([p for p in trained if p.requires_grad], 1e-3, 0.9, weight_decay=5e-4)
        self.anchors = torch.zeros(0, 4)

    def of_images(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.trunk(images)
        if not len(self.anchors):
            self.anchors = torch.from_numpy(self.model.anchors(*x.shape[2:]))
        y = functional.relu(self.rpn["conv"](x))
        logits, deltas = (self.rpn[key](y).permute(0, 2, 3, 1) for key in ("scores", "deltas"))
        return x, logits.reshape(-1, 2), deltas.reshape(-1, 4)

    @torch.no_grad()
    def propose(self, logits: Tensor, deltas: Tensor, size: Sequence[int], before: int, after: int) -> Tensor:
        boxes = _clip(_decode(self.anchors, deltas), size)
        scores = logits[:, 1] - logits[:, 0]
        scores = scores.masked_fill(((boxes[:, 2:] - boxes[:, :2] + 1) < 16).any(1), -torch.inf)
        best, order = scores.topk(min(before, len(scores)))
        boxes = boxes[order][best > -torch.inf]
        return boxes[_nms(boxes, 0.7, after)]

    def pool(self, x: Tensor, regions: Tensor) -> Tensor:
        size = self.model.pooled_size
        last = torch.tensor([x.shape[3] - 1, x.shape[2] - 1] * 2)
        cells = (regions / 16 + 0.5).floor().long().minimum(last).tolist()
        pooled = [functional.adaptive_max_pool2d(x[0, :, y1 : y2 + 1, x1 : x2 + 1], size) for x1, y1, x2, y2 in cells]
        return torch.stack(pooled)

    def of_regions(self, x: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        features = self.tail(self.pool(x, regions)).mean((2, 3))
        return self.scores(features), self.deltas(features).view(len(regions), -1, 4)

    def step(self, images: Tensor, objects: Tensor, classes: Tensor) -> Tensor:
        x, logits, deltas = self.of_images(images)
        size = images.shape[2:]
        inside = (self.anchors[:, :2] >= 0).all(1) & (self.anchors[:, 2] < size[1]) & (self.anchors[:, 3] < size[0])
        shares = _iou(self.anchors, objects) * inside[:, None]
        highest, nearest = shares.max(1)
        positive = inside & ((highest >= 0.7) | ((shares == shares.amax(0)) & (shares > 0)).any(1))
        negative = inside & ~positive & (highest < 0.3)
        chosen = torch.cat([_some(positive, 128), _some(negative, 256 - min(128, int(positive.sum())))])
        target = positive[chosen].long()
        losses = [functional.cross_entropy(logits[chosen], target)]
        wanted = _encode(self.anchors[chosen], objects[nearest[chosen]])
        losses.append(_smooth_l1(deltas[chosen] - wanted, 3.0).sum(1)[target == 1].sum() / 256)
        proposals = torch.cat([self.propose(logits, deltas, size, *self.config.train_proposals), objects])
        highest, nearest = _iou(proposals, objects).max(1)
        foreground = _some(highest >= 0.5, 32)
        chosen = torch.cat([foreground, _some(highest < 0.5, 128 - len(foreground))])
        labels = torch.where(highest[chosen] >= 0.5, classes[nearest[chosen]].long(), 0)
        logits, deltas = self.of_regions(x, proposals[chosen])
        losses.append(functional.cross_entropy(logits, labels))
        wanted = _encode(proposals[chosen], objects[nearest[chosen]]) / torch.tensor(self.config.target_std)
        mine = deltas[torch.arange(len(chosen)), labels]
        losses.append(_smooth_l1(mine - wanted, 1.0).sum(1)[labels > 0].sum() / len(chosen))
        self.optimizer.zero_grad()
        loss = torch.stack(losses).sum()
        loss.backward()
        self.optimizer.step()
        return loss

    @torch.no_grad()
    def find(self, images: Tensor) -> tuple[Tensor, Tensor]:
        size = images.shape[2:]
        x, logits, deltas = self.of_images(images)
        regions = self.propose(logits, deltas, size, *self.config.test_proposals)
        logits, deltas = self.of_regions(x, regions)
        scores = logits.softmax(1)
        boxes = _clip(_decode(regions[:, None], deltas * torch.tensor(self.config.target_std)), size)
        kept = []
        for k in range(1, scores.shape[1]):
            there = (scores[:, k] > self.config.threshold).nonzero()[:, 0]
            there = there[scores[there, k].argsort(descending=True, stable=True)]
            kept.append((there[_nms(boxes[there, k], 0.3, len(there))], k))
        found = torch.cat([scores[rows, k] for rows, k in kept])
        best, order = found.sort(descending=True, stable=True)
        return best[: self.config.most], torch.cat([boxes[rows, k] for rows, k in kept])[order[: self.config.most]]

    def parts(self, images: Tensor, objects: Tensor, classes: Tensor) -> dict[str, Callable[[], Any]]:
        """Return what is timed."""
        with torch.no_grad():
            x, logits, deltas = self.of_images(images)
            numbers = self.config.test_proposals
            regions = self.propose(logits, deltas, images.shape[2:], *numbers)
        quiet = torch.no_grad()
        weights = [p.detach().clone() for group in self.optimizer.param_groups for p in group["params"]]

        def step() -> None:
            self.step(images, objects, classes)
            with torch.no_grad():  # a step is always the first
                for p, value in zip(self.optimizer.param_groups[0]["params"], weights, strict=True):
                    p.copy_(value)

        return {
            "training step": step,
            "inference": lambda: self.find(images),
            "trunk and RPN": quiet(lambda: self.of_images(images)),
            "proposals": lambda: self.propose(logits, deltas, images.shape[2:], *numbers),
            "RoI pooling of 300": quiet(lambda: self.pool(x, regions)),
            "pooling and conv5_x of 300": quiet(lambda: self.of_regions(x, regions)),
        }


def _conv(params: Any) -> nn.Conv2d:
    kernel = torch.from_numpy(np.array(params["kernel"]).transpose(3, 2, 0, 1).copy())
    conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], padding=kernel.shape[2] // 2)
    conv.load_state_dict({"weight": kernel, "bias": torch.from_numpy(np.array(params["bias"]))})
    return conv


def _linear(params: Any) -> nn.Linear:
    kernel = torch.from_numpy(np.array(params["kernel"]).T.copy())
    linear = nn.Linear(kernel.shape[1], kernel.shape[0])
    linear.load_state_dict({"weight": kernel, "bias": torch.from_numpy(np.array(params["bias"]))})
    return linear


def _some(mask: Tensor, count: int) -> Tensor:
    there = mask.nonzero()[:, 0]
    return there[torch.randperm(len(there))[:count]]


def _smooth_l1(x: Tensor, sigma: float) -> Tensor:
    return functional.smooth_l1_loss(x, torch.zeros_like(x), beta=1 / sigma**2, reduction="none")


def _sides(boxes: Tensor) -> Tensor:
    return boxes[..., 2:] - boxes[..., :2] + 1


def _encode(boxes: Tensor, targets: Tensor) -> Tensor:
    a, b = _sides(boxes), _sides(targets)
    return torch.cat([(targets[:, :2] + b / 2 - boxes[:, :2] - a / 2) / a, (b / a).log()], 1)


def _decode(boxes: Any, deltas: Tensor) -> Tensor:
    sides = _sides(boxes)
    center = boxes[..., :2] + sides / 2 + deltas[..., :2] * sides
    half = deltas[..., 2:].clamp(max=float(np.log(1000 / 16))).exp() * sides / 2
    return torch.cat([center - half, center + half], -1)


def _clip(boxes: Tensor, size: Sequence[int]) -> Tensor:
    most = torch.tensor([size[1] - 1, size[0] - 1, size[1] - 1, size[0] - 1], dtype=boxes.dtype)
    return boxes.clamp(min=0).minimum(most)


def _iou(a: Any, b: Tensor) -> Tensor:
    sides = (torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2]) + 1).clamp(
        min=0
    )
    both = sides.prod(2)
    return both / (_sides(a).prod(1)[:, None] + _sides(b).prod(1)[None] - both)


def _nms(boxes: Tensor, threshold: float, most: int) -> Tensor:
    """Suppress greedily; boxes are sorted, the best first."""
    alive, kept = torch.ones(len(boxes), dtype=torch.bool), []
    for i in range(len(boxes)):
        if not alive[i]:
            continue
        kept.append(i)
        if len(kept) == most:
            break
        alive[i + 1 :] &= _iou(boxes[i : i + 1], boxes[i + 1 :])[0] <= threshold
    return torch.tensor(kept, dtype=torch.long)


if __name__ == "__main__":
    run_command(main)
