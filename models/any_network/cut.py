"""Cut a recorded pass in front of the layers: share out its calls, and find what crosses a cut.

What stands between two layers (glue: pooling, flattening, sums) joins the stage before it, and what
stands before the first layer joins the first stage. Tensors that are still needed after a cut are
the state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor, fx

from models.any_network.errors import WAYS_OUT, NetworkError


@dataclass
class Cut:
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

    def by_value(self, stage: int) -> list[fx.Node]:
        """Return those of the `alive` tensors that are needed for more than their size."""
        return [node for node in self.alive(stage) if self.last_use.get(node, -1) >= stage]

    def newest(self, stage: int) -> fx.Node | None:
        """Return the last tensor that a stage makes and hands on; None: it hands on no own one."""
        own = [node for node in self.by_value(stage + 1) if self.stage[node] == stage]
        return own[-1] if own else None


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


def cut_calls(graph: fx.Graph, layers: Sequence[str], values: Mapping[fx.Node, object]) -> Cut:
    """Share out the calls, and find what crosses each cut."""
    cut = Cut(graph, layers, _shared_out(graph, layers))
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


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)
