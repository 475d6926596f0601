"""ViT-small against the package vit-pytorch and against attention written out."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import build_model
from models.vit_small import LocalitySelfAttention

SMALL = {"dim": 48, "depth": 2, "heads": 3, "dim_head": 16, "mlp_dim": 40}
WHY = "needs vit-pytorch, which requirements-dev.txt installs"


def reference(channels, classes, image_size, patch, dropout=0.0, **options):
    package = pytest.importorskip("vit_pytorch.vit_for_small_dataset", reason=WHY)
    return package.ViT(
        image_size=image_size,
        patch_size=patch,
        num_classes=classes,
        channels=channels,
        dropout=dropout,
        emb_dropout=dropout,
        **options,
    )


@pytest.mark.parametrize(("channels", "image_size"), [(3, 32), (1, 28)])
def test_paper_size_equals_vit_pytorch(channels, image_size):
    """Same initialization from the same seed, same number of parameters, same output."""
    shape = {"channels": channels, "classes": 10, "image_size": image_size}
    model = build_model("vit_small", **shape, seed=3).eval()
    torch.manual_seed(3)
    theirs = reference(**shape, patch=2, dim=512, depth=6, heads=8, mlp_dim=512).eval()

    assert dict(model.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], parameter), name
    images = torch.randn(2, channels, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch", [2, 4])
def test_output_and_gradients_equal_those_of_vit_pytorch(patch):
    shape = {"channels": 2, "classes": 5, "image_size": 16, "patch": patch}
    theirs = reference(**shape, **SMALL).train()
    model = build_model("vit_small", **shape, **SMALL, dropout=0.0, seed=0).train()
    model.load_state_dict(theirs.state_dict())

    images, labels = torch.randn(4, 2, 16, 16), torch.arange(4)
    F.cross_entropy(model(images), labels).backward()
    F.cross_entropy(theirs(images), labels).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def slow_attention(attention: LocalitySelfAttention, x: torch.Tensor) -> torch.Tensor:
    """One example, one head and one token at a time."""
    dim_head = attention.to_qkv.out_features // (3 * attention.heads)
    rows = []
    for example in attention.norm(x):
        q, k, v = attention.to_qkv(example).chunk(3, dim=-1)
        heads = []
        for h in range(attention.heads):
            columns = slice(h * dim_head, (h + 1) * dim_head)
            tokens = []
            for i in range(len(example)):
                others = [j for j in range(len(example)) if j != i]
                scores = k[others, columns] @ q[i, columns] * attention.temperature.exp()
                tokens.append(scores.softmax(0) @ v[others, columns])
            heads.append(torch.stack(tokens))
        rows.append(torch.cat(heads, dim=-1))
    return attention.to_out(torch.stack(rows))


def test_attention_equals_its_slow_twin():
    attention = LocalitySelfAttention(tokens=5, dim=12, heads=2, dim_head=4, dropout=0.1).eval()
    assert attention.temperature.exp().item() == pytest.approx(4**-0.5)
    x = torch.randn(3, 5, 12)
    with torch.no_grad():
        attention.temperature.add_(0.7)
        torch.testing.assert_close(attention(x), slow_attention(attention, x))


def test_no_token_attends_to_itself():
    """With equal scores and values that are the tokens, each gets the mean of the others."""
    attention = LocalitySelfAttention(tokens=5, dim=8, heads=2, dim_head=4, dropout=0.0)
    attention.norm = attention.to_out = torch.nn.Identity()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        attention.to_qkv.weight.copy_(torch.cat([torch.zeros(16, 8), torch.eye(8)]))
        expected = (x.sum(dim=1, keepdim=True) - x) / 4
        torch.testing.assert_close(attention(x), expected)


def test_dropout_acts_in_training_only():
    model = build_model(
        "vit_small", channels=1, classes=3, image_size=8, seed=0, **SMALL, dropout=0.5
    )
    images = torch.randn(2, 1, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_patch_must_divide_the_image():
    with pytest.raises(ValueError, match="patch 5 does not divide the image size 28"):
        build_model("vit_small", channels=1, classes=10, image_size=28, seed=0, patch=5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tokens", [65, 197, 257])
def test_fast_attention_in_bf16(tokens, device):
    """torch chooses a kernel by device and size; each must do what plain arithmetic does."""
    torch.manual_seed(0)
    attention = LocalitySelfAttention(tokens, 64, heads=2, dim_head=64, dropout=0.0).to(device)
    x = torch.randn(3, tokens, 64, device=device)
    toward, found = torch.randn_like(x), []
    for kernels in (sdpa_kernel(SDPBackend.MATH), contextlib.nullcontext()):
        x = x.detach().requires_grad_()
        attention.zero_grad()
        with kernels, torch.autocast(device, torch.bfloat16):
            output = attention(x)
        (output.float() * toward).sum().backward()
        found.append([output.detach(), x.grad, *(p.grad for p in attention.parameters())])
    for plain, fast in zip(*found):
        assert (fast - plain).float().norm() < 0.02 * plain.float().norm()
