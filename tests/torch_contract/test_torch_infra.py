"""torch's own infrastructure for testing optimizers, over every class bare and with every rule.

`OptimizerInfo` and the inputs and error inputs are those of torch.optim's twin, so every wrong
argument must be answered in torch's own words. torch ships the infrastructure, not the tests: they
are written here in its style.
"""

from __future__ import annotations

import io
import pickle
import unittest
from copy import deepcopy
from itertools import chain, pairwise

import optim_infra  # noqa: F401 (first)
import pytest
import torch
from cases import bits
from contract_helpers import BACKENDS, RULES, TWINS, named, photograph, same
from torch.nn import Parameter

import layerlr

pytest.importorskip("expecttest", reason="torch's test infrastructure needs it")
pytest.importorskip("numpy", reason="torch's test infrastructure needs it")

from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_device_type import instantiate_device_type_tests, onlyCPU
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optim_db,
    optims,
)
from torch.testing._internal.common_utils import TestCase
from torch.testing._internal.opinfo.core import DecorateInfo

OURS = ("rule", "layers", "adapt", "on_nonfinite")
_SHARED_INPUTS = ({}, {"lr": 0.01}, {"weight_decay": 0.1, "maximize": True})
#: of the classes whose twins torch has not
INPUTS = {
    layerlr.AMomSGD: (*_SHARED_INPUTS, {"momentum": 0.5}),
    layerlr.Lion: (*_SHARED_INPUTS, {"betas": (0.5, 0.9)}, {"betas": (0.9, 0.9)}),
}


#: device -> the backends that are tried on it
DEVICES = {"cpu": BACKENDS}
if torch.cuda.is_available():
    DEVICES["cuda"] = ["cuda", "triton", "reference"]


def _skips(backend):
    return [
        DecorateInfo(unittest.skip(f"{backend!r} is not for the {device}"), device_type=device)
        for device, backends in DEVICES.items()
        if backend not in backends
    ]


def _inputs_of(ours):
    def inputs(device, dtype=None):
        return [OptimizerInput(params=None, kwargs=dict(k), desc=str(k)) for k in INPUTS[ours]]

    return inputs


def _info(ours, rule, backend):
    def __init__(self, params, *args, **kwargs):
        ours.__init__(self, params, *args, **{"rule": rule, "backend": backend, **kwargs})

    name = f"{ours.__name__}_{rule or 'bare'}_{backend}"
    body = {"__init__": __init__, "__module__": __name__, "ours": ours}
    cls = globals()[name] = type(name, (ours,), body)
    twin = next((i for i in optim_db if i.optim_cls is TWINS[ours]), None)
    if twin is None:
        return OptimizerInfo(
            cls,
            optim_inputs_func=_inputs_of(ours),
            optim_error_inputs_func=get_error_inputs_for_all_optims,
            supported_impls=("foreach", "fused"),
            supports_fused_on=("cpu", "cuda"),
            skips=_skips(backend),
        )
    return OptimizerInfo(
        cls,
        optim_inputs_func=twin.optim_inputs_func,
        scheduler_inputs=twin.scheduler_inputs,
        optim_error_inputs_func=twin.optim_error_inputs_func,
        supported_impls=tuple(i for i in twin.supported_impls if i != "differentiable"),
        not_og_supported_flags=twin.not_og_supported_flags,
        supports_fused_on=twin.supports_fused_on,
        skips=_skips(backend),
    )


ON_SOME = list(dict.fromkeys(chain(*DEVICES.values())))
#: Every class bare, with a rule of each order and with rates from outside; every rule on SGD and
#: AdamW. Torch asks how options, state and groups are handled: rules see nothing of the class, nor
#: classes of the rule, so that the rest of the product would ask the same again.
PAIRS = [
    (ours, rule)
    for ours in TWINS
    for rule in RULES
    if rule in (None, "lars", "layca", "rated") or ours in (layerlr.SGD, layerlr.AdamW)
]
INFOS = [_info(ours, rule, b) for ours, rule in PAIRS for b in ON_SOME]
on_all = optims(INFOS, dtypes=[torch.float64])


