"""Neuron flipping (Section 6.1): how many neurons must be removed to flip an example?

Claims: (i) a memorized example flips after removing far fewer neurons than a clean example, 5.1
against 15.7 on average (Figure 5a); (ii) their removal costs less accuracy on the rest of the
training set (Figure 5b) and on the test set; (iii) the neurons lie in the same layers for both
(Figure 5c); (iv) their number separates noisy from clean examples with an AUC of 0.89.

    python neuron_flipping.py configs/quickstart.yaml       # minutes on two CPU cores
    python neuron_flipping.py configs/paper/figure_5.yaml   # the paper's size: a GPU

Reads finished runs. For `flipping.examples` memorized and as many clean examples it repeatedly
closes the gate with the highest first-order gain in loss(x_i) - mean loss(reference batch), until
the prediction flips. Writes neuron_flipping.csv and mislabel_detection.csv into every run, and
averages over runs that differ only in their seed into the folder above them.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import Examples, Split, normalize
from data.random_streams import draw_rows, random_stream
from engine.flipping.estimates import correctness, reference_gradient
from engine.flipping.gates import Gates
from engine.flipping.search import Candidate, chunk_size, search
from engine.flipping.second_split import forgetting_measurement, measure_forgetting, read_forgetting
from engine.launch.cli import run_script
from engine.launch.estimates import count_examples
from engine.progress import progress_bar
from engine.runs import files
from engine.runs.experiment import Experiment
from engine.runs.identity import measuring_precision, measuring_settings, title
from engine.runs.measurement import Measurement, keep_aside
from engine.runs.run import Run
from engine.runs.tables import ResultTable
from engine.stats import (
    compute_detection,
    count_neurons,
    first_epoch_for_good,
)
from engine.training.build import load_evaluated_model, load_split
from engine.training.devices import compute_precision, free_memory, resolve_device
from models.folding import folded
from models.layer_groups import StagedModel

FLIPPING = ResultTable(
    "neuron_flipping.csv",
    (
        "example", "memorized", "neurons", "flipped", "acc_remaining_before",
        "acc_remaining_after", "acc_test_before", "acc_test_after", "groups", "neurons_ids",
    ),
    text=("groups", "neurons_ids"),
    added=("acc_test_before", "acc_test_after"),
)  # fmt: skip
AVERAGED = ("neurons", "flipped", "acc_remaining_before", "acc_remaining_after", *FLIPPING.added)
MEANS = ResultTable("neuron_flipping_mean.csv", ("example", "memorized", "runs", *AVERAGED))
DETECTION = ResultTable(
    "mislabel_detection.csv",
    ("method", "on", "memorized", "clean", "auc", "low", "high"),
    text=("method", "on"),
)
NEURONS = 5  # assumed for an example before it is searched, in estimates


# ---------------------------------------------------------------- the searched examples


def choose_searched(split: Split, correct: Tensor, count: int) -> list[int]:
    """Choose `count` memorized and `count` clean examples that are predicted as trained.

    The order does not depend on the seed, so that runs of several seeds search the same examples.
    """
    rows = []
    for memorized in (1, 0):
        subset = (split.memorized.cpu() == bool(memorized)).nonzero().flatten().numpy()
        order = random_stream("flipping examples", memorized).permutation(subset)
        rows += [int(row) for row in order if correct[row]][:count]
    return rows


def noisy_copies(image: Tensor, example: int, seed: int, copies: int, ratio: float) -> Tensor:
    """Return copies [copies, ...] of an image with Gaussian noise of `ratio` times its L2 norm.

    The noise depends on (seed, example) only.
    """
    noise = random_stream("flipping noise", seed, example).standard_normal(
        (copies, *image.shape), dtype=np.float32
    )
    noise = torch.from_numpy(noise).to(image.device)
    size = noise.flatten(1).norm(dim=1)[:, None, None, None]
    return image + noise * (ratio * image.norm() / size)


def half(size: int | None) -> int | None:
    """Return half of a sample's size: the test set gets half as many images."""
    return size and size // 2


