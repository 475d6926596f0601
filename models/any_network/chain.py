"""Derive a chain of stages from any network: what every experiment needs (models/layer_groups.py).

torch.fx records the network's forward pass as a list of calls; only modules that hold a cut inside
are opened, all others stay whole and run as they are. The list is cut in front of each named layer.
What stands between two layers (glue: pooling, flattening, sums) joins the stage before it, and what
stands before the first layer joins the first stage. Tensors that are still needed after a cut are
the state. Each stage becomes a function of the chain and the state, so that a copy of the chain
runs its own weights.
"""

import builtins
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise

import torch
from torch import Tensor, fx, nn

from models.any_network.errors import WAYS_OUT, NetworkError, last_line, nearest, place_of
from models.layer_groups import Stage, StagedModel, State

NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)
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


# ---------------------------------------------------------------- values of a recorded pass


class _Values(fx.Interpreter):
    """Run a recorded pass and keep every value; modules outside of the record run once."""

    def __init__(self, network: nn.Module, graph: fx.Graph):
        super().__init__(network, garbage_collect_values=False, graph=graph)

    @torch.no_grad()
    def values(self, images: Tensor) -> dict[fx.Node, object]:
        self.run(images.clone())
        return dict(self.env)


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


# ---------------------------------------------------------------- cutting


@dataclass
class _Cut:
    """A recorded pass whose calls are shared out among stages."""

    graph: fx.Graph
    layers: Sequence[str]
    stage: dict[fx.Node, int]
    repeated: set[fx.Node] = field(default_factory=set)  # sizes and parameters: read where used
    repeats: list[set[fx.Node]] = field(default_factory=list)  # of these, what each stage reads
    last_use: dict[fx.Node, int] = field(default_factory=dict)  # of tensors, by stage
    last_size: dict[fx.Node, int] = field(default_factory=dict)  # of tensors, for their size alone

    def alive(self, stage: int) -> list[fx.Node]:
        """Return the tensors made before a stage and needed in it or after it, in order."""
        return [
            node
            for node in self.graph.nodes
            if node in self.last_use | self.last_size
            and self.stage[node] < stage
            and max(self.last_use.get(node, -1), self.last_size.get(node, -1)) >= stage
        ]


def _shared_out(graph: fx.Graph, layers: Sequence[str]) -> dict[fx.Node, int]:
    """Return the stage of each call: a stage begins with the first call of its layer."""
    position: dict[str, int] = {}
    for place, node in enumerate(graph.nodes):
        if node.op == "call_module":
            position.setdefault(node.target, place)
    for layer in layers:
        if layer not in position:
            raise NetworkError(
                f"layer {layer}: the network never calls it as a module of its own; {WAYS_OUT}"
            )
    for first, second in pairwise(layers):
        if position[first] > position[second]:
            order = ", ".join(sorted(layers, key=position.get))
            raise NetworkError(
                f"layers: {second} runs before {first}; in forward order they are [{order}]"
            )
    starts = [position[layer] for layer in layers[1:]]
    return {
        node: -1 if node.op == "placeholder" else sum(start <= place for start in starts)
        for place, node in enumerate(graph.nodes)
    }


def _cut(graph: fx.Graph, layers: Sequence[str], values: Mapping[fx.Node, object]) -> _Cut:
    """Share out the calls, and find what crosses each cut."""
    cut = _Cut(graph, layers, _shared_out(graph, layers))
    cut.repeats = [set() for _ in layers]
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        value = values[node]
        plain = value is not None and not _holds_tensor(value)
        if node.op == "get_attr" or plain:
            cut.repeated.add(node)

    def need(value: fx.Node, stage: int, last: dict[fx.Node, int]) -> None:
        if value in cut.repeated:
            cut.repeats[stage].add(value)
            for source in value.all_input_nodes:
                need(source, stage, cut.last_size)
        else:
            last[value] = max(stage, last.get(value, -1))

    for node in graph.nodes:
        if node not in cut.repeated:
            for value in node.all_input_nodes:
                need(value, cut.stage[node], cut.last_use)
    for stage, layer in enumerate(layers[1:], start=1):
        for node in cut.alive(stage):
            if node.op != "placeholder" and not isinstance(values[node], Tensor):
                raise NetworkError(
                    f"layer {layer}: {node.name} is needed behind the cut in front of it and is "
                    f"no tensor but a {type(values[node]).__name__}; {WAYS_OUT}"
                )
    return cut


def _newest(cut: _Cut, stage: int) -> fx.Node | None:
    """Return the last tensor that a stage makes and hands on; None: it hands on no own tensor."""
    own = [n for n in cut.alive(stage + 1) if cut.stage[n] == stage and n in cut.last_use]
    return own[-1] if own else None


