import dataclasses
import hashlib
import io
import time
import urllib.request

import numpy as np
import pytest
import torch

from data import DataError, load_c_scores, load_dataset, npz, tfds_order
from data.c_scores import PUBLISHED


def with_name(dataset, name):
    return dataclasses.replace(dataset, name=name, typicality=None)


def publish(monkeypatch, name, content):
    """Let `content` be the published file of a data set."""
    source = dataclasses.replace(
        PUBLISHED[name], size=len(content), sha256=hashlib.sha256(content).hexdigest()
    )
    monkeypatch.setitem(PUBLISHED, name, source)
    return source


def saved(save, *args, **arrays) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *args, **arrays)
    return buffer.getvalue()


SCORES = np.linspace(0, 1, 60)


def test_the_order_of_the_tfds_release():
    start = time.process_time()
    order = tfds_order(60_000)
    assert time.process_time() - start < 1
    assert order[:5].tolist() == [16399, 1680, 47917, 17307, 27051]
    assert np.array_equal(np.sort(order), np.arange(60_000))
    hashes = [int(hashlib.md5(b"train" + str(i).encode()).hexdigest(), 16) for i in order[:200]]
    assert hashes == sorted(hashes)


def test_glyphs_and_npz_bring_their_own(tiny_dataset, tmp_path):
    glyphs = load_dataset("glyphs", train_size=20, test_size=10)
    assert load_c_scores(glyphs, root=tmp_path) is glyphs.typicality
    assert load_c_scores(tiny_dataset, root=tmp_path) is tiny_dataset.typicality


def test_mnist_is_brought_into_the_official_order(tiny_dataset, tmp_path, monkeypatch):
    """The score at position p of the file belongs to example order[p]."""
    content = saved(np.save, SCORES)
    source = publish(monkeypatch, "mnist", content)
    (tmp_path / "c_scores").mkdir()
    (tmp_path / "c_scores" / source.file).write_bytes(content)
    scores = load_c_scores(with_name(tiny_dataset, "mnist"), root=tmp_path)
    assert scores.dtype == torch.float64
    for position, example in enumerate(tfds_order(60)):
        assert scores[example] == SCORES[position]
    own = load_c_scores(tiny_dataset, root="nowhere", path=tmp_path / "c_scores" / source.file)
    assert torch.equal(own, scores)


def test_cifar10_is_in_the_original_order(tiny_dataset, tmp_path, monkeypatch):
    content = saved(np.savez, labels=tiny_dataset.label.numpy(), scores=SCORES)
    source = publish(monkeypatch, "cifar10", content)
    (tmp_path / "c_scores").mkdir()
    (tmp_path / "c_scores" / source.file).write_bytes(content)
    scores = load_c_scores(with_name(tiny_dataset, "cifar10"), root=tmp_path)
    assert scores.tolist() == SCORES.tolist()


def test_a_missing_file_is_downloaded_verified_and_kept(tiny_dataset, tmp_path, monkeypatch):
    content = saved(np.savez, labels=tiny_dataset.label.numpy(), scores=SCORES)
    source = publish(monkeypatch, "cifar10", content)
    asked = []

    def serve(address, timeout):
        asked.append(address)
        return io.BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    for _ in range(2):
        scores = load_c_scores(with_name(tiny_dataset, "cifar10"), root=tmp_path)
        assert scores.tolist() == SCORES.tolist()
    assert asked == [source.address]
    assert [p.name for p in (tmp_path / "c_scores").iterdir()] == [source.file]


