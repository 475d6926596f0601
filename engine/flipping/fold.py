"""A copy of a model that computes the same in eval mode, with less work."""

import copy
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.layer_groups import StagedModel


def folded(model: StagedModel) -> StagedModel:
    """A frozen copy with batch norms folded into the convolutions before them.

    A convolution's bias is then the constant that its batch norm emitted.
    """
    model = copy.deepcopy(model).eval()
    for (name, conv), (norm_name, norm) in pairwise(list(model.named_modules())):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            model.set_submodule(name, fuse_conv_bn_eval(conv, norm))
            model.set_submodule(norm_name, nn.Identity())
    return model.requires_grad_(False)
