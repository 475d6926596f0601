import numpy as np
import pytest
import torch

from data import DataError, load_dataset


def good() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, (12, 5, 4, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": generator.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8),
        "y_test": np.zeros(6, np.uint8),
        "noisy_label": np.arange(12, dtype=np.int32) % 2,
        "c_score": np.linspace(0, 1, 12, dtype=np.float32),
    }


def load(path, arrays):
    np.savez(path / "own.npz", **arrays)
    return load_dataset("npz", path=path / "own.npz")


def test_a_good_file(tmp_path):
    arrays = good()
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
    arrays = {k: v for k, v in good().items() if k[0] in "xy"}
    arrays["x_train"], arrays["x_test"] = arrays["x_train"][..., 0], arrays["x_test"][..., 0]
    arrays["my_notes"] = np.zeros(2)  # unlike any known name: not our business
    dataset = load(tmp_path, arrays)
    assert dataset.images.shape == (12, 1, 5, 4)
    assert dataset.typicality is None
    assert dataset.noisy_label is None


def without(*names):
    return lambda a: [a.pop(name) for name in names]


def renamed(old, new):
    return lambda a: a.update({new: a.pop(old)})


def put(name, value):
    return lambda a: a.update({name: value(a[name])})


def at(index, value, dtype=None):
    def change(array):
        array = array.astype(dtype or array.dtype)
        array[index] = value
        return array

    return change


MISTAKES = {
    "missing": (without("x_test"), "there is no x_test; found x_train"),
    "misspelled": (renamed("x_train", "X_train"), "no x_train; did you mean it by X_train"),
    "transposed": (renamed("y_test", "test_y"), "no y_test; did you mean it by test_y"),
    "optional misspelled": (renamed("noisy_label", "noisy_labels"), "mean it by noisy_labels"),
    "float images": (
        put("x_train", lambda x: x / 255),
        "x_train: found dtype float64.*multiply images in .* by 255 and convert to uint8",
    ),
    "int images": (put("x_test", lambda x: x.astype(int)), "x_test: found dtype int64"),
    "flat images": (put("x_train", lambda x: x.reshape(12, -1)), r"x_train: .*\(12, 60\)"),
    "channels first": (
        put("x_train", lambda x: x.transpose(0, 3, 1, 2)),
        r"x_train: .*\(12, 3, 5, 4\).*1 or 3 channels, as the last axis",
    ),
    "no images": (put("x_test", lambda x: x[:0]), "x_test: .*empty"),
    "no pixels": (put("x_train", lambda x: x[:, :0]), "x_train: .*empty"),
    "object images": (put("x_train", lambda x: x.astype(object)), "x_train: .*unreadable"),
    "sizes differ": (put("x_test", lambda x: x[:, 1:]), r"x_test: .*\(4, 4, 3\).*\(5, 4, 3\)"),
    "fewer labels": (put("y_train", lambda y: y[1:]), r"y_train: .*\(11,\).*\(12,\)"),
    "column of labels": (put("y_test", lambda y: y[:, None]), r"y_test: .*\(6, 1\).*\(6,\)"),
    "float labels": (put("y_train", lambda y: y.astype(float)), "y_train: found dtype float64"),
    "bool labels": (put("y_train", lambda y: y > 0), "y_train: found dtype bool"),
    "object labels": (put("y_test", lambda y: y.astype(object)), "y_test: .*unreadable"),
    "text labels": (put("y_test", lambda y: y.astype(str)), "y_test: found dtype <U"),
    "negative": (put("y_train", at(4, -1)), r"y_train: found label -1 at position 4.*0\.\.K-1"),
    "from 1": (put("y_train", lambda y: y + 1), "y_train: .*none of class 0"),
    "gap": (put("y_train", at(5, 10**12)), "y_train: .*up to 10+ but none of class 3"),
    "one class": (put("y_train", lambda y: y * 0), "y_train: found one class only"),
    "unknown test class": (put("y_test", at(2, 3)), r"y_test: found label 3 at position 2.*0\.\.2"),
    "noisy length": (put("noisy_label", lambda y: y[:5]), r"noisy_label: .*\(5,\)"),
    "noisy class": (put("noisy_label", at(0, 3)), r"noisy_label: found label 3.*0\.\.2"),
    "noisy type": (put("noisy_label", lambda y: y * 1.0), "noisy_label: found dtype float64"),
    "nan score": (put("c_score", at(3, np.nan)), "c_score: found nan at position 3.*0 to 1"),
    "high score": (put("c_score", at(3, 1.5)), r"c_score: found 1\.5 at position 3"),
    "negative score": (put("c_score", at(3, -0.5)), r"c_score: found -0\.5 at position 3"),
    "score length": (put("c_score", lambda s: s[:-1]), r"c_score: .*\(11,\)"),
    "score type": (put("c_score", lambda s: s > 0.5), "c_score: found dtype bool"),
}


@pytest.mark.parametrize(("spoil", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_each_mistake_has_one_clear_line(tmp_path, spoil, message):
    arrays = good()
    spoil(arrays)
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, arrays)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "own.npz"))


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"own\.npz: no such file"):
        load_dataset("npz", path=tmp_path / "own.npz")
    with pytest.raises(DataError, match=r"data\.path"):
        load_dataset("npz")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY and no more", b"PK\x05\x06"])
def test_not_an_npz(tmp_path, content):
    (tmp_path / "own.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"own\.npz: not an \.npz file, or cut off"):
        load_dataset("npz", path=tmp_path / "own.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_that_is_cut_off_or_damaged_at_any_place_gives_one_line(tmp_path, save):
    """No damage ever shows a library's own error; some places do not matter to any array."""
    save(tmp_path / "own.npz", **good())
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
