import numpy as np
import pytest
import torch

from data import DataError, load_dataset, npz
from tests.own_data import good_arrays


def load(path, arrays):
    np.savez(path / "own.npz", **arrays)
    return load_dataset("npz", path=path / "own.npz")


def test_a_good_file(tmp_path):
    arrays = good_arrays()
    dataset = load(tmp_path, arrays)
    assert dataset.name == "npz"
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.images.shape == (12, 3, 5, 4)
    assert dataset.images.is_contiguous()
    for channel in range(3):
        assert np.array_equal(dataset.images[:, channel].numpy(), arrays["x_train"][..., channel])
        assert np.array_equal(dataset.test_images[:, channel], arrays["x_test"][..., channel])
    assert dataset.label.dtype == dataset.test_label.dtype == torch.int64
    assert dataset.label.tolist() == arrays["y_train"].tolist()
    assert dataset.noisy_label.tolist() == arrays["noisy_label"].tolist()
    assert dataset.typicality.dtype == torch.float64
    assert torch.allclose(dataset.typicality, torch.linspace(0, 1, 12, dtype=torch.float64))


def test_grey_images_need_no_channel_axis_and_extras_are_optional(tmp_path):
    arrays = {k: v for k, v in good_arrays().items() if k[0] in "xy"}
    arrays["x_train"], arrays["x_test"] = arrays["x_train"][..., 0], arrays["x_test"][..., 0]
    arrays["my_notes"] = np.zeros(2)  # unlike any known name: not our business
    dataset = load(tmp_path, arrays)
    assert dataset.images.shape == (12, 1, 5, 4)
    assert dataset.typicality is None
    assert dataset.noisy_label is None


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"own\.npz: no such file"):
        load_dataset("npz", path=tmp_path / "own.npz")
    with pytest.raises(DataError, match=r"data\.path"):
        load_dataset("npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_that_is_cut_off_or_damaged_at_any_place_gives_one_line(tmp_path, save):
    """No damage ever shows a library's own error; some places do not matter to any array."""
    save(tmp_path / "own.npz", **good_arrays())
    whole = (tmp_path / "own.npz").read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "own.npz").write_bytes(whole[:size])
        with pytest.raises(DataError):
            load_dataset("npz", path=tmp_path / "own.npz")
    refused = 0
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "own.npz").write_bytes(damaged)
        try:
            load_dataset("npz", path=tmp_path / "own.npz")
        except DataError:
            refused += 1
    assert refused > len(whole) / 7 / 4


def test_arrays_that_unpack_too_far_are_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "UNPACKED_FREELY", 0)
    monkeypatch.setattr(npz, "MOST_PACKED", 0.1)
    with pytest.raises(DataError) as caught:
        load(tmp_path, good_arrays())
    assert str(caught.value).count("own.npz: ") == 1
    assert str(caught.value).count("allowed: ") == 1
