"""A copy of a model that computes the same in eval mode, with less work."""

import copy
from collections.abc import Iterator
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from models.layer_groups import StagedModel


def folded(model: StagedModel) -> StagedModel:
    """A frozen copy with batch norms folded into the layers before them.

    A layer's bias is then the constant that its batch norm emitted. A layer or a norm with a hook,
    such as dropout behind it, stays as it is: what the hook sees must not change.
    """
    model = copy.deepcopy(model).eval()
    for name, norm_name in list(_layers_and_norms(model)):
        layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
        if any(module._forward_hooks or module._forward_pre_hooks for module in (layer, norm)):
            continue
        fuse = fuse_conv_bn_eval if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval
        model.set_submodule(name, fuse(layer, norm))
        model.set_submodule(norm_name, nn.Identity())
    return model.requires_grad_(False)


def _layers_and_norms(model: StagedModel) -> Iterator[tuple[str, str]]:
    """Yield the names of each layer with a batch norm, and of the norm.

    In a model whose wiring was observed only plain layers count: a subclass (weight
    standardization, a parametrization) may compute with other weights than it holds.
    """
    if model.wiring is None:
        for (name, conv), (norm_name, norm) in pairwise(list(model.named_modules())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                yield name, norm_name
        return
    for name, norm in model.wiring.norms.items():
        kinds = (type(model.get_submodule(name)), type(model.get_submodule(norm)))
        if kinds in ((nn.Conv2d, nn.BatchNorm2d), (nn.Linear, nn.BatchNorm1d)):
            yield name, norm