# ---------------------------------------------------------------- one run


def compute_flipping(
    run: Run,
    split: Split,
    model: StagedModel,
    rows: Sequence[int],
    reference_seed: int | None = None,
) -> Iterator[dict[str, object]]:
    """Yield a row of results for each example; the model must be in eval mode.

    `reference_seed` draws the reference batch; None stands for the run's seed.
    """
    settings = run.config.flipping.spelled_out()
    seed, device = run.config.seed, split.label.device

    def copies_of(row: int, copies: int) -> Tensor:
        image = normalize(split.images[row])
        return noisy_copies(image, int(split.index[row]), seed, copies, settings.noise_ratio)

    drawn_by = seed if reference_seed is None else reference_seed
    referred = draw_rows(split.n, settings.reference_batch, "flipping reference", drawn_by)
    kept = draw_rows(split.n, settings.remaining, "flipping remaining", seed)
    tested = draw_rows(len(split.test_label), half(settings.remaining), "flipping test", seed)
    referred, kept, tested = (rows.to(device) for rows in (referred, kept, tested))

    copies = settings.noise_copies
    reference_copies = settings.reference_copies or copies
    reference = Examples(
        torch.stack([copies_of(row, reference_copies) for row in referred.tolist()]),
        split.label[referred],
        split.index[referred],
    )
    remaining = Examples(split.images[kept], split.label[kept], split.index[kept])
    test = Examples(split.test_images[tested], split.test_label[tested])

    model = folded(model)
    with Gates(model, settings.ablate) as gates:
        memory, sampled = free_memory(device) / 4, settings.remaining_rows
        gradient = reference_gradient(model, gates, reference, memory, settings.reference_rows)
        on_remaining = correctness(model, gates, remaining, memory, sampled)
        on_test = correctness(model, gates, test, memory, half(sampled))
        candidates = (
            Candidate(
                row, split.label[row], copies_of(row, copies), split.index[row].expand(copies)
            )
            for row in rows
        )
        chunk = chunk_size(model, gates, copies_of(rows[0], copies))
        place_of = {row: place for place, row in enumerate(kept.tolist())}
        for candidate, flipped in search(
            model, gates, gradient, candidates, chunk, settings.max_neurons,
            settings.refresh_reference,
        ):  # fmt: skip
            closed, own = candidate.closed, place_of.get(candidate.row)
            yield {
                "example": int(split.index[candidate.row]),
                "memorized": int(split.memorized[candidate.row]),
                "neurons": len(candidate.closed),
                "flipped": int(flipped),
                "acc_remaining_before": on_remaining.accuracy((), own),
                "acc_remaining_after": on_remaining.accuracy(closed, own),
                "acc_test_before": on_test.accuracy(()),
                "acc_test_after": on_test.accuracy(closed),
                "groups": " ".join(str(gates.site_of(gate).group) for gate in candidate.closed),
                "neurons_ids": " ".join(
                    gates.site_of(gate).describe(gate) for gate in candidate.closed
                ),
            }


def settings_of(run: Run) -> dict[str, object]:
    """Return what decides the tables, in the same words however it was asked for."""
    settings = asdict(run.config.flipping.spelled_out())
    del settings["exact"]
    if settings["remaining_rows"] is None:  # earlier versions did not have this key
        del settings["remaining_rows"]
    return settings | measuring_settings(run.config)


def search_measurement(run: Run) -> Measurement:
    """Declare the table of searched examples; a search can be extended by more examples."""
    settings = settings_of(run)
    del settings["second_split"]
    return Measurement(run, FLIPPING, settings, {"examples": settings.pop("examples")})


