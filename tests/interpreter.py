"""Triton's interpreter without what only takes time: twice as fast on the tests' tiny tensors."""

from __future__ import annotations

import dataclasses
import importlib
import types

import numpy
import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """Patch ``triton.language`` once, not at every call; no overflow checks, no numpy warnings."""
    # A first launch imports it, which Python 3.10 cannot once the language is patched.
    importlib.import_module("triton.experimental.gluon")
    interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda _: interpreter._LangPatchScope()
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    numpy.seterr(all="ignore")
