"""Find the stage that every parameter and buffer of a network belongs to."""

from collections.abc import Mapping, Sequence

from torch import nn

from models.any_network.cut import Cut
from models.any_network.errors import WAYS_OUT, NetworkError


def find_owners(network: nn.Module, cuts: Sequence[Cut]) -> dict[str, int]:
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
                same = (n for n in owners if parameters.get(n) is parameters[name])
                if (other := next(same, None)) is not None:
                    raise NetworkError(
                        f"{name} and {other} are one parameter under two names; keep one of them"
                    )
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


def shortest_names(network: nn.Module, owners: Mapping[str, int], stage: int) -> tuple[str, ...]:
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
