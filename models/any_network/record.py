"""Record the forward pass of a network as a list of calls, and run such a record.

torch.fx records. Only modules that hold a cut inside are opened, all others stay whole and run as
they are.
"""

import builtins
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor, fx, nn

from models.any_network.errors import WAYS_OUT, NetworkError, last_line, place_of

_ROOT = "network"  # the name of the traced network inside its caller


class _Caller(nn.Module):
    """Call a network with one argument, whatever else its forward takes."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class _Tracer(fx.Tracer):
    """Open the named modules and leave all others whole."""

    def __init__(self, opened: set[str]):
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name not in self.opened


@contextmanager
def _recorded_len() -> Iterator[None]:
    """Record len(x) while a network is traced; torch.fx alone refuses it."""

    def recorded(value: object) -> object:
        if isinstance(value, fx.Proxy):
            return value.tracer.create_proxy("call_function", plain, (value,), {})
        return plain(value)

    plain, builtins.len = builtins.len, recorded
    try:
        yield
    finally:
        builtins.len = plain


def record_calls(network: nn.Module, layers: Sequence[str]) -> fx.Graph:
    """Return the calls of a forward pass, with the modules that hold one of the layers opened.

    A tensor that the forward pass makes from numbers becomes a buffer of the network, which no
    state_dict has.
    """
    opened = {_ROOT} | {
        f"{_ROOT}.{layer.rsplit('.', depth)[0]}"
        for layer in layers
        for depth in range(1, layer.count(".") + 1)
    }
    caller = _Caller(network)
    tracer = _Tracer(opened)
    try:
        with torch.random.fork_rng(devices=[]), _recorded_len():
            graph = tracer.trace(caller)
    except Exception as error:
        raise NetworkError(
            f"{place_of(error)}cannot be traced ({last_line(error)}); {WAYS_OUT}"
        ) from None
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix(f"{_ROOT}.")
            if node.op == "get_attr" and hasattr(caller, node.target):
                node.target = _kept(network, getattr(caller, node.target).detach())
    return graph


def _kept(network: nn.Module, constant: Tensor) -> str:
    """Return the name of a buffer of the network with this value."""
    for number in count():
        name = f"_constant{number}"
        if not hasattr(network, name):
            network.register_buffer(name, constant, persistent=False)
        if torch.equal(getattr(network, name), constant):
            return name


@contextmanager
def restoring(model: nn.Module, training: bool) -> Iterator[None]:
    """Run a model in a mode; its buffers, its mode and torch's random numbers are put back."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train(training)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes.items():
            module.training = mode


class RecordedPass(fx.Interpreter):
    """Run a recorded pass and keep every value; modules outside of the record run once."""

    def __init__(self, network: nn.Module, graph: fx.Graph):
        super().__init__(network, garbage_collect_values=False, graph=graph)

    @torch.no_grad()
    def values(self, images: Tensor) -> dict[fx.Node, object]:
        self.run(images.clone())
        return dict(self.env)