def _compiled(cut: _Cut, stage: int, outputs: str, cloned: bool) -> Callable[..., State]:
    """Return a stage as a function of the chain and of the state's tensors."""
    new, env = fx.Graph(), {}
    inputs = cut.alive(stage)
    for node in inputs:
        env[node] = new.placeholder(node.name)
    if cloned:
        for node in inputs:
            env[node] = new.call_method("clone", (env[node],))
    for node in cut.graph.nodes:
        own = cut.stage[node] == stage and node not in cut.repeated
        if (own or node in cut.repeats[stage]) and node.op not in ("placeholder", "output"):
            env[node] = new.node_copy(node, env.__getitem__)
    if stage == len(cut.layers) - 1:
        result = next(node for node in cut.graph.nodes if node.op == "output").args[0]
        new.output(fx.map_arg(result, env.__getitem__))
    else:
        newest = _newest(cut, stage)
        if newest is not None:
            env[newest] = new.call_module(f"{outputs}.{stage}", (env[newest],))
        handed_on = cut.alive(stage + 1)
        for node in handed_on:
            if cut.last_use.get(node, -1) <= stage:  # for its size alone: no gradient flows there
                env[node] = new.call_method("detach", (env[node],))
        state = tuple(env[node] for node in handed_on)
        new.output(state[0] if len(state) == 1 else state)
    code = new.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, f"<stage {cut.layers[stage]}>", "exec"), names)
    return names["forward"]


# ---------------------------------------------------------------- whose weights are whose


def _owners(network: nn.Module, cuts: Sequence[_Cut]) -> dict[str, int]:
    """Return the stage of every parameter and buffer; raise where there is not exactly one."""
    names, owners = [*network.state_dict()], {}
    layers = cuts[0].layers
    for cut in cuts:
        for node in cut.graph.nodes:
            if node.op == "call_module":
                stages = {cut.stage[node]}
            elif node.op == "get_attr":
                stages = {stage for stage, found in enumerate(cut.repeats) if node in found}
            else:
                continue
            used = [n for n in names if n == node.target or n.startswith(f"{node.target}.")]
            for name in used:
                for stage in stages:
                    if owners.setdefault(name, stage) != stage:
                        raise NetworkError(
                            f"{node.target}: is used in the layer {layers[owners[name]]} and again "
                            f"in {layers[stage]}, and can belong to one only; {WAYS_OUT}"
                        )
    parameters = dict(network.named_parameters(remove_duplicate=False))
    _require_own_tensors(parameters, owners, layers)
    for name in names:
        if name not in owners:
            if name in parameters:
                raise NetworkError(
                    f"{name}: the network's forward pass does not use this parameter; delete it, "
                    "or subclass StagedModel (docs/your_network.md)"
                )
            owners[name] = len(layers) - 1  # a buffer that is never read: anywhere
    return owners


def _require_own_tensors(
    parameters: Mapping[str, nn.Parameter], owners: Mapping[str, int], layers: Sequence[str]
) -> None:
    """Raise if two layers share a parameter, or if one is frozen."""
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        other = first.setdefault(id(parameter), name)
        if name in owners and owners.get(other, owners[name]) != owners[name]:
            raise NetworkError(
                f"{name} and {other} are the same parameter, in the layers {layers[owners[name]]} "
                f"and {layers[owners[other]]}; it can belong to one only; {WAYS_OUT}"
            )
        if not parameter.requires_grad:
            raise NetworkError(
                f"{name}: does not require a gradient; every parameter is trained (what is not, "
                "make a buffer: register_buffer)"
            )


def _prefixes(network: nn.Module, owners: Mapping[str, int], stage: int) -> tuple[str, ...]:
    """Return the shortest list of names of modules and tensors that spans a stage's tensors."""
    found: list[str] = []

    def descend(module: nn.Module, prefix: str) -> None:
        own = [name for name in owners if name.startswith(prefix)]
        if prefix and own and {owners[name] for name in own} == {stage}:
            found.append(prefix.removesuffix("."))
            return
        direct = [*module._parameters, *module._buffers]
        found.extend(f"{prefix}{n}" for n in direct if owners.get(f"{prefix}{n}") == stage)
        for name, child in module._modules.items():
            if child is not None and any(
                owners[n] == stage for n in own if n.startswith(f"{prefix}{name}.")
            ):
                descend(child, f"{prefix}{name}.")

    descend(network, "")
    return tuple(found)


# ---------------------------------------------------------------- choosing layers


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a module's children; containers without a forward pass of their own are opened."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _has_weights(module: nn.Module) -> bool:
    """Tell whether a module holds parameters besides those of normalization layers."""
    return any(
        next(part.parameters(recurse=False), None) is not None
        for part in module.modules()
        if not isinstance(part, NORMALIZATIONS)
    )


def default_layers(network: nn.Module) -> list[str]:
    """Return the children that hold weights, in forward order; norms join the layer before."""
    children = [name for name, child in _children(network) if _has_weights(child)]
    position: dict[str, int] = {}
    for place, node in enumerate(record_calls(network, children).nodes):
        if node.op == "call_module":
            position.setdefault(node.target, place)
    called = sorted((name for name in children if name in position), key=position.get)
    if not called:
        raise NetworkError(
            "the network calls no module with weights; subclass StagedModel (docs/your_network.md)"
        )
    return called


