"""Back-matching from the graph of the network: a factor for each parameter."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .jacobian_traces import Call, Number, unknown
from .operations import RULES, over, pair, times


class Structure:
    """Structural factors of back-matching: ``f_p = c_p * m`` for each parameter p.

    Back-matching solves ``J dx = dy`` by least squares where back-propagation takes ``J^T dy``.
    With each Gram matrix ``J^T J`` replaced by the best multiple of the identity, what is left is
    one scalar for each layer; the matched step is ``gradient / f_p``::

        c_x = tr(J_x^T J_x) / dim(x)      c_p = tr(J_p^T J_p) / dim(p), averaged over the samples
        m = 1 at the output;  m(x) = sum over the users y of x of m(y) * c_x
        f_p = sum over the uses of p of c_p * m(y)

    The c are exact for the batch (zero padding at the borders, statistics shared by a batch,
    measured slopes), except dropout, whose c_x is its expectation 1/(1 - rate). The composition is
    not: the trace of a product is replaced by the product of the traces, and where branches join,
    their cross terms are dropped, so a residual block ``x + F(x)`` has ``1 + (product over F)``.
    Both hold in expectation for independent random weights.

    Parameters
    ----------
    model
        Traced by ``torch.fx``, and again when its training flags or the plain arguments (None,
        bool, int, float, str) of its call change. Known are Linear, Conv1d/2d (zero or circular
        padding), BatchNorm1d/2d, elementwise activations, softmax, max and average pooling,
        dropout, reshaping, means, sums, concatenation, and products with values that depend on no
        parameter. What precedes the first parameter is free.
    rank
        Divide c_x by the rank of J_x instead of dim(x): the scalar fits least squares of minimum
        norm, and is 1 for a ReLU or a max-pool without overlaps. c_p always has dim(p). Ranks are
        those of generic weights: ``min(n_in, n_out)``; of a convolution the number of inputs read
        or of outputs, a bound at padded borders; of BatchNorm m - 2 for each channel, as for eps =
        0. The abstract does not tell dim from rank; dim as the default is our choice.

    Raises
    ------
    ValueError
        Naming the operation or module whose Jacobian is not known, here or in :meth:`factors`.

    Notes
    -----
    Cost of :meth:`factors`: one forward pass without gradients, and for each activation function
    one more with its backward pass. No activation is kept.

    References
    ----------
    Zhang, Chen, Liu: Train Feedforward Neural Network with Layer-wise Adaptive Rate via
    Approximating Back-matching Propagation, arXiv:1802.09750, of which we know the abstract. The
    scalars, their composition and the factors of every layer are our derivation.
    """

    def __init__(self, model: nn.Module, rank: bool = False) -> None:
        # a model of one layer: fx would look into it
        self.model = nn.Sequential(model) if type(model) in RULES else model
        self.rank = rank
        self._signature = inspect.signature(self.model.forward)
        defaults = {k: v.default for k, v in self._signature.parameters.items()}
        self._key: tuple[Any, ...] = ()
        self._trace(defaults)

    def _trace(self, arguments: dict[str, Any]) -> None:
        plain = {
            k: v
            for k, v in arguments.items()
            if v is None or type(v) in (bool, int, float, str)  # control flow may depend on these
        }
        key = plain, [m.training for m in self.model.modules()]
        if key != self._key:
            self._graph = _Graph(self.model, plain)
            self._key = key

    @torch.no_grad()
    def factors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Tensor, Tensor]:
        """f_p of every parameter that the output depends on, a float64 scalar on its device.

        The model runs once on the arguments, so buffers and random numbers move as in any pass:
        call this within :meth:`ModelReplay.replay`.

        Parameters
        ----------
        args, kwargs
            Of the model's call. The samples are counted along dim 0 of the first tensor.

        Raises
        ------
        ValueError
            Where an operation is not known in this use, a tensor is needed again after it was
            overwritten in place, or the output does not have the samples in dim 0.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self._trace(bound.arguments)
        tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        batch = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
        if not batch:
            raise unknown("a call without a batch in its first tensor")
        sweep = _Sweep(self.model, self._graph, self.rank, batch)
        sweep.run(*bound.arguments.values(), enable_io_processing=False)
        return sweep.compose()


