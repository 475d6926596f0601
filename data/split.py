"""The training problem: images, their labels, and the memorized set."""

from dataclasses import dataclass, fields, replace

import torch

from data.dataset import DataError, Dataset
from data.label_noise import add_label_noise
from data.random_streams import random_stream

KINDS = ("noise", "atypical", "human")


@dataclass(frozen=True)
class Split:
    """Training and test examples as tensors on one device; rows keep the data set's order.

    `memorized` marks the memorized set: the noisy or, for atypical splits, the atypical examples.
    `index` is each row's place in the whole data set.
    """

    images: torch.Tensor  # uint8 [n, channels, height, width]
    label: torch.Tensor  # int64 [n], what is trained on
    true_label: torch.Tensor  # int64 [n]
    memorized: torch.Tensor  # bool [n]
    index: torch.Tensor  # int64 [n]
    typicality: torch.Tensor | None  # float64 [n], where known
    test_images: torch.Tensor
    test_label: torch.Tensor
    class_names: tuple[str, ...]

    @property
    def n(self) -> int:
        return len(self.label)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return channels, height, width."""
        return tuple(self.images.shape[1:])

    def subset(self, chosen: torch.Tensor) -> "Split":
        """Return some training examples (bool [n], or rows) with every test example."""
        per_example = ("images", "label", "true_label", "memorized", "index", "typicality")
        columns = {name: getattr(self, name) for name in per_example}
        return replace(self, **{k: v if v is None else v[chosen] for k, v in columns.items()})

    def to(self, device: torch.device | str) -> "Split":
        tensors = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **tensors)


def make_split(
    dataset: Dataset,
    *,
    kind: str = "noise",
    noise_rate: float = 0.1,
    noise_seed: int = 0,
    train_size: int | None = None,
    test_size: int | None = None,
    keep_memorized: bool = False,
    c_scores: torch.Tensor | None = None,
    c_score_threshold: float = 0.5,
    human_label: torch.Tensor | None = None,
) -> Split:
    """Choose the examples, give them their labels, and mark the memorized ones.

    kind 'noise': of the chosen examples, exactly round(noise_rate * n) get a random wrong label.
    'atypical': true labels; memorized are the examples with a C-score below the threshold.
    'human': the labels of `human_label`; memorized are the examples with a wrong label.
    `c_scores` and `human_label` cover the whole data set. With `keep_memorized` a subset keeps
    every memorized example, and draws among the others only.
    """
    scores = dataset.typicality if c_scores is None else c_scores
    if scores is not None:
        _check_length("C-scores", scores, dataset)
    label, memorized = _label_everything(dataset, kind, scores, c_score_threshold, human_label)
    if keep_memorized and kind == "noise":
        raise DataError("keep_memorized needs a split of kind atypical or human, not noise")
    index = _choose("train_size", train_size, len(label), memorized if keep_memorized else None)
    test_index = _choose("test_size", test_size, len(dataset.test_label))
    label, memorized = label[index], memorized[index]
    if kind == "noise":
        classes = len(dataset.class_names)
        label, memorized = add_label_noise(label, noise_rate, classes, noise_seed)
    return Split(
        images=_rows(dataset.images, index),
        label=label,
        true_label=dataset.label[index],
        memorized=memorized,
        index=index,
        typicality=None if scores is None else scores[index],
        test_images=_rows(dataset.test_images, test_index),
        test_label=dataset.test_label[test_index],
        class_names=dataset.class_names,
    )


def _rows(images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take rows, ascending and each once; all of them without a copy."""
    return images if len(index) == len(images) else images[index]


def _label_everything(
    dataset: Dataset,
    kind: str,
    scores: torch.Tensor | None,
    threshold: float,
    human_label: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return label and memorized of the whole data set, before subset and noise."""
    if kind == "noise":
        return dataset.label, torch.zeros(len(dataset.label), dtype=torch.bool)
    if kind == "atypical":
        if scores is None:
            raise DataError(f"{dataset.name}: an atypical split needs C-scores, and there are none")
        return dataset.label, scores < threshold
    if kind == "human":
        if human_label is None:
            raise DataError(f"{dataset.name}: a human split needs human labels, and there are none")
        _check_length("human labels", human_label, dataset)
        return human_label, human_label != dataset.label
    raise DataError(f"unknown kind of split {kind!r}; allowed: {', '.join(KINDS)}")


def _check_length(what: str, values: torch.Tensor, dataset: Dataset) -> None:
    n = len(dataset.label)
    if values.shape != (n,):
        raise DataError(f"{dataset.name}: {what} of shape {tuple(values.shape)} for {n} images")


def _choose(key: str, size: int | None, n: int, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Choose `size` of n examples, ascending, including all `kept` ones.

    The others are the first of one fixed permutation, so that the subset does not depend on a
    run's seed, and a smaller subset is contained in a larger one.
    """
    if size is None:
        return torch.arange(n)
    if not 1 <= size <= n:
        raise DataError(
            f"data.{key} is {size}; allowed: 1 to {n}, the size of the data set, or null for all"
        )
    order = torch.from_numpy(random_stream("subset", n).permutation(n))
    if kept is not None:
        count = int(kept.sum())
        if size < count:
            raise DataError(f"{key} is {size}, but there are {count} memorized examples to keep")
        order = torch.cat([order[kept[order]], order[~kept[order]]])
    return order[:size].sort().values
