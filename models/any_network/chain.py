"""Derive a chain of stages from any network: what every experiment needs (models/layer_groups.py).

The forward pass is recorded (record.py) and cut in front of each named layer (cut.py). Each stage
becomes a function of the chain and the state, so that a copy of the chain runs its own weights.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor, fx, nn

from models.any_network.cut import Cut, cut_calls
from models.any_network.errors import WAYS_OUT, NetworkError
from models.any_network.layers import check_layers, default_layers
from models.any_network.ownership import find_owners, shortest_names
from models.any_network.record import RecordedPass, record_calls, restoring
from models.layer_groups import Stage, StagedModel, State


class DerivedChain(StagedModel):
    """A network cut into stages, with the network's own parameter names.

    The modules, parameters, buffers and attributes are the network's own, except attributes with
    the name of one of the chain's. A module with such a name (stages) hides the method, which is
    then called by its class. The network's own forward hooks are recorded as part of the stages.

    Behind each stage but the last stands an Identity, for hooks: on the tensor that the stage makes
    last and hands on. Its name is that of the layer, with / for each dot, inside of the module
    `outputs`.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], outputs: str):
        super().__init__()
        modules, tensors = network._modules, [*network._parameters, *network._buffers]
        for name in [*tensors, *modules.keys() & {"wiring"}]:
            if hasattr(DerivedChain, name):
                raise NetworkError(f"{name}: rename it; StagedModel has an attribute of this name")
        for key, value in vars(network).items():
            if not hasattr(DerivedChain, key):
                # Dictionaries of its own: the chain can add to them, the network stays whole.
                vars(self)[key] = copy.copy(value) if isinstance(value, dict) else value
        self._forward_hooks.clear()
        self._forward_pre_hooks.clear()
        vars(self).update((k, m) for k, m in modules.items() if hasattr(DerivedChain, k))
        self._chain_layers = tuple(layers)
        self._chain_outputs = [f"{outputs}.{layer.replace('.', '/')}" for layer in layers[:-1]]
        self.add_module(outputs, nn.Module())
        for name in self._chain_outputs:
            self.get_submodule(outputs).add_module(name.removeprefix(f"{outputs}."), nn.Identity())
        self._chain_owned: list[tuple[str, ...]] = []
        self._chain_functions: dict[bool, list[Callable[..., State]]] = {}
        self._chain_by_value: dict[bool, list[list[int]]] = {}  # of each stage: places in the state

    def stages(self) -> list[Stage]:
        return [
            (name, owned, partial(DerivedChain._run, self, number))
            for number, (name, owned) in enumerate(zip(self._chain_layers, self._chain_owned))
        ]

    def _run(self, number: int, state: State) -> State:
        function = self._chain_functions[self.training][number]
        return function(self, *(state if isinstance(state, tuple) else (state,)))

    def values_behind(self, stage: int, state: State) -> tuple[Tensor, ...]:
        parts = super().values_behind(stage, state)
        return tuple(parts[place] for place in self._chain_by_value[self.training][stage])

    def dropout_sites(self, kind: str = "blocks") -> dict[str, int]:
        """Behind each layer but the last."""
        seen = self.wiring.outputs
        for name in self._chain_outputs:
            if name not in seen:
                raise NetworkError(
                    f"sites: {name} hands on no tensor whose channel dimension is known; list "
                    "modules in dropout.sites"
                )
        return {name: seen[name].channels for name in self._chain_outputs}


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
            cuts[training] = cut_calls(graph, layers, RecordedPass(network, graph).values(images))
    outputs = "layer_outputs"
    while hasattr(network, outputs):
        outputs += "_"
    chain = DerivedChain(network, layers, outputs)
    owners = find_owners(network, [*cuts.values()])
    chain._chain_owned = [shortest_names(network, owners, stage) for stage in range(len(layers))]
    for stage, owned in enumerate(chain._chain_owned):
        if not owned:
            raise NetworkError(f"layer {layers[stage]}: no parameter is used in it; {WAYS_OUT}")
    for training, cut in cuts.items():
        chain._chain_functions[training] = _compiled_stages(chain, cut, set())
        chain._chain_by_value[training] = [
            [cut.alive(stage).index(node) for node in cut.by_value(stage)]
            for stage in range(1, len(layers))
        ] + [[0]]  # the logits
    for training, cut in cuts.items():
        changing = changing_stages(chain, images, training)
        chain._chain_functions[training] = _compiled_stages(chain, cut, changing)
    return chain


@torch.no_grad()
def changing_stages(chain: StagedModel, images: Tensor, training: bool) -> set[int]:
    """Return the stages that change, in place, what they or an earlier stage were given."""
    state, given, before, changing = images.clone(), [], [], set()
    with restoring(chain, training):
        for number, (_, _, forward) in enumerate(type(chain).stages(chain)):
            given += state if isinstance(state, tuple) else (state,)
            before += [tensor.clone() for tensor in given[len(before) :]]
            state = forward(state)
            if any(not torch.equal(now, then) for now, then in zip(given, before)):
                changing.add(number)
                before = [tensor.clone() for tensor in given]
    return changing


# ---------------------------------------------------------------- a stage as a function


def _compiled_stages(
    chain: DerivedChain, cut: Cut, changing: Collection[int]
) -> list[Callable[..., State]]:
    """Return all stages; those that change what they are given work on a copy of it."""
    numbers = range(len(cut.layers))
    return [_compiled(cut, number, chain._chain_outputs, number in changing) for number in numbers]


def _compiled(cut: Cut, stage: int, outputs: Sequence[str], cloned: bool) -> Callable[..., State]:
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
        newest = cut.newest(stage)
        if newest is not None:
            env[newest] = new.call_module(outputs[stage], (env[newest],))
        handed_on = cut.alive(stage + 1)
        for node in handed_on:
            if node not in cut.by_value(stage + 1):  # for its size alone: no gradient flows there
                env[node] = new.call_method("detach", (env[node],))
        state = tuple(env[node] for node in handed_on)
        new.output(state[0] if len(state) == 1 else state)
    code = new.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, f"<stage {cut.layers[stage]}>", "exec"), names)
    return names["forward"]