class _Graph:
    """A traced model, and the nodes between its parameters and its output."""

    def __init__(self, model: nn.Module, plain: dict[str, Any]) -> None:
        attributes, random = set(vars(model)), torch.get_rng_state()
        try:
            self.graph = fx.Tracer().trace(model, concrete_args=plain)
        except Exception as error:
            raise unknown(
                f"{type(model).__name__}, which torch.fx cannot trace ({error})"
            ) from error
        finally:  # fx keeps tensors made by forward as attributes of the model
            made = set(vars(model)) - attributes
            self.constants = {name: vars(model).pop(name) for name in made}
        if not torch.equal(random, torch.get_rng_state()):
            torch.set_rng_state(random)
            raise unknown(f"{type(model).__name__}, whose forward draws its own random numbers")
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        self.live: set[fx.Node] = set()  # nodes through which a gradient reaches a parameter
        for node in self.graph.nodes:
            own = node.op == "get_attr" and node.target in parameters
            if node.op == "call_module":
                own = any(True for _ in modules[node.target].parameters())
            if own or (not _severs(node) and any(n in self.live for n in node.all_input_nodes)):
                self.live.add(node)
        self.path: set[fx.Node] = set()  # those of them from which the output is reached
        for node in reversed(self.graph.nodes):
            if node.op == "output" or node in self.path:
                self.path.update(n for n in node.all_input_nodes if n in self.live)
        for node in self.graph.nodes:
            if node in self.path:
                self._check(node, modules.get(node.target) if node.op == "call_module" else None)

    def _check(self, node: fx.Node, module: nn.Module | None) -> None:
        if node.op == "get_attr":
            raise unknown(f"the parameter {node.target!r} used outside its module")
        if module is not None:
            title = f"module {node.target!r} ({type(module).__name__})"
        else:
            title = (
                f"operation {getattr(node.target, '__name__', node.target)!r} (node {node.name!r})"
            )
        if _kind(node, module) not in RULES or node.kwargs.get("out") is not None:
            raise unknown(title)
        if module is not None and not module._parameters.keys() <= {"weight", "bias"}:
            raise unknown(f"{title} with parameters {', '.join(module._parameters)}")
        if getattr(module, "padding_mode", "zeros") not in ("zeros", "circular"):
            raise unknown(f"{title} with padding_mode {module.padding_mode!r}")  # type: ignore
        if RULES[_kind(node, module)] in (times, over):
            first, second = (n in self.live for n in pair(node.args, node.kwargs))
            if (first and second) or (second and RULES[node.target] is over):
                raise unknown(f"{title} of values that depend on parameters")
            if node.kwargs.get("rounding_mode") is not None:
                raise unknown(f"{title} with rounding")


def _severs(node: fx.Node) -> bool:
    """Whether the node's value has no gradient."""
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_method" and node.target in ("size", "dim", "numel", "detach", "item")


def _kind(node: fx.Node, module: nn.Module | None) -> Any:
    return node.target if module is None else type(module)


class _Sweep(fx.Interpreter):
    """Run the model forwards for the scalars of every node, then compose them backwards.

    The scalars of a node are taken just before it runs, while its inputs are what they were.
    """

    def __init__(self, model: nn.Module, graph: _Graph, rank: bool, batch: int) -> None:
        super().__init__(model, graph=graph.graph)
        self.extra_traceback = False
        self.plan, self.rank, self.batch = graph, rank, batch
        self.versions: dict[fx.Node, int] = {}
        self.inputs: dict[fx.Node, list[tuple[fx.Node, Number]]] = {}
        self.params: dict[fx.Node, list[tuple[Tensor, Number]]] = {}
        self.outputs: list[fx.Node] = []
        self.device = torch.device("cpu")

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return next(self.args_iter)  # of *args too: one entry of the signature each

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.plan.constants:
            return self.plan.constants[target]
        return super().get_attr(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            self._end(n)
        elif n in self.plan.path:
            self._scalars(n)
        value = super().run_node(n)
        if n in self.plan.path:
            if not isinstance(value, Tensor):
                raise unknown(f"node {n.name!r}, whose value is not one tensor")
            self.versions[n] = value._version
        return value

    def _used(self, node: fx.Node) -> None:
        if self.env[node]._version != self.versions[node]:
            raise unknown(f"node {node.name!r}, used after it was overwritten in place")

    def _scalars(self, node: fx.Node) -> None:
        for n in node.all_input_nodes:
            if n in self.plan.path:
                self._used(n)
        module = self.fetch_attr(node.target) if node.op == "call_module" else None  # type: ignore
        rule = RULES.get(_kind(node, module))
        if rule is None:
            raise unknown(f"module {node.target!r} ({type(module).__name__})")
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        grams, traces = rule(Call(node, module, args, kwargs, self.plan.live))
        self.inputs[node] = [(n, g.scalar(self.rank)) for n, g in grams if n in self.plan.path]
        self.params[node] = [(p, t / (self.batch * p.numel())) for p, t in traces]

    def _end(self, node: fx.Node) -> None:
        for n in pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(n, fx.Node) and n in self.plan.path:
                self._used(n)
                shape = self.env[n].shape
                if not shape or shape[0] != self.batch:
                    raise unknown(
                        f"an output of shape {tuple(shape)} for {self.batch} samples (dim 0 of the "
                        "first tensor)"
                    )
                self.device = self.env[n].device
                self.outputs.append(n)

    def compose(self) -> dict[Tensor, Tensor]:
        """The product of scalars along each path from the output, summed over the paths."""

        def here(value: Number) -> Number:
            return value.to(self.device) if isinstance(value, Tensor) else value

        m: dict[fx.Node, Number] = {}
        for node in self.outputs:
            m[node] = m.get(node, 0.0) + 1.0
        total: dict[Tensor, Number] = {}
        for node in reversed(self.inputs):
            for n, c in self.inputs[node]:
                m[n] = m.get(n, 0.0) + m[node] * here(c)
            for p, c in self.params[node]:
                total[p] = total.get(p, 0.0) + m[node] * here(c)
        return {
            p: f.to(p.device)
            if isinstance(f, Tensor)
            else torch.full((), f, dtype=torch.float64, device=p.device)
            for p, f in total.items()
        }
