"""Parameter shapes to time a step on, generated from the definitions of the architectures.

Only the shapes matter to an optimizer, so no model library is needed; the totals that the papers
and the model libraries agree on are asserted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

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


def vit(d: int, blocks: int) -> Iterator[Shape]:
    """ViT/16 at 224 pixels, 196 patches (Dosovitskiy et al. 2021): B is 768 x 12, L 1024 x 24."""
    yield (1, 1, d)
    yield (1, 197, d)
    yield from ((d, 3, 16, 16), (d,))
    for _ in range(blocks):
        yield from _transformer_block(d)
    yield from ((d,), (d,))
    yield from ((1000, d), (1000,))


def gpt2(d: int, blocks: int) -> Iterator[Shape]:
    """GPT-2 (Radford et al. 2019), output layer tied: small is 768 x 12, XL 1600 x 48."""
    yield (50257, d)
    yield (1024, d)
    for _ in range(blocks):
        yield from _transformer_block(d)
    yield from ((d,), (d,))


def llama3_8b(blocks: int) -> Iterator[Shape]:
    """Llama 3 8B (2024): 32 blocks, 8 heads of keys and values for 32, untied, no biases."""
    d, kv, mlp = 4096, 1024, 14336
    yield (128256, d)
    for _ in range(blocks):
        yield from ((d, d), (kv, d), (kv, d), (d, d))  # queries, keys, values, output
        yield from ((mlp, d), (mlp, d), (d, mlp))  # gate, up, down
        yield from ((d,), (d,))
    yield (d,)
    yield (128256, d)


def tiny(tensors: int) -> Iterator[Shape]:
    """Tensors so small that only the cost of each is left; 2-D, so that every rule governs."""
    for _ in range(tensors):
        yield (4, 8)


def l2() -> Iterator[Shape]:
    """64 layers of 512 KiB in float32: the streams of one fit in an L2 of 2 MiB, the model not."""
    for _ in range(64):
        yield (256, 512)


# name: (generator, number of tensors, number of parameters)
MODELS: dict[str, tuple[Callable[[], Iterator[Shape]], int, int]] = {
    "resnet50": (resnet50, 161, 25_557_032),
    "vit_b": (partial(vit, 768, 12), 152, 86_567_656),
    "gpt2": (partial(gpt2, 768, 12), 148, 124_439_808),
    "vit_l": (partial(vit, 1024, 24), 296, 304_326_632),
    "gpt2_xl": (partial(gpt2, 1600, 48), 580, 1_557_611_200),
    "llama3_8b": (partial(llama3_8b, 32), 291, 8_030_261_248),
    # half of its blocks: as many as fit in 80 GB with gradients and Adam's state, in float32 73 GB
    "llama3_8b_16of32": (partial(llama3_8b, 16), 147, 4_540_469_248),
    "tiny128": (partial(tiny, 128), 128, 4_096),
    "tiny300": (partial(tiny, 300), 300, 9_600),
    "tiny1500": (partial(tiny, 1500), 1500, 48_000),
    "l2": (l2, 64, 8_388_608),
}
TINY = ("tiny128", "tiny300", "tiny1500")
# What a run takes unless told otherwise, the models of most interest first: time may run out.
DEFAULTS = {
    "cpu": ("resnet50", "vit_b", "gpt2", "tiny300", "l2"),
    "cuda": ("resnet50", "vit_b", *TINY, "vit_l", "gpt2_xl", "llama3_8b_16of32"),
}


def shapes(model: str) -> list[Shape]:
    """The shapes of one model, checked against its known totals."""
    generate, tensors, parameters = MODELS[model]
    result = list(generate())
    assert len(result) == tensors, f"{model}: {len(result)} tensors, not {tensors}"
    total = sum(math.prod(shape) for shape in result)
    assert total == parameters, f"{model}: {total} parameters, not {parameters}"
    return result
