"""Parameter shapes to time a step on, generated from the definitions of the architectures.

Only the shapes matter to an optimizer, so no model library is needed; the totals that the papers
and the model libraries agree on are asserted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

Shape = tuple[int, ...]


def resnet50() -> Iterator[Shape]:
    """ResNet-50 (He et al. 2016, torchvision's v1.5): bottlenecks of width 64, 128, 256, 512."""

    def conv_bn(c_in: int, c_out: int, kernel: int) -> Iterator[Shape]:
        yield (c_out, c_in, kernel, kernel)
        yield (c_out,)
        yield (c_out,)

    yield from conv_bn(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from conv_bn(channels, width, 1)
            yield from conv_bn(width, width, 3)
            yield from conv_bn(width, 4 * width, 1)
            if block == 0:  # the shortcut changes width once a stage
                yield from conv_bn(channels, 4 * width, 1)
            channels = 4 * width
    yield (1000, channels)
    yield (1000,)


def _transformer_block(d: int) -> Iterator[Shape]:
    """Pre-norm block: norm, fused QKV, projection, norm, MLP of width 4d; all with biases."""
    yield from ((d,), (d,))
    yield from ((3 * d, d), (3 * d,))
    yield from ((d, d), (d,))
    yield from ((d,), (d,))
    yield from ((4 * d, d), (4 * d,))
    yield from ((d, 4 * d), (d,))


def vit_b() -> Iterator[Shape]:
    """ViT-B/16 at 224 pixels (Dosovitskiy et al. 2021): 12 blocks of width 768, 196 patches."""
    d = 768
    yield (1, 1, d)
    yield (1, 197, d)
    yield from ((d, 3, 16, 16), (d,))
    for _ in range(12):
        yield from _transformer_block(d)
    yield from ((d,), (d,))
    yield from ((1000, d), (1000,))


def gpt2() -> Iterator[Shape]:
    """GPT-2 small (Radford et al. 2019): 12 blocks of width 768, output layer tied."""
    d = 768
    yield (50257, d)
    yield (1024, d)
    for _ in range(12):
        yield from _transformer_block(d)
    yield from ((d,), (d,))


def tiny300() -> Iterator[Shape]:
    """300 tensors so small that only the cost of each is left; 2-D, so that every rule governs."""
    for _ in range(300):
        yield (4, 8)


def l2() -> Iterator[Shape]:
    """64 layers of 512 KiB in float32: the streams of one fit in an L2 of 2 MiB, the model not."""
    for _ in range(64):
        yield (256, 512)


# name: (generator, number of tensors, number of parameters)
MODELS: dict[str, tuple[Callable[[], Iterator[Shape]], int, int]] = {
    "resnet50": (resnet50, 161, 25_557_032),
    "vit_b": (vit_b, 152, 86_567_656),
    "gpt2": (gpt2, 148, 124_439_808),
    "tiny300": (tiny300, 300, 9_600),
    "l2": (l2, 64, 8_388_608),
}


def shapes(model: str) -> list[Shape]:
    """The shapes of one model, checked against its known totals."""
    generate, tensors, parameters = MODELS[model]
    result = list(generate())
    assert len(result) == tensors, f"{model}: {len(result)} tensors, not {tensors}"
    total = sum(math.prod(shape) for shape in result)
    assert total == parameters, f"{model}: {total} parameters, not {parameters}"
    return result
