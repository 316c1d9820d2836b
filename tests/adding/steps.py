"""Steps of what was added, on every engine beside float64 numpy: steps.py COPY TESTS.

The last line that it prints is a list of the engines.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

COPY, TESTS = sys.argv[1:]
sys.path[:0] = [COPY, TESTS]

import numpy as np  # noqa: E402
import torch  # noqa: E402

with contextlib.suppress(ImportError, AttributeError):  # no Triton, another version's inside
    from interpreter import hasten

    hasten()

import simt_engine  # noqa: E402

import layerlr  # noqa: E402
from layerlr.backends import BACKENDS  # noqa: E402

assert layerlr.__file__.startswith(COPY)
simt_engine.build = lambda: Path(COPY, "_simt.so")
BACKENDS["simt"] = simt_engine.SimtBackend()

LR, BETA, EPS, DECAY, DAMPING = 0.05, 0.8, 1e-2, 0.1, 2.0
random = np.random.default_rng(0)
START = [random.standard_normal(shape) for shape in ((7, 5), (40, 30), (33,))]
GRADS = [[random.standard_normal(x.shape) for x in START] for _ in range(3)]


def expected(soft: bool, ruled: bool) -> list[np.ndarray]:
    """Weights by the formulas; the rule governs the matrices."""
    w, m = [x.copy() for x in START], [np.zeros(x.shape) for x in START]
    for grads in GRADS:
        for i, g in enumerate(grads):
            g = g + DECAY * w[i]
            m[i] = BETA * m[i] + (1 - BETA) * g
            u = m[i] / (np.abs(m[i]) + EPS) if soft else g
            norm = np.linalg.norm(w[i])
            f = norm / (norm + DAMPING * np.linalg.norm(u)) if ruled and u.ndim > 1 else 1
            w[i] = w[i] - LR * f * u
    return w


def stepped(backend: str, dtype: torch.dtype, soft: bool, ruled: bool) -> list[np.ndarray]:
    params = [torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in START]
    cls, own = (layerlr.SoftSign, {"beta": BETA, "eps": EPS}) if soft else (layerlr.SGD, {})
    rule = {"name": "damped", "damping": DAMPING} if ruled else None
    opt = cls(params, lr=LR, weight_decay=DECAY, rule=rule, backend=backend, **own)
    for grads in GRADS:
        for p, g in zip(params, grads):
            p.grad = torch.tensor(g, dtype=dtype)
        opt.step()
    return [p.detach().double().numpy() for p in params]


ran = []
for backend, engine in BACKENDS.items():
    if engine.missing(torch.device("cpu")):
        continue
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        for soft, ruled in ((True, False), (False, True), (True, True)):
            for x, y in zip(stepped(backend, dtype, soft, ruled), expected(soft, ruled)):
                np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol, err_msg=backend)
    ran.append(backend)
print(json.dumps(ran))
