"""ResNet-9 against a straight-line twin, its widths, and the places where hooks attach."""

import pytest
import torch
import torch.nn.functional as F

from models.resnet9 import ResNet9


def twin(weights: dict[str, torch.Tensor], images: torch.Tensor, training: bool) -> torch.Tensor:
    """The network of Appendix A, written out."""

    def conv(x, name, stride=1, padding=1):
        x = F.conv2d(x, weights[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var = weights[f"{name}.bn.running_mean"], weights[f"{name}.bn.running_var"]
        scale, shift = weights[f"{name}.bn.weight"], weights[f"{name}.bn.bias"]
        return F.relu(F.batch_norm(x, mean.clone(), var.clone(), scale, shift, training))

    x = conv(images, "conv1")
    x = conv(x, "conv2", stride=2, padding=2)
    x = x + conv(conv(x, "conv3"), "conv4")
    x = F.max_pool2d(conv(x, "conv5"), 2)
    x = x + conv(conv(x, "conv6"), "conv7")
    x = conv(x, "conv8", padding=0)
    x = F.adaptive_max_pool2d(x, 1).flatten(1)
    return 0.2 * F.linear(x, weights["linear.weight"])


def model_with_statistics(channels: int = 3, width: float = 0.25) -> ResNet9:
    """A model whose batch norms have something to do."""
    model = ResNet9(channels=channels, width=width)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".bn." in name and tensor.is_floating_point():
                tensor += 0.5 * torch.rand(tensor.shape)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28), (1, 11)])
def test_equals_the_straight_line_twin(channels, size, training):
    model = model_with_statistics(channels).train(training)
    images = torch.randn(4, channels, size, size)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights |= {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}

    logits, expected = model(images), twin(weights, images, training)
    assert torch.equal(logits, expected)

    labels = torch.arange(4)
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected, labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, msg=name)


@pytest.mark.parametrize(
    ("width", "channels"),
    [(1.0, [64, 128, 256]), (0.25, [16, 32, 64]), (1.5, [96, 192, 384]), (0.001, [1, 1, 1])],
)
def test_width_scales_every_convolution(width, channels):
    c64, c128, c256 = channels
    model = ResNet9(width=width)
    outputs = [getattr(model, f"conv{i}").conv.out_channels for i in range(1, 9)]
    assert outputs == [c64, c128, c128, c128, c256, c256, c256, c128]
    assert model.linear.in_features == c128
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("width", [0, -1.0, float("nan")])
def test_width_must_be_positive(width):
    with pytest.raises(ValueError, match=f"width must be above 0, not {width}"):
        ResNet9(width=width)


def test_hooks_catch_every_layer_and_every_block():
    model = model_with_statistics().eval()
    seen = {}

    def remember(name):
        return lambda module, inputs, output: seen.update({name: output})

    for name, module in model.named_children():
        module.register_forward_hook(remember(name))
    model(torch.randn(2, 3, 32, 32))

    assert seen["conv1"].shape == (2, 16, 32, 32)
    assert torch.equal(seen["residual1"], seen["conv2"] + seen["conv4"])
    assert torch.equal(seen["residual2"], seen["pool"] + seen["conv7"])
    assert all(seen[f"conv{i}"].min() == 0 for i in range(1, 9))  # after the ReLU


@pytest.mark.parametrize("site", ["conv1", "conv4", "residual1", "conv5", "residual2", "conv8"])
def test_a_hook_that_changes_an_output_changes_the_logits(site):
    model = model_with_statistics().eval()
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    handle = getattr(model, site).register_forward_hook(lambda module, inputs, output: 0 * output)
    assert not torch.equal(model(images), before)
    handle.remove()
    assert torch.equal(model(images), before)