def test_a_wrong_download_leaves_nothing(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>"))
    with pytest.raises(DataError, match="6 bytes instead of 480128"):
        load_c_scores(with_name(tiny_dataset, "mnist"), root=tmp_path)
    assert list((tmp_path / "c_scores").iterdir()) == []


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_without_file_and_network_one_line_says_which_file_goes_where(
    tiny_dataset, tmp_path, name, capfd
):
    with pytest.raises(DataError) as error:
        load_c_scores(with_name(tiny_dataset, name), root=tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert f"put {PUBLISHED[name].file} into {tmp_path / 'c_scores'}" in message
    assert PUBLISHED[name].address in message
    assert capfd.readouterr() == ("", "")


def test_a_root_that_is_a_file_is_one_line_too(tiny_dataset, tmp_path):
    (tmp_path / "root").touch()
    with pytest.raises(DataError, match="could not be downloaded"):
        load_c_scores(with_name(tiny_dataset, "mnist"), root=tmp_path / "root")


def test_a_damaged_published_file_is_refused(tiny_dataset, tmp_path, monkeypatch):
    content = saved(np.save, SCORES)
    source = publish(monkeypatch, "mnist", content)
    path = tmp_path / "c_scores" / source.file
    path.parent.mkdir()
    dataset = with_name(tiny_dataset, "mnist")
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"{len(content) - 1} bytes instead of {len(content)}"):
        load_c_scores(dataset, root=tmp_path)
    path.write_bytes(content[:-1] + b"\0")
    with pytest.raises(DataError, match="SHA-256"):
        load_c_scores(dataset, root=tmp_path)


def own_scores(path, **change):
    arrays = {"labels": np.arange(60) % 4, "scores": SCORES} | change
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_own_scores_beside_matching_labels(tiny_dataset, tmp_path):
    path = own_scores(tmp_path / "own.npz")
    for name in ("npz", "svhn", "mnist", "glyphs"):
        scores = load_c_scores(with_name(tiny_dataset, name), root="nowhere", path=path)
        assert scores.tolist() == SCORES.tolist()
    # A path that is given wins over what the data set knows.
    own_scores(path, scores=SCORES[::-1].copy())
    assert load_c_scores(tiny_dataset, root="nowhere", path=path)[0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.arange(60)[::-1] % 4}, "60 of 60 labels differ.*another order"),
        ({"labels": np.arange(59) % 4}, r"labels of shape \(59,\), but the data set has 60"),
        ({"labels": None}, "labels and scores"),
        ({"scores": None}, "labels and scores"),
        ({"scores": SCORES[1:]}, r"scores of shape \(59,\)"),
        ({"scores": SCORES * 2}, "from 0 to 1"),
        ({"scores": np.where(SCORES > 0.5, np.nan, SCORES)}, "without NaN"),
        ({"scores": SCORES.astype(object)}, "labels and scores"),
        ({"scores": np.ones(60, int)}, "numbers from 0 to 1"),
    ],
)
def test_unfit_scores_are_named(tiny_dataset, tmp_path, change, message):
    path = own_scores(tmp_path / "own.npz", **change)
    with pytest.raises(DataError, match=message) as error:
        load_c_scores(tiny_dataset, root="nowhere", path=path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files_are_named(tiny_dataset, tmp_path):
    path = own_scores(tmp_path / "own.npz")
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:100], whole[:-30], saved(np.save, SCORES)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"own\.npz: cannot be read as an \.npz"):
            load_c_scores(tiny_dataset, root="nowhere", path=path)
    with pytest.raises(DataError, match="no such file of C-scores"):
        load_c_scores(tiny_dataset, root="nowhere", path=tmp_path / "none.npz")


def test_scores_that_unpack_too_far_are_refused_in_one_sentence(
    tiny_dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(npz, "UNPACKED_FREELY", 0)
    monkeypatch.setattr(npz, "MOST_PACKED", 0.1)
    with pytest.raises(DataError, match="size: found") as caught:
        load_c_scores(tiny_dataset, root="nowhere", path=own_scores(tmp_path / "own.npz"))
    assert str(caught.value).count("own.npz: ") == 1


def test_an_npy_of_unknown_order_is_refused(tiny_dataset, tmp_path):
    np.save(tmp_path / "own.npy", SCORES)
    with pytest.raises(DataError, match=r"not the published mnist-cscores\.npy"):
        load_c_scores(with_name(tiny_dataset, "mnist"), root="x", path=tmp_path / "own.npy")


@pytest.mark.parametrize("name", ["svhn", "npz"])
def test_data_without_published_scores(tiny_dataset, tmp_path, name):
    with pytest.raises(DataError, match=f"{name}: there are no published C-scores"):
        load_c_scores(with_name(tiny_dataset, name), root=tmp_path)
