"""Places of dropout: the modules behind which it stands, and the channels that leave them."""

from collections.abc import Sequence

from torch import Tensor

from models.any_network.errors import nearest
from models.layer_groups import StagedModel
from models.wiring import Output, Wiring, observe


def own_places(model: StagedModel, kind: str = "blocks") -> dict[str, Output]:
    """Return the places that a model chooses itself, in forward order."""
    channels = type(model).dropout_sites(model, kind)
    if not channels:
        raise ValueError("sites: the network names none; list modules, as in [conv1, conv2]")
    if model.wiring is None:
        return {site: Output(count, model.channel_dim) for site, count in channels.items()}
    return _named_places([*channels], model.wiring)


def find_places(
    model: StagedModel, sites: str | Sequence[str], images: Tensor
) -> dict[str, Output]:
    """Return the model's own places of a kind, or those behind the modules of these names.

    A model whose wiring was not observed runs the images once for that; they are on its device.
    """
    if isinstance(sites, str):
        return own_places(model, sites)
    modules = dict(model.named_modules())
    for site in sites:
        if site not in modules:
            raise ValueError(f"sites: the network has no module {site}{nearest(site, modules)}")
    return _named_places(sites, model.wiring or observe(model, images))


def _named_places(sites: Sequence[str], wiring: Wiring) -> dict[str, Output]:
    last = wiring.layers[-1].name if wiring.layers else None
    for site in sites:
        if site not in wiring.outputs or site == last:
            raise ValueError(
                f"sites: {site} does not run once and hand on channels (the logits are none)"
            )
    return {site: wiring.outputs[site] for site in sites}
