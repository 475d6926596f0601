"""SGD, which runs as one kernel on a GPU and as it always did on a CPU."""

import copy

import pytest
import torch

from engine.setup import load_split, make_model
from engine.training import make_optimizer, train_epoch
from gradient_accounting import GradientAccountant


def test_on_a_cpu_it_is_torchs_own_choice(tiny):
    config = tiny()
    model = make_model(config, load_split(config))
    own = make_optimizer(model.parameters(), config.train)
    default = torch.optim.SGD(model.parameters(), lr=0, momentum=0.9, weight_decay=5e-4)
    assert own.defaults == default.defaults
    assert own.param_groups[0]["params"] == list(model.parameters())


@pytest.mark.gpu
def test_the_fused_one_agrees_with_the_other(tiny):
    """With gradients of accounting, which come in memory layouts of their own."""
    config, device = tiny(), torch.device("cuda")
    split = load_split(config).to(device)
    model = make_model(config, split).to(device)
    twin = copy.deepcopy(model)
    fused = make_optimizer(model.parameters(), config.train)
    assert fused.defaults["fused"]
    plain = torch.optim.SGD(
        twin.parameters(),
        lr=0.0,
        momentum=config.train.momentum,
        weight_decay=config.train.weight_decay,
        fused=False,
    )
    for epoch in (1, 2):
        for network, optimizer in ((model, fused), (twin, plain)):
            accountant = GradientAccountant(network)
            train_epoch(network, optimizer, split, config, epoch, accountant.backward)
    for (name, own), other in zip(model.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4, msg=name)
