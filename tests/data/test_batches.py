import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import augment, batch_rows, batches, epoch_order, make_split, normalize


@given(n=st.integers(0, 300), batch_size=st.integers(1, 70))
def test_batches_cover_everything_once(n, batch_size):
    bounds = batch_rows(n, batch_size)
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(n))
    sizes = [stop - start for start, stop in bounds]
    assert all(size == batch_size for size in sizes[:-1])
    if sizes and batch_size > 1:
        assert 2 <= sizes[-1] <= batch_size + 1 or n == 1


def test_a_last_batch_of_one_joins_the_one_before():
    assert batch_rows(9, 4) == [(0, 4), (4, 9)]
    assert batch_rows(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert batch_rows(1, 4) == [(0, 1)]
    assert batch_rows(0, 4) == []


def test_normalize():
    ends = normalize(torch.tensor([0, 255], dtype=torch.uint8))
    assert ends.dtype == torch.float32
    assert ends.tolist() == [-1, 1]


def test_a_batch_carries_what_belongs_together(tiny_dataset):
    split = make_split(tiny_dataset, noise_rate=0.3, train_size=41)
    order = epoch_order(split.n, seed=1, epoch=2)
    seen = list(batches(split, 8, order))
    assert [len(batch.index) for batch in seen] == [8, 8, 8, 8, 9]
    for batch, rows in zip(seen, order.split([8, 8, 8, 8, 9])):
        assert torch.equal(batch.index, split.index[rows])
        assert torch.equal(batch.label, split.label[rows])
        assert torch.equal(batch.memorized, split.memorized[rows])
        # Image i of the whole data set is filled with the value i.
        assert torch.equal(((batch.image[:, 0, 0, 0] + 1) * 127.5).round().long(), batch.index)


def test_without_an_order_batches_are_sequential(tiny_dataset):
    split = make_split(tiny_dataset)
    assert torch.equal(torch.cat([batch.index for batch in batches(split, 7)]), split.index)


def test_the_order_is_a_permutation_decided_by_seed_and_epoch():
    order = epoch_order(1000, 5, 3)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(order, epoch_order(1000, 5, 3))
    others = [epoch_order(1000, *pair) for pair in ((5, 4), (3, 5), (6, 3), (0, 0))]
    assert not any(torch.equal(order, other) for other in others)


def augment_slowly(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One image at a time: pad by reflection, crop, flip."""
    shifts = torch.randint(-4, 5, (len(images), 2, 1), generator=generator).squeeze(2)
    flips = torch.rand((len(images), 1), generator=generator) < 0.5
    height, width = images.shape[2:]
    result = []
    for image, (down, right), flip in zip(images, shifts.tolist(), flips.flatten().tolist()):
        padded = torch.nn.functional.pad(image[None].float(), (4, 4, 4, 4), "reflect")[0]
        crop = padded[:, 4 + down : 4 + down + height, 4 + right : 4 + right + width]
        result.append(crop.flip(2) if flip else crop)
    return torch.stack(result).to(images.dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(3, 8, 11), (1, 5, 5)])
def test_augmentation_agrees_with_one_image_at_a_time(dtype, shape):
    source = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, *shape), generator=source).to(dtype)
    fast = augment(images, torch.Generator().manual_seed(7))
    assert fast.dtype == dtype
    assert fast.is_contiguous()
    assert torch.equal(fast, augment_slowly(images, torch.Generator().manual_seed(7)))


def test_batches_are_augmented_only_with_a_generator(tiny_dataset):
    split = make_split(tiny_dataset)
    split.images[:] = torch.arange(36, dtype=torch.uint8).view(6, 6)
    plain = next(batches(split, 60)).image
    augmented = next(batches(split, 60, augment_generator=torch.Generator().manual_seed(0))).image
    same = (plain == augmented).flatten(1).all(1)
    assert torch.equal(plain, normalize(split.images))
    assert same.sum() < 10


@pytest.mark.gpu
def test_batches_are_the_same_on_a_gpu(tiny_dataset):
    split = make_split(tiny_dataset)
    order = epoch_order(split.n, 0, 0)
    both = [
        list(batches(split.to(device), 16, order, torch.Generator().manual_seed(0)))
        for device in ("cpu", "cuda")
    ]
    for on_cpu, on_gpu in zip(*both, strict=True):
        assert on_gpu.image.is_cuda
        for name in ("image", "label", "memorized", "index"):
            assert torch.equal(getattr(on_cpu, name), getattr(on_gpu, name).cpu())