def check_layers(network: nn.Module, layers: Sequence[str]) -> None:
    """Raise unless each layer is a module with weights, outside of all others."""
    if not layers:
        raise NetworkError("layers: the list is empty; leave it out for the network's own children")
    modules = dict(network.named_modules())
    modules.pop("", None)
    for i, layer in enumerate(layers):
        if layer not in modules:
            known = nearest(layer, modules) or f"; there are {', '.join(_some(modules))}"
            raise NetworkError(f"layer {layer}: the network has no such module{known}")
        if layer in layers[:i]:
            raise NetworkError(f"layer {layer}: stands twice in the list")
        if outer := next((o for o in layers if layer.startswith(f"{o}.")), None):
            raise NetworkError(f"layer {layer}: lies inside of layer {outer}; name one of the two")
        if isinstance(modules[layer], (nn.ModuleList, nn.ModuleDict)):
            raise NetworkError(
                f"layer {layer}: a {type(modules[layer]).__name__} computes nothing itself; name "
                f"the modules in it, such as {layer}.{next(iter(modules[layer]._modules), 0)}"
            )
        if next(modules[layer].parameters(), None) is None:
            raise NetworkError(
                f"layer {layer}: holds no parameters; it joins the layer before it by itself"
            )


def _some(modules: Mapping[str, nn.Module], most: int = 12) -> list[str]:
    names = [name for name, module in modules.items() if "." not in name] or [*modules]
    return names[:most] + (["..."] if len(names) > most else [])


# ---------------------------------------------------------------- the chain


class DerivedChain(StagedModel):
    """A network cut into stages, with the network's own parameter names.

    The modules, parameters, buffers and attributes are the network's own. Behind each stage but the
    last stands an Identity, for hooks: on the tensor that the stage makes last and hands on.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], outputs: str):
        super().__init__()
        for key, value in vars(network).items():
            # Containers of its own, so that the chain can add to them and the network stays whole.
            vars(self)[key] = copy.copy(value) if isinstance(value, dict) else value
        self._layers = tuple(layers)
        self._outputs = outputs
        self.add_module(outputs, nn.ModuleList(nn.Identity() for _ in layers[:-1]))
        self._owned: list[tuple[str, ...]] = []
        self._functions: dict[bool, list[Callable[..., State]]] = {}

    def stages(self) -> list[Stage]:
        return [
            (name, owned, partial(self._run, number))
            for number, (name, owned) in enumerate(zip(self._layers, self._owned))
        ]

    def _run(self, number: int, state: State) -> State:
        function = self._functions[self.training][number]
        return function(self, *(state if isinstance(state, tuple) else (state,)))

    def dropout_sites(self, kind: str = "blocks") -> dict[str, int]:
        """Behind each layer but the last."""
        names = (f"{self._outputs}.{number}" for number in range(len(self._layers) - 1))
        seen = self.wiring.outputs
        return {name: seen[name].channels for name in names if name in seen}


def derive_chain(
    network: nn.Module, images: Tensor, layers: Sequence[str] | None = None
) -> DerivedChain:
    """Cut a network in front of the named layers, or of its own children that hold weights.

    The images are a small example batch. Stages are made twice, as the network computes in training
    mode and as it does in eval mode. A stage that would change its input in place works on a copy.
    """
    if layers is None:
        layers = default_layers(network)
    check_layers(network, layers)
    cuts = {}
    for training in (True, False):
        with restoring(network, training):
            graph = record_calls(network, layers)
            cuts[training] = _cut(graph, layers, _Values(network, graph).values(images))
    outputs = "layer_outputs"
    while hasattr(network, outputs):
        outputs += "_"
    chain = DerivedChain(network, layers, outputs)
    owners = _owners(network, [*cuts.values()])
    chain._owned = [_prefixes(network, owners, stage) for stage in range(len(layers))]
    for stage, owned in enumerate(chain._owned):
        if not owned:
            raise NetworkError(f"layer {layers[stage]}: no parameter is used in it; {WAYS_OUT}")
    numbers = range(len(layers))
    for training, cut in cuts.items():
        chain._functions[training] = [_compiled(cut, k, outputs, False) for k in numbers]
    for training, cut in cuts.items():
        changing = _changing_stages(chain, images, training)
        chain._functions[training] = [_compiled(cut, k, outputs, k in changing) for k in numbers]
    return chain


@torch.no_grad()
def _changing_stages(chain: DerivedChain, images: Tensor, training: bool) -> set[int]:
    """Return the stages that change, in place, what they or an earlier stage were given."""
    state, given, before, changing = images.clone(), [], [], set()
    with restoring(chain, training):
        for number, (_, _, forward) in enumerate(chain.stages()):
            given += state if isinstance(state, tuple) else (state,)
            before += [tensor.clone() for tensor in given[len(before) :]]
            state = forward(state)
            if any(not torch.equal(now, then) for now, then in zip(given, before)):
                changing.add(number)
                before = [tensor.clone() for tensor in given]
    return changing