def _inputs(info, device, dtype):
    return _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info)


def _problem(device, dtype, contiguous=True):
    """Weight, bias and a closure factory for ``|W x + b|^2``."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        t = torch.randn(*shape, 2, generator=generator, dtype=torch.float64).to(device, dtype)
        return t[..., 0].contiguous() if contiguous else t[..., 0]  # moved first: a copy is dense

    weight, bias, x = Parameter(draw(4, 5)), Parameter(draw(4)), draw(5)

    def closure_of(opt):
        def closure():
            opt.zero_grad()
            loss = (weight.mv(x) + bias).pow(2).sum()
            loss.backward()
            return loss

        return closure

    return [weight, bias], closure_of


class TestTorchInfra(TestCase):
    def _trained(self, info, device, dtype, kwargs, steps=3, names=False):
        params, closure_of = _problem(device, dtype)
        opt = info.optim_cls(named(params) if names else params, **kwargs)
        closure = closure_of(opt)
        for _ in range(steps):
            opt.step(closure)
        return opt, closure

    def assertSame(self, a, b):
        if not same(a, b):
            self.fail(f"{a}\n!=\n{b}")

    @onlyCPU  # arguments are refused whatever the device, and torch lists them for one
    @on_all
    def test_errors(self, device, dtype, optim_info):
        errors = optim_info.optim_error_inputs_func(device, dtype)
        self.assertGreaterEqual(len(errors), 6)
        for error in errors:
            params, kwargs = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
            params = _problem(device, dtype)[0] if params is None else params
            check = (
                self.assertWarnsRegex
                if issubclass(error.error_type, Warning)
                else self.assertRaisesRegex
            )
            with check(error.error_type, error.error_regex):
                optim_info.optim_cls(params, **kwargs)
        if "fused" in optim_info.supported_impls:
            params = _problem(device, dtype)[0]
            with self.assertRaisesRegex(RuntimeError, "`fused` and `foreach` cannot be `True` tog"):
                optim_info.optim_cls(params, fused=True, foreach=True)
            with self.assertRaisesRegex(RuntimeError, "`fused` does not support `differentiable`"):
                optim_info.optim_cls(params, fused=True, differentiable=True)

    @on_all
    def test_flags_never_change_the_numbers(self, device, dtype, optim_info):
        wanted = {}
        for i in _inputs(optim_info, device, dtype):
            opt, _ = self._trained(optim_info, device, dtype, i.kwargs)
            photo = photograph(opt)
            base = i.desc.split(" & ")[0]
            self.assertSame(photo["weights"], wanted.setdefault(base, photo)["weights"])
            self.assertSame(photo["state"], wanted[base]["state"])
        self.assertGreaterEqual(len(wanted), 4)

    @on_all
    def test_goes_right_direction(self, device, dtype, optim_info):
        inputs = optim_info.optim_inputs_func(device)
        for n, i in enumerate(inputs):
            for constructors in optim_info.scheduler_inputs if n == 0 else ((),):
                params, closure_of = _problem(device, dtype, contiguous=n % 2 == 0)
                self.assertEqual(params[0].is_contiguous(), n % 2 == 0)
                opt = optim_info.optim_cls(params, **i.kwargs)
                schedulers = [constructor(opt) for constructor in constructors]
                closure = closure_of(opt)
                before = closure().item()
                for _ in range(5):
                    loss = opt.step(closure)
                    for s in schedulers:
                        s.step(loss.item()) if isinstance(s, ReduceLROnPlateau) else s.step()
                sign = -1 if i.kwargs.get("maximize") else 1
                self.assertLess(sign * closure().item(), sign * before, i.desc)

    @on_all
    def test_param_groups(self, device, dtype, optim_info):
        # a group's own value counts; an optimizer that has it for all must agree, layer by layer
        for key, own, default in (("lr", 0.02, 0.01), ("weight_decay", 0.3, 0.1)):
            (weight, bias), closure_of = _problem(device, dtype)
            groups = [{"params": [weight], key: own}, {"params": bias}]
            split = optim_info.optim_cls(groups, **{key: default})
            self.assertEqual([g[key] for g in split.param_groups], [own, default])
            params, _ = _problem(device, dtype)
            values = own, default
            apart = [
                optim_info.optim_cls([p], **{key: v}) for p, v in zip(params, values, strict=True)
            ]
            for _ in range(3):
                closure_of(split)()
                for p, q in zip(params, (weight, bias), strict=True):
                    p.grad = q.grad.clone()
                for opt in (split, *apart):
                    opt.step()
            self.assertSame(params, [weight, bias])

    @on_all
    def test_tensor_lr(self, device, dtype, optim_info):
        for shape in ((), (1,), (1, 1)):
            lr = torch.full(shape, 2.0**-7)
            opt, closure = self._trained(optim_info, device, dtype, {"lr": lr})
            as_float, closure_f = self._trained(optim_info, device, dtype, {"lr": 2.0**-7})
            self.assertSame(photograph(opt)["weights"], photograph(as_float)["weights"])
            self.assertIs(opt.param_groups[0]["lr"], lr)
            self.assertEqual(lr, torch.full(shape, 2.0**-7))
            lr.fill_(0.5)
            as_float.param_groups[0]["lr"] = 0.5
            opt.step(closure), as_float.step(closure_f)
            self.assertSame(photograph(opt)["weights"], photograph(as_float)["weights"])

    @on_all
    def test_step_without_gradients_is_noop(self, device, dtype, optim_info):
        for i in _inputs(optim_info, device, dtype):
            opt, _ = self._trained(optim_info, device, dtype, i.kwargs)
            opt.zero_grad()
            before = photograph(opt)
            opt.step()
            self.assertSame(photograph(opt), before)

    @on_all
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        for i in optim_info.optim_inputs_func(device):
            params, _ = _problem(device, dtype)
            params[1].data[0] = -0.0
            opt = optim_info.optim_cls(params, **{**i.kwargs, "weight_decay": 0})
            before = [bits(p) for p in params]
            for _ in range(2):
                opt.zero_grad()
                for p in params:
                    p.grad = torch.zeros_like(p)
                opt.step()
            self.assertSame([bits(p) for p in params], before)
            self.assertSame([p.grad for p in params], [torch.zeros_like(p) for p in params])

    @on_all
    def test_printable(self, device, dtype, optim_info):
        opt, _ = self._trained(optim_info, device, dtype, {})
        for key, value in opt.defaults.items():
            self.assertIn(f"    {key}: {value}\n", repr(opt))

    @on_all
    def test_state_dict_deterministic(self, device, dtype, optim_info):
        for n, i in enumerate(optim_info.optim_inputs_func(device)):
            start = dict(names=n % 2 == 0, steps=0)
            opt, closure = self._trained(optim_info, device, dtype, i.kwargs, names=n % 2 == 0)
            other, closure_o = self._trained(optim_info, device, dtype, i.kwargs, **start)
            both = [o.param_groups[0]["params"] for o in (opt, other)]
            with torch.no_grad():
                for p, q in zip(*both, strict=True):
                    q.copy_(p)
            kept, loaded = deepcopy(opt.state_dict()), deepcopy(opt.state_dict())
            other.load_state_dict(loaded)
            for _ in range(3):
                opt.step(closure), other.step(closure_o)
            self.assertSame(photograph(opt), photograph(other))
            self.assertSame(opt.state_dict(), other.state_dict())
            self.assertSame(kept["param_groups"], loaded["param_groups"])
            # repeated parameters have the same place in the state dict
            other.param_groups.extend(other.param_groups)
            again = other.state_dict()["param_groups"]
            self.assertSame(again[-1]["params"], again[0]["params"])

    @on_all
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        for i in optim_info.optim_inputs_func(device):
            opt, closure = self._trained(optim_info, device, dtype, i.kwargs)
            wanted = photograph(opt)["groups"]
            old = deepcopy(opt.state_dict())
            for group in old["param_groups"]:
                for flag in (*optim_info.not_og_supported_flags, *OURS):
                    group.pop(flag, None)
            for state in old["state"].values():
                state["step"] = state["step"].item()
            opt.load_state_dict(old)
            self.assertSame(photograph(opt)["groups"], wanted)
            steps = [opt.state[p]["step"] for p in opt.param_groups[0]["params"]]
            self.assertSame(steps, [torch.tensor(3.0, device=device)] * 2)
            opt.step(closure)
            self.assertSame(steps, [torch.tensor(4.0, device=device)] * 2)

    @on_all
    def test_save_load_weights_only(self, device, dtype, optim_info):
        for i in optim_info.optim_inputs_func(device):
            opt, closure = self._trained(optim_info, device, dtype, i.kwargs)
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
            self.assertSame(loaded, opt.state_dict())
            before = photograph(opt)
            opt.step(closure)
            opt.load_state_dict(loaded)
            self.assertSame(photograph(opt)["state"], before["state"])

    @on_all
    def test_deepcopy_and_pickle_copy_public_attributes(self, device, dtype, optim_info):
        for i in optim_info.optim_inputs_func(device):
            opt, _ = self._trained(optim_info, device, dtype, i.kwargs)
            for copy in (deepcopy(opt), pickle.loads(pickle.dumps(opt))):
                public = [{k for k in o.__dict__ if k[0] != "_"} for o in (opt, copy)]
                self.assertEqual(*public)
                self.assertEqual(copy.backend, opt.backend)
                self.assertSame(photograph(copy), photograph(opt))

    @on_all
    def test_default_dtype(self, device, dtype, optim_info):
        twin = TWINS[optim_info.optim_cls.ours]
        for default in (torch.float32, torch.float64):
            before = torch.get_default_dtype()
            torch.set_default_dtype(default)
            try:
                params, closure_of = _problem(device, dtype)
                theirs = twin(params)
                theirs.step(closure_of(theirs))
                opt, _ = self._trained(optim_info, device, dtype, {}, steps=1)
            finally:
                torch.set_default_dtype(before)
            state = opt.state[opt.param_groups[0]["params"][0]]
            wanted = theirs.state[params[0]].get("step", torch.zeros((), dtype=default))
            self.assertEqual(state["step"].dtype, wanted.dtype)

    @on_all
    def test_mixed_dtypes(self, device, dtype, optim_info):
        dtypes = (torch.float16, torch.float64, torch.bfloat16, torch.float32)
        params = [Parameter(_problem(device, d)[0][0].data) for d in dtypes]
        alone = deepcopy(params)
        together = optim_info.optim_cls(params)
        opts = [together, *(optim_info.optim_cls([p]) for p in alone)]
        for step in range(3):
            for p, q in zip(params, alone, strict=True):
                p.grad = torch.full_like(p, 0.5 - step)
                q.grad = p.grad.clone()
            for opt in opts:
                opt.step()
        self.assertSame(params, alone)
        self.assertFalse(any(torch.equal(p, q) for p, q in pairwise(params)))

    @on_all
    def test_complex(self, device, dtype, optim_info):
        for i in optim_info.optim_inputs_func(device):
            generator = torch.Generator().manual_seed(5)
            draw = torch.randn(4, 4, 3, dtype=torch.complex128, generator=generator).to(device)
            z = Parameter(draw[0].clone())
            x = Parameter(torch.view_as_real(z.detach()).clone())
            opts = [optim_info.optim_cls([p], **i.kwargs, backend="auto") for p in (z, x)]
            for step in range(3):
                z.grad = draw[1 + step].clone()
                x.grad = torch.view_as_real(z.grad).clone()
                for opt in opts:
                    opt.step()
            self.assertSame(torch.view_as_real(z.detach()), x.detach())


instantiate_device_type_tests(TestTorchInfra, globals(), only_for=tuple(DEVICES))