def search_run(run: Run, split: Split, device: torch.device) -> None:
    """Search the chosen examples that were not searched yet, and write the table."""
    measurement = search_measurement(run)
    model, outcome = load_evaluated_model(run, split, device)
    model.eval().requires_grad_(False)
    with compute_precision(precision := measuring_precision(run.config, device), device):
        correct = outcome.correct.cpu()
        rows = choose_searched(split, correct, run.config.flipping.examples)
        example_of = dict(zip(rows, split.index[rows].tolist()))
        found = {e: measurement.part(f"example_{e:06d}") for e in example_of.values()}
        known = [part["neurons"] for part in found.values() if part is not None]
        bar = progress_bar(f"{title(run.config)}: flipping", len(rows), "example", len(known))
        to_do = [row for row, example in example_of.items() if found[example] is None]
        with bar:
            for result in compute_flipping(run, split, model, to_do) if to_do else ():
                measurement.save(f"example_{result['example']:06d}", result)
                found[result["example"]] = result
                known.append(result["neurons"])
                bar.set_postfix_str(f"mean neurons {np.mean(known):.1f}", refresh=False)
                bar.update()
    # Parts that an earlier version searched have no test accuracy.
    lacking = dict.fromkeys(FLIPPING.added, float("nan"))
    measurement.finish([lacking | part for part in found.values()], device, precision)


# ---------------------------------------------------------------- detection, over one or many runs


def read_results(run: Run) -> dict[int, dict]:
    """Return the rows of a run's search by example."""
    return {int(row["example"]): row for row in FLIPPING.read(run.directory)}


def training_scores(run: Run) -> dict[str, np.ndarray]:
    """Return scores of each training example, recorded in training; high means memorized."""
    record = files.read_arrays(run.examples_path, "correct", "loss")
    scores = {
        "learning time": first_epoch_for_good(record["correct"]).astype(float),
        "summed loss": record["loss"].sum(axis=0, dtype=float),
    }
    if run.config.flipping.second_split:
        scores["forgetting time"] = -read_forgetting(run)
    return scores


def compute_means(runs: Sequence[Run]) -> list[dict[str, object]]:
    """Average the results over the runs, for the examples that every run searched."""
    found = [read_results(run) for run in runs]
    rows = []
    for example in sorted(set.intersection(*map(set, found))):
        results = [
            row | {"neurons": count_neurons(row, run.config.flipping.max_neurons)}
            for run, row in ((run, results[example]) for run, results in zip(runs, found))
        ]
        row = {"example": example, "memorized": int(results[0]["memorized"]), "runs": len(runs)}
        for column in AVERAGED:
            row[column] = float(np.mean([result[column] for result in results]))
        rows.append(row)
    return rows


def detect(runs: Sequence[Run]) -> list[dict[str, object]]:
    """Measure how well each score, averaged over the runs, separates memorized from clean examples.

    On the searched examples, for comparison with the number of neurons, and on the whole training
    set.
    """
    split = files.read_arrays(runs[0].split_path, "index", "memorized")
    each = [training_scores(run) for run in runs]
    scores = {method: np.mean([score[method] for score in each], axis=0) for method in each[0]}
    means = compute_means(runs)
    place = np.searchsorted(split["index"], [row["example"] for row in means]).astype(int)
    neurons = {"neurons": np.array([-row["neurons"] for row in means])}
    searched = neurons | {method: score[place] for method, score in scores.items()}
    seed = runs[0].config.data.noise_seed
    return [
        *compute_detection(searched, split["memorized"][place], "searched", seed),
        *compute_detection(scores, split["memorized"], "all", seed),
    ]


