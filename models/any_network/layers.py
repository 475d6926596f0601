"""Choose the layers in front of which a network is cut, or check those that its user names."""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from models.any_network.errors import NetworkError, nearest
from models.any_network.record import record_calls

NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)


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
