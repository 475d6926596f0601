"""The paper's claims: what each says in numbers, and when a measured number agrees with it.

A claim has one measure, a number for each seed, made from result files alone; and one rule, fixed
here and printed beside every verdict, by which such a number counts as agreeing. Words without a
number in them ('similar', 'significantly more') had to be given one.
"""

from collections.abc import Callable
from dataclasses import dataclass

from engine.config.schema import Config
from example_tied_dropout import DROPOUT
from gradient_accounting import ACCOUNTS
from layer_retraining import RETRAINING
from layer_rewinding import REWINDING
from neuron_flipping import DETECTION, FLIPPING
from plotting.families import Family
from plotting.report import headline_numbers
from plotting.report.headline_numbers import Values
from plotting.report.tables import PAPER_AUC, PAPER_TABLE_3


@dataclass(frozen=True)
class Rule:
    """Condition for a number to agree, with its words."""

    words: str
    holds: Callable[[float], bool]


def above(bound: float, words: str = "") -> Rule:
    return Rule(words or f"above {bound:g}", lambda value: value > bound)


def below(bound: float, words: str = "") -> Rule:
    return Rule(words or f"below {bound:g}", lambda value: value < bound)


def between(low: float, high: float) -> Rule:
    return Rule(f"from {low:g} to {high:g}", lambda value: low <= value <= high)


@dataclass(frozen=True)
class Claim:
    """One statement of the paper that a measurement can bear out or not."""

    name: str  # experiment.what, for summary.json
    where: str  # in the paper
    text: str
    paper: str  # its number, or its words
    source: str  # the result file that the measure reads
    measure: Callable[[Family], Values]
    rule: Rule
    percent: bool = False
    splits: tuple[str, ...] = ("noise", "human")
    dropout: str = "none"  # the kind of runs that it is about
    over: str | None = None  # a setting: the claim is how the measure changes with it

    @property
    def experiment(self) -> str:
        return self.name.partition(".")[0]

    def concerns(self, config: Config) -> bool:
        return config.data.split in self.splits and config.dropout.kind == self.dropout


