import pytest
import torch

from data import DataError, load_dataset, make_split


def test_noise_on_the_whole_set(tiny_dataset):
    split = make_split(tiny_dataset, noise_rate=0.25)
    assert split.memorized.sum() == 15
    assert torch.equal(split.memorized, split.label != split.true_label)
    assert torch.equal(split.true_label, tiny_dataset.label)
    assert torch.equal(split.index, torch.arange(60))
    assert torch.equal(split.test_label, tiny_dataset.test_label)
    assert torch.equal(split.test_images, tiny_dataset.test_images)
    assert (split.n, split.classes, split.shape) == (60, 4, (1, 6, 6))


def test_a_subset_has_exact_noise_and_the_original_order(tiny_dataset):
    split = make_split(tiny_dataset, noise_rate=0.1, train_size=30, test_size=7)
    assert split.n == 30
    assert split.memorized.sum() == 3
    assert (split.index.diff() > 0).all()
    assert torch.equal(split.images[:, 0, 0, 0].long(), split.index)
    assert torch.equal(split.true_label, tiny_dataset.label[split.index])
    assert torch.equal(split.typicality, tiny_dataset.typicality[split.index])
    assert len(split.test_images) == len(split.test_label) == 7


def test_smaller_subsets_lie_in_larger_ones_and_seeds_do_not_move_them(tiny_dataset):
    chosen = [set(make_split(tiny_dataset, train_size=k).index.tolist()) for k in (5, 20, 59)]
    assert chosen[0] < chosen[1] < chosen[2]
    assert chosen[0] != set(range(5))
    other_noise = make_split(tiny_dataset, train_size=20, noise_seed=9, noise_rate=0.5)
    assert set(other_noise.index.tolist()) == chosen[1]


def test_the_noise_seed_moves_the_noise(tiny_dataset):
    first, second = (make_split(tiny_dataset, noise_seed=seed) for seed in (0, 1))
    assert not torch.equal(first.label, second.label)


def test_atypical_is_below_the_threshold_and_keeps_true_labels(tiny_dataset):
    split = make_split(tiny_dataset, kind="atypical", noise_rate=0.5)
    assert torch.equal(split.label, tiny_dataset.label)
    assert torch.equal(split.memorized, torch.arange(60) < 30)
    scores = torch.full((60,), 0.5, dtype=torch.float64)
    scores[7] = 0.2999
    split = make_split(tiny_dataset, kind="atypical", c_scores=scores, c_score_threshold=0.3)
    assert split.memorized.nonzero().tolist() == [[7]]
    assert torch.equal(split.typicality, scores)
    assert not make_split(tiny_dataset, kind="atypical", c_scores=scores * 0 + 0.5).memorized.any()


def test_human_labels_are_memorized_where_they_are_wrong(tiny_dataset):
    human = tiny_dataset.label.clone()
    human[[3, 50]] = (human[[3, 50]] + 1) % 4
    split = make_split(tiny_dataset, kind="human", human_label=human)
    assert torch.equal(split.label, human)
    assert torch.equal(split.true_label, tiny_dataset.label)
    assert split.memorized.nonzero().flatten().tolist() == [3, 50]


def test_keep_memorized_draws_only_the_others(tiny_dataset):
    atypical = tiny_dataset.typicality < 0.2
    split = make_split(
        tiny_dataset, kind="atypical", c_score_threshold=0.2, train_size=25, keep_memorized=True
    )
    assert split.n == 25
    assert split.memorized.sum() == atypical.sum() == 12
    assert torch.equal(split.index[split.memorized], atypical.nonzero().flatten())
    assert (split.index.diff() > 0).all()
    larger = make_split(
        tiny_dataset, kind="atypical", c_score_threshold=0.2, train_size=40, keep_memorized=True
    )
    assert set(split.index.tolist()) < set(larger.index.tolist())


def test_to_moves_every_tensor(tiny_dataset):
    moved = make_split(tiny_dataset).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_glyphs_know_their_typicality():
    dataset = load_dataset("glyphs", train_size=500, test_size=10)
    split = make_split(dataset, kind="atypical")
    assert torch.equal(split.memorized, dataset.typicality < 0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "typical"}, "allowed: noise, atypical, human"),
        ({"train_size": 61}, "train_size is 61; allowed: 1 to 60"),
        ({"train_size": 0}, "train_size is 0; allowed: 1 to 60"),
        ({"test_size": 21}, "test_size is 21; allowed: 1 to 20"),
        ({"noise_rate": 1.2}, "noise_rate is 1.2"),
        ({"keep_memorized": True}, "needs a split of kind atypical or human"),
        ({"kind": "human"}, "needs human labels"),
        (
            {"kind": "atypical", "train_size": 29, "keep_memorized": True},
            "train_size is 29, but there are 30 memorized examples",
        ),
        ({"kind": "atypical", "c_scores": torch.zeros(59)}, r"shape \(59,\) for 60 images"),
        ({"kind": "human", "human_label": torch.zeros(3)}, r"shape \(3,\) for 60 images"),
    ],
)
def test_mistakes_are_named(tiny_dataset, wrong, message):
    with pytest.raises(DataError, match=message):
        make_split(tiny_dataset, **wrong)


def test_an_atypical_split_needs_scores(tiny_dataset):
    vars(tiny_dataset)["typicality"] = None
    with pytest.raises(DataError, match="needs C-scores"):
        make_split(tiny_dataset, kind="atypical")


def test_some_of_the_training_examples(tiny_dataset):
    split = make_split(tiny_dataset, noise_rate=0.25)
    clean = split.subset(~split.memorized)
    assert clean.n == 45
    assert not clean.memorized.any()
    assert torch.equal(clean.index, split.index[~split.memorized])
    assert torch.equal(clean.images[:, 0, 0, 0].long(), clean.index)
    assert torch.equal(clean.label, clean.true_label)
    assert len(clean.typicality) == 45
    assert torch.equal(clean.test_images, split.test_images)


def test_a_split_of_all_images_copies_none(tiny_dataset):
    split = make_split(tiny_dataset)
    assert split.images.data_ptr() == tiny_dataset.images.data_ptr()
    assert split.test_images.data_ptr() == tiny_dataset.test_images.data_ptr()
    n = len(tiny_dataset.label)
    part = make_split(tiny_dataset, train_size=n - 1)
    assert part.images.data_ptr() != tiny_dataset.images.data_ptr()
    assert torch.equal(part.images, tiny_dataset.images[part.index])
