"""Table 1: the networks for ImageNet, layer by layer."""

from __future__ import annotations

import functools

from resnet_jax.models import create_model
from resnet_jax.paper.analysis.summary import Layer, Summary, summarize
from resnet_jax.paper.artefact import Artefact
from resnet_jax.paper.items import FLOPS


def make_table1() -> Artefact:
    """Return the architectures, read off our networks, with the paper's FLOPs beside ours."""
    summaries = {depth: _summarize(depth) for depth in FLOPS}
    rows: list[tuple[str, ...]] = []
    for stage in range(1, 6):
        layers = [_of_stage(summary, stage) for summary in summaries.values()]
        side = layers[0][-1].output_shape[0]
        rows.append((f"conv{stage}" + ("_x" if stage > 1 else ""), f"{side}x{side}", *map(_describe_stage, layers)))
    ours = summaries.values()
    rows.append(("", "1x1", *(f"average pool, {summary.layers[-1].out_features}-d fc" for summary in ours)))
    rows.append(("FLOPs, paper", "", *(f"{flops}e9" for flops in FLOPS.values())))
    rows.append(("FLOPs, ours", "", *(f"{summary.multiply_adds:,}" for summary in ours)))
    rows.append(("parameters, ours", "", *(f"{summary.params:,}" for summary in ours)))
    columns = ("layer name", "output size", *(f"{depth}-layer" for depth in FLOPS))
    notes = [
        "Read off the networks of this package: shortcuts A with 18 and 34 layers, else B. FLOPs are multiply-adds of"
        " convolutions and fully-connected layers, projections included; docs/networks.md explains the differences."
    ]
    return Artefact("table1", "Table 1: architectures for ImageNet", columns, rows, notes, [])


@functools.cache
def _summarize(depth: int) -> Summary:
    name = f"resnet{depth}"
    return summarize(name, create_model(name, shortcut="A" if depth < 50 else "B"), 224)


def _of_stage(summary: Summary, stage: int) -> list[Layer]:
    """Return the layers of conv1 (stage 1), conv2_x (2) and so on; projections are not listed in the paper's table."""
    prefix = "stem" if stage == 1 else f"stage{stage - 1}_"
    layers = [layer for layer in summary.layers if layer.name.startswith(prefix) and "shortcut" not in layer.name]
    pool = [layer for layer in summary.layers if layer.kind == "max_pool"]
    return pool + layers if stage == 2 else layers


def _describe_stage(layers: list[Layer]) -> str:
    """Write layers as the paper does: [3x3, 64; 3x3, 64] x2."""
    if layers[0].kind == "conv" and "/" not in layers[0].name:
        return f"{layers[0].kernel[0]}x{layers[0].kernel[1]}, {layers[0].out_features}, stride {layers[0].stride[0]}"
    pool = ""
    if layers[0].kind == "max_pool":
        pool = f"{layers[0].kernel[0]}x{layers[0].kernel[1]} max pool, stride {layers[0].stride[0]}; "
        layers = layers[1:]
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        block = layer.name.split("/")[0]
        blocks.setdefault(block, []).append(f"{layer.kernel[0]}x{layer.kernel[1]}, {layer.out_features}")
    (kind,) = set(map(tuple, blocks.values()))  # all blocks of a stage are equal
    return f"{pool}[{'; '.join(kind)}] x{len(blocks)}"