CLAIMS = (
    # ------------------------------------------------------------ Section 4
    Claim(
        "gradients.norm_ratio",
        "4.1, Figure 1",
        "Gradient norm of all mislabeled examples over that of all clean ones, while they are "
        "learned (median over layers and epochs)",
        "'the same', about 1",
        ACCOUNTS.name,
        headline_numbers.norm_ratio,
        between(0.67, 1.5),
    ),
    Claim(
        "gradients.norm_ratio_each",
        "4.1",
        "The same for a single mislabeled and a single clean example",
        "'an order of magnitude higher'",
        ACCOUNTS.name,
        headline_numbers.norm_ratio_each,
        above(3.16, "above 3.16: nearer to ten times than to once"),
    ),
    Claim(
        "gradients.norm_ratio_highest",
        "4.1, Figure 1",
        "The same ratio in the layer where it is highest: 'no layer receives significantly more' "
        "from mislabeled examples",
        "none above clean",
        ACCOUNTS.name,
        headline_numbers.norm_ratio_highest,
        below(1.5),
    ),
    Claim(
        "gradients.norm_ratio_last",
        "1 and 4",
        "Norm ratio of the last layer over that of the median layer: it 'does not stand out'",
        "about 1",
        ACCOUNTS.name,
        headline_numbers.norm_ratio_last,
        below(1.5),
    ),
    Claim(
        "gradients.norm_ratio_epochs",
        "A.1, Figure 10",
        "Epochs in which the mislabeled examples' gradient is 'nearly as large' (at least 2/3)",
        "all",
        ACCOUNTS.name,
        headline_numbers.norm_ratio_epochs,
        above(0.95, "above 95%"),
        percent=True,
    ),
    Claim(
        "gradients.cosine",
        "4.2, Figure 2",
        "Cosine of clean and mislabeled gradient, while the mislabeled are learned (median over "
        "layers and epochs)",
        "below -0.75",
        ACCOUNTS.name,
        headline_numbers.cosine,
        below(-0.75),
    ),
    Claim(
        "gradients.cosine_layers",
        "4.2, Figure 2",
        "Layers whose median cosine is below -0.75 in these epochs",
        "all",
        ACCOUNTS.name,
        headline_numbers.cosine_layers,
        above(0.999, "all"),
        percent=True,
    ),
    Claim(
        "gradients.over_noise_rates",
        "A.2, Figure 11",
        "Norm ratio against noise rate: from 'slightly lower' than clean to 'very high' (rank "
        "correlation)",
        "rising",
        ACCOUNTS.name,
        headline_numbers.mean_norm_ratio,
        above(0.5, "correlation above 0.5"),
        over="data.noise_rate",
    ),
    # ------------------------------------------------------------ Section 5
    Claim(
        "rewinding.last_layer",
        "5.1, Figure 3",
        "Mislabeled accuracy kept when the last layer goes back to the last epoch with less than "
        "20% of it",
        "'does not reduce', 100%",
        REWINDING.name,
        headline_numbers.kept_by_last_layer,
        above(0.95, "above 95%"),
        percent=True,
    ),
    Claim(
        "rewinding.most_layers",
        "5.1, Figure 3",
        "Layers that can go back there and keep 80% of the mislabeled accuracy",
        "most",
        REWINDING.name,
        headline_numbers.layers_that_keep,
        above(0.5, "above 50%"),
        percent=True,
    ),
    Claim(
        "rewinding.not_last",
        "5.1, Figure 3",
        "Mislabeled accuracy with the last layer at its initialization, less the mean over all "
        "other layers there: memorization is not in the last layer",
        "above 0",
        REWINDING.name,
        headline_numbers.last_against_others,
        above(0, "above 0"),
        percent=True,
    ),
    Claim(
        "rewinding.same_layers",
        "5.1, Figure 3",
        "Rank correlation, over layers at their initialization, of clean and mislabeled accuracy: "
        "the critical layers are 'similar'",
        "'similar'",
        REWINDING.name,
        headline_numbers.critical_layers_alike,
        above(0.5),
    ),
    Claim(
        "retraining.layers",
        "5.2, Figure 4",
        "Layers that reach 70% mislabeled accuracy at some epoch of training on clean ones only",
        "most",
        RETRAINING.name,
        headline_numbers.layers_that_come_back,
        above(0.5, "above 50%"),
        percent=True,
    ),
    Claim(
        "retraining.last_layer",
        "5.2, Figure 4",
        "Mislabeled accuracy that the last layer reaches so: it is redundant",
        "near 100%",
        RETRAINING.name,
        headline_numbers.last_layer_comes_back,
        above(0.9, "above 90%"),
        percent=True,
    ),
    # ------------------------------------------------------------ Section 6.1
    Claim(
        "flipping.neurons_noisy",
        "6.1, Figure 5a",
        "Neurons to flip a mislabeled example (mean)",
        "5.1",
        FLIPPING.name,
        headline_numbers.neurons_noisy,
        below(10, "below 10, the paper's 'small number'"),
    ),
    Claim(
        "flipping.neurons_clean",
        "6.1, Figure 5a",
        "Neurons to flip a clean example, over those for a mislabeled one (means)",
        "15.7 / 5.1 = 3.1",
        FLIPPING.name,
        headline_numbers.neurons_ratio,
        above(1.5, "above 1.5, 'significantly larger'"),
    ),
    Claim(
        "flipping.below_ten",
        "6.1",
        "Mislabeled examples that flip with fewer than 10",
        "more than 90%",
        FLIPPING.name,
        headline_numbers.flipped_below_ten,
        above(0.9, "above 90%"),
        percent=True,
    ),
    Claim(
        "flipping.remaining",
        "6.1, Figure 5b",
        "Accuracy on all other training examples after the removal for a mislabeled example, less "
        "that for a clean one (means)",
        "+10%",
        FLIPPING.name,
        headline_numbers.remaining_difference,
        above(0),
        percent=True,
    ),
    Claim(
        "flipping.same_layers",
        "6.1, Figure 5c",
        "Share of neurons that lie in the same layers for both (overlap of the two histograms)",
        "'similar'",
        FLIPPING.name,
        headline_numbers.layers_shared,
        above(0.5, "above 50%"),
        percent=True,
    ),
    Claim(
        "flipping.scattered",
        "6.1, Figure 5c",
        "Layers that the mislabeled examples' neurons are scattered over (exp of the entropy)",
        "'multiple'",
        FLIPPING.name,
        headline_numbers.layers_effective,
        above(2),
    ),
    *(
        Claim(
            f"flipping.auc_{method.replace(' ', '_')}",
            "6.1",
            f"AUC of telling mislabeled from clean examples by {method}",
            f"{PAPER_AUC[method]:g}",
            DETECTION.name,
            headline_numbers.area(method),
            above(round(PAPER_AUC[method] - 0.05, 3), f"above {PAPER_AUC[method] - 0.05:g}"),
        )
        for method in ("neurons", "learning time", "forgetting time")
    ),
    # ------------------------------------------------------------ Section 6.2
    *(
        Claim(
            f"dropout.{state}_{kind}",
            "6.2, Table 1",
            f"Example-tied dropout, accuracy {'with' if state == 'before' else 'without'} the "
            f"memorization neurons: {kind} examples",
            "Table 1",
            DROPOUT.name,
            headline_numbers.accuracy(state, kind),
            rule,
            percent=True,
            dropout="example_tied",
        )
        for state, kind, rule in (
            ("before", "clean", above(0.98, "above 98%, 'almost perfectly fits'")),
            ("before", "noisy", above(0.98, "above 98%, 'almost perfectly fits'")),
            ("after", "clean", above(0.9, "above 90%")),
            ("after", "noisy", below(0.05, "below 5%")),
        )
    ),
    Claim(
        "dropout.gap",
        "6.2, Table 1",
        "Change of the gap between clean and test accuracy by dropping: 'lowering the "
        "generalization gap'",
        "-12.5% (cifar10)",
        DROPOUT.name,
        headline_numbers.gap_change,
        below(0),
        percent=True,
        dropout="example_tied",
    ),
    Claim(
        "dropout.forgotten",
        "6.2, Figure 7",
        "Typicality of the clean examples that dropping forgets, less that of the others (means): "
        "they are 'ambiguous or exceptional'",
        "below 0",
        DROPOUT.name,
        headline_numbers.forgotten_less_typical,
        below(0),
        dropout="example_tied",
    ),
    *(
        Claim(
            f"dropout.{kind}_noisy",
            "6.2, Table 3",
            f"Mislabeled examples that a network with {words} has memorized",
            f"{PAPER_TABLE_3[kind][1]:.1%}",
            DROPOUT.name,
            headline_numbers.accuracy("after", "noisy"),
            above(0.9, "above 90%"),
            percent=True,
            dropout=kind,
        )
        for kind, words in (("standard", "standard dropout"), ("sparse", "fixed sparse channels"))
    ),
    *(
        Claim(
            f"dropout.{kind}_over_p_gen",
            "6.2, Table 2",
            f"Accuracy on {words} examples after dropping against p_gen (rank correlation)",
            "rising",
            DROPOUT.name,
            headline_numbers.accuracy("after", kind),
            above(0.5, "correlation above 0.5"),
            dropout="example_tied",
            over="dropout.p_gen",
        )
        for kind, words in (("clean", "clean"), ("noisy", "mislabeled"))
    ),
    # ------------------------------------------------------------ Section 7, Appendix B.2
    Claim(
        "atypical.norm_ratio",
        "7, Figure 8",
        "Gradient norm of all atypical examples over that of all typical ones (median over layers, "
        "mean over epochs)",
        "about 1",
        ACCOUNTS.name,
        headline_numbers.mean_norm_ratio,
        between(0.67, 1.5),
        splits=("atypical",),
    ),
    Claim(
        "atypical.rewinding",
        "7, Figure 9",
        "Atypical accuracy with the last layer at its initialization, less the mean over all other "
        "layers there: memorization is 'dispersed'",
        "above 0",
        REWINDING.name,
        headline_numbers.last_against_others,
        above(0),
        percent=True,
        splits=("atypical",),
    ),
    Claim(
        "atypical.retraining",
        "B.2, Figure 19",
        "Layers that reach 70% atypical accuracy at some epoch of training on typical ones only: "
        "'none of the layers are important'",
        "all",
        RETRAINING.name,
        headline_numbers.layers_that_come_back,
        above(0.999, "all"),
        percent=True,
        splits=("atypical",),
    ),
)