def describe(means: Sequence[dict], areas: Sequence[dict]) -> str:
    """Return the headline numbers in one line."""
    parts = []
    for name, memorized in (("memorized", 1), ("clean", 0)):
        rows = [row for row in means if row["memorized"] == memorized]
        if not rows:
            parts.append(f"{name}: none")
            continue
        neurons, flipped, before, after, test_before, test_after = (
            np.mean([row[column] for row in rows]) for column in AVERAGED
        )
        never, at_once = 1 - flipped, sum(row["neurons"] == 0 for row in rows)
        parts.append(
            f"{name}: {neurons:.2f} neurons ({len(rows)} examples"
            + (f", {never:.1%} never flipped" if never else "")
            + (f", {at_once} misclassified under noise alone" if at_once else "")
            + f"), remaining {before:.2%} -> {after:.2%}"
            + (f", test {test_before:.2%} -> {test_after:.2%}" if np.isfinite(test_after) else "")
        )
    parts += [
        f"AUC {row['auc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        for row in areas
        if row["method"] == "neurons"
    ]
    return "; ".join(parts)


# ---------------------------------------------------------------- commands


def detection_measurement(run: Run) -> Measurement:
    return Measurement(run, DETECTION, settings_of(run))


def measure(run: Run) -> None:
    """Search the chosen examples, and compare the numbers of neurons with other scores."""
    device = resolve_device(run.config)
    split = load_split(run.config).to(device)
    if not search_measurement(run).finished:
        search_run(run, split, device)
    if run.config.flipping.second_split:
        measure_forgetting(run, split)
    detection_measurement(run).finish(detect([run]), device)


def summarize(run: Run) -> str:
    return f"{title(run.config)}: {describe(compute_means([run]), DETECTION.read(run.directory))}"


def conclude(runs: Sequence[Run]) -> Iterator[tuple[str, Path]]:
    """Write averages over runs that differ only in their seed into the folder above them."""
    for folder in dict.fromkeys(run.directory.parent for run in runs):
        together = [run for run in runs if run.directory.parent == folder]
        if len(together) < 2:
            continue
        means, areas = compute_means(together), detect(together)
        tables = MEANS.path(folder), DETECTION.path(folder)
        source_path, settings = tables[0].with_suffix(".json"), settings_of(together[0])
        keep_aside(source_path, settings, *tables)
        MEANS.update(folder, means)
        DETECTION.update(folder, areas)
        names = [run.directory.name for run in together]
        source = {"runs": names, "settings": settings, "tables": files.digests_of(tables)}
        files.update_json(source_path, source)
        yield f"mean of {len(together)} runs: {describe(means, areas)}", folder


def measurements(run: Run) -> list[Measurement]:
    found = [search_measurement(run), detection_measurement(run)]
    return found + [forgetting_measurement(run)] * run.config.flipping.second_split


def estimate_passes(run: Run) -> float:
    """Count, per neuron, the example and the references; then the others; half a network each."""
    settings, (train, test) = run.config.flipping.spelled_out(), count_examples(run.config)
    references = min(settings.reference_batch, settings.reference_rows or settings.reference_batch)
    references *= settings.reference_copies or settings.noise_copies
    search = NEURONS * 3 * (settings.noise_copies + references / settings.refresh_reference)
    samples = settings.remaining, settings.remaining_rows
    kept = min(filter(None, (train, *samples))) + min(filter(None, (test, *map(half, samples))))
    passes = min(2 * settings.examples, train) * (search + kept) / 2
    halves = 8 * train * run.config.train.epochs  # trained on in turn, in both orders
    return passes + halves * settings.second_split


EXPERIMENT = Experiment(
    key="flipping",
    command="python neuron_flipping.py",
    section="6.1",
    question=(
        "How many neurons must be ablated until an example's prediction flips, and what "
        "does that cost the other examples?"
    ),
    tables=(FLIPPING, DETECTION),
    figures=("plotting.neurons",),
    measure=measure,
    summarize=summarize,
    passes=estimate_passes,
    disk=lambda run: 2 * run.config.flipping.examples * 4096,
    measurements=measurements,
    conclude=conclude,
)

if __name__ == "__main__":
    sys.exit(run_script(EXPERIMENT, __doc__))
