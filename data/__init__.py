"""Data sets, labels and batches.

    load_dataset        name -> Dataset: all images and true labels, in the published order
    load_c_scores       how typical each example is
    load_human_labels   labels given by people
    make_split          Dataset -> Split: the chosen images, their labels, the memorized set
    Examples            some images with their labels and the indices of their masks
    batches             Split -> Batch: normalized images with label, memorized and index

Independent of models and of training; no draw uses a global random generator.
"""

from data.batches import Batch, Examples, augment, batch_rows, batches, epoch_order, normalize
from data.c_scores import c_scores_at_hand, c_scores_published, load_c_scores, tfds_order
from data.dataset import DataError, Dataset, expanded, file_digest
from data.human_labels import load_human_labels
from data.images import at_hand, full_sizes, is_published, load_dataset, outline
from data.label_noise import add_label_noise
from data.split import Split, make_split

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "Examples",
    "Split",
    "add_label_noise",
    "at_hand",
    "augment",
    "batch_rows",
    "batches",
    "c_scores_at_hand",
    "c_scores_published",
    "epoch_order",
    "expanded",
    "file_digest",
    "full_sizes",
    "is_published",
    "load_c_scores",
    "load_dataset",
    "load_human_labels",
    "make_split",
    "normalize",
    "outline",
    "tfds_order",
]
