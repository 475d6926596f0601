"""The paper's claims: the measure of each, and the rule by which a measured number agrees.

A claim has one measure, a number for each seed, computed from result files alone; and one rule,
fixed here and printed beside every verdict. Words of the paper without a number ('similar',
'significantly more') get a number here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from engine.config.schema import Config
from example_tied_dropout import DROPOUT
from gradient_accounting import ACCOUNTS
from layer_retraining import RETRAINING
from layer_rewinding import REWINDING
from neuron_flipping import DETECTION, FLIPPING
from plotting.beyond.scores import PAPER_AUC
from plotting.families import Family
from plotting.report import headline_numbers
from plotting.report.headline_numbers import Values
from plotting.report.tables import PAPER_TABLE_3


@dataclass(frozen=True)
class Rule:
    """Condition for a number to agree, with its words."""

    words: str
    holds: Callable[[float], bool]


def above(bound: float, words: str = "") -> Rule:
    return Rule(words or f"above {bound:g}", lambda value: value > bound)


def at_least(bound: float, words: str) -> Rule:
    return Rule(words, lambda value: value >= bound - 1e-9)  # 19 of 20 are 95%


def below(bound: float, words: str = "") -> Rule:
    return Rule(words or f"below {bound:g}", lambda value: value < bound)


def between(low: float, high: float) -> Rule:
    return Rule(f"from {low:g} to {high:g}", lambda value: low <= value <= high)


@dataclass(frozen=True)
class Claim:
    """One statement of the paper that a measurement can support or contradict."""

    name: str  # experiment.statement, for summary.json
    where: str  # section, figure or table of the paper
    text: str
    paper: str  # the paper's number, or its words
    source: str  # the result file that the measure reads
    measure: Callable[[Family], Values]
    rule: Rule
    value: float | None = None  # the paper's number alone, where it gives one
    percent: bool = False
    splits: tuple[str, ...] = ("noise", "human")
    dropout: str = "none"  # the kind of dropout of the runs
    over: str | None = None  # a setting: the claim is the measure's rank correlation with it

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
        "Gradient norm of the noisy examples divided by that of the clean examples, while noisy "
        "examples are learned (median over layers and epochs)",
        "'the same', about 1",
        ACCOUNTS.name,
        headline_numbers.norm_ratio,
        between(0.67, 1.5),
    ),
    Claim(
        "gradients.norm_ratio_each",
        "4.1",
        "Norm of the noisy examples' mean gradient divided by that of the clean examples' mean "
        "gradient, while noisy examples are learned (median over layers and epochs)",
        "'an order of magnitude higher'",
        ACCOUNTS.name,
        headline_numbers.norm_ratio_each,
        above(3.16, "above 3.16, closer to 10 than to 1 on a logarithmic scale"),
    ),
    Claim(
        "gradients.norm_ratio_highest",
        "4.1, Figure 1",
        "Norm ratio of noisy to clean gradients in the layer with the highest ratio ('no layer "
        "receives significantly more' from noisy examples)",
        "none above clean",
        ACCOUNTS.name,
        headline_numbers.norm_ratio_highest,
        below(1.5),
    ),
    Claim(
        "gradients.norm_ratio_last",
        "1 and 4",
        "Norm ratio of the last layer divided by the norm ratio of the median layer (the last "
        "layer 'does not stand out')",
        "not above others",
        ACCOUNTS.name,
        headline_numbers.norm_ratio_last,
        below(1.5),
    ),
    Claim(
        "gradients.norm_ratio_epochs",
        "A.1, Figure 10",
        "Epochs in which the noisy gradient norm is 'nearly as large' as the clean one (at least "
        "2/3)",
        "all",
        ACCOUNTS.name,
        headline_numbers.norm_ratio_epochs,
        at_least(0.95, "at least 95%"),
        percent=True,
    ),
    Claim(
        "gradients.cosine",
        "4.2, Figure 2",
        "Cosine between the clean and the noisy gradient, while noisy examples are learned "
        "(median over layers and epochs)",
        "below -0.75",
        ACCOUNTS.name,
        headline_numbers.cosine,
        below(-0.75),
    ),
    Claim(
        "gradients.cosine_layers",
        "4.2, Figure 2",
        "Layers with a median cosine below -0.75 while noisy examples are learned",
        "all",
        ACCOUNTS.name,
        headline_numbers.cosine_layers,
        above(0.999, "all"),
        percent=True,
    ),
    Claim(
        "gradients.cosine_throughout",
        "1",
        "Layers with a median cosine below -0.75 over all epochs ('throughout training, at every "
        "layer')",
        "all",
        ACCOUNTS.name,
        headline_numbers.cosine_throughout,
        above(0.999, "all"),
        percent=True,
    ),
    Claim(
        "gradients.over_noise_rates",
        "A.2, Figure 11",
        "Rank correlation of norm ratio and noise rate (from 'slightly lower' than clean to 'very "
        "high')",
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
        "Share of the final noisy accuracy kept after rewinding the last layer to the last rewound "
        "epoch with a noisy accuracy below 20%",
        "'does not reduce', 100%",
        REWINDING.name,
        headline_numbers.kept_by_last_layer,
        above(0.95, "above 95%"),
        percent=True,
    ),
    Claim(
        "rewinding.most_layers",
        "5.1, Figure 3",
        "Layers that keep at least 80% of the final noisy accuracy after rewinding to the last "
        "rewound epoch with a noisy accuracy below 20%",
        "most",
        REWINDING.name,
        headline_numbers.layers_that_keep,
        above(0.5, "above 50%"),
        percent=True,
    ),
    Claim(
        "rewinding.not_last",
        "5.1, Figure 3",
        "Noisy accuracy with the last layer at initialization minus the mean over the other "
        "layers, each at initialization (memorization is not in the last layer)",
        "above 0",
        REWINDING.name,
        headline_numbers.last_against_others,
        above(0, "above 0"),
        percent=True,
    ),
    Claim(
        "rewinding.same_layers",
        "5.1, Figure 3",
        "Rank correlation over layers, each at initialization, of clean and noisy accuracy "
        "(critical layers are 'similar')",
        "'similar'",
        REWINDING.name,
        headline_numbers.critical_layers_alike,
        above(0.5),
    ),
    Claim(
        "retraining.layers",
        "5.2, Figure 4",
        "Layers that reach 70% noisy accuracy after any epoch of retraining on clean examples only",
        "most",
        RETRAINING.name,
        headline_numbers.layers_that_come_back,
        above(0.5, "above 50%"),
        percent=True,
    ),
    Claim(
        "retraining.last_layer",
        "5.2, Figure 4",
        "Highest noisy accuracy after an epoch of retraining only the last layer (the last layer "
        "is redundant)",
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
        "Neurons to flip a noisy example (mean)",
        "5.1",
        FLIPPING.name,
        headline_numbers.neurons_noisy,
        below(10, "below 10, the paper's 'small number'"),
        value=5.1,
    ),
    Claim(
        "flipping.neurons_clean",
        "6.1, Figure 5a",
        "Neurons to flip a clean example divided by neurons to flip a noisy example (means)",
        "15.7 / 5.1 = 3.1",
        FLIPPING.name,
        headline_numbers.neurons_ratio,
        above(1.5, "above 1.5, 'significantly larger'"),
        value=3.1,
    ),
    Claim(
        "flipping.below_ten",
        "6.1",
        "Noisy examples that flip with fewer than 10 neurons",
        "more than 90%",
        FLIPPING.name,
        headline_numbers.flipped_below_ten,
        above(0.9, "above 90%"),
        percent=True,
    ),
    Claim(
        "flipping.remaining",
        "6.1, Figure 5b",
        "Accuracy on the remaining training examples after zeroing a noisy example's neurons minus "
        "the accuracy after zeroing a clean example's (means)",
        "+10%",
        FLIPPING.name,
        headline_numbers.remaining_difference,
        above(0),
        value=0.1,
        percent=True,
    ),
    Claim(
        "flipping.test",
        "6.2",
        "Test accuracy after zeroing a noisy example's neurons minus the accuracy after zeroing a "
        "clean example's (means): removal for clean examples costs more on the test set",
        "'significantly higher cost', 'also on the test set'",
        FLIPPING.name,
        headline_numbers.test_difference,
        above(0),
        percent=True,
    ),
    Claim(
        "flipping.same_layers",
        "6.1, Figure 5c",
        "Overlap of the noisy and the clean examples' histograms of neurons over layers",
        "'similar'",
        FLIPPING.name,
        headline_numbers.layers_shared,
        above(0.5, "above 50%"),
        percent=True,
    ),
    Claim(
        "flipping.scattered",
        "6.1, Figure 5c",
        "Effective number of layers that contain the noisy examples' neurons (exponential of the "
        "entropy)",
        "'multiple'",
        FLIPPING.name,
        headline_numbers.layers_effective,
        above(2),
    ),
    *(
        Claim(
            f"flipping.auc_{method.replace(' ', '_')}",
            "6.1",
            f"AUC of the {words} for detecting noisy examples",
            f"{PAPER_AUC[method]:g}",
            DETECTION.name,
            headline_numbers.area(method),
            above(round(PAPER_AUC[method] - 0.05, 3), f"above {PAPER_AUC[method] - 0.05:g}"),
            value=PAPER_AUC[method],
        )
        for method, words in (
            ("neurons", "number of neurons"),
            ("learning time", "learning time"),
            ("forgetting time", "forgetting time"),
        )
    ),
    # ------------------------------------------------------------ Section 6.2
    *(
        Claim(
            f"dropout.{state}_{kind}",
            "6.2, Table 1",
            f"{kind.capitalize()} accuracy with example-tied dropout, {state} dropping the "
            "memorization neurons",
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
        "Gap between clean and test accuracy after dropping minus the gap before ('lowering the "
        "generalization gap')",
        "-12.5% (cifar10)",
        DROPOUT.name,
        headline_numbers.gap_change,
        below(0),
        value=-0.125,
        percent=True,
        dropout="example_tied",
    ),
    Claim(
        "dropout.test",
        "6.2, Table 1",
        "Test accuracy after dropping the memorization neurons minus the accuracy before",
        "+3.4% (cifar10)",
        DROPOUT.name,
        headline_numbers.test_change,
        above(0),
        value=0.034,
        percent=True,
        dropout="example_tied",
    ),
    Claim(
        "dropout.forgotten",
        "6.2, Figure 7",
        "Mean typicality of the clean examples forgotten by dropping minus that of the other clean "
        "examples (forgotten ones are 'ambiguous or exceptional')",
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
            f"Noisy accuracy of a network {words}",
            f"{PAPER_TABLE_3[kind][1]:.1%}",
            DROPOUT.name,
            headline_numbers.accuracy("after", "noisy"),
            above(0.9, "above 90%"),
            value=PAPER_TABLE_3[kind][1],
            percent=True,
            dropout=kind,
        )
        for kind, words in (
            ("standard", "trained with standard dropout"),
            ("sparse", "with a fixed sparse set of channels"),
        )
    ),
    *(
        Claim(
            f"dropout.{kind}_over_p_gen",
            "6.2, Table 2",
            f"Rank correlation of {kind} accuracy after dropping and p_gen",
            "rising",
            DROPOUT.name,
            headline_numbers.accuracy("after", kind),
            above(0.5, "correlation above 0.5"),
            dropout="example_tied",
            over="dropout.p_gen",
        )
        for kind in ("clean", "noisy")
    ),
    # ------------------------------------------------------------ Section 7, Appendix B.2
    Claim(
        "atypical.norm_ratio",
        "7, Figure 8",
        "Gradient norm of the atypical examples divided by that of the typical examples (median "
        "over layers, mean over epochs)",
        "about 1",
        ACCOUNTS.name,
        headline_numbers.mean_norm_ratio,
        between(0.67, 1.5),
        splits=("atypical",),
    ),
    Claim(
        "atypical.rewinding",
        "7, Figure 9",
        "Atypical accuracy with the last layer at initialization minus the mean over the other "
        "layers, each at initialization (memorization is 'dispersed')",
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
        "Layers that reach 70% atypical accuracy after any epoch of retraining on typical examples "
        "only ('none of the layers are important')",
        "all",
        RETRAINING.name,
        headline_numbers.layers_that_come_back,
        above(0.999, "all"),
        percent=True,
        splits=("atypical",),
    ),
)
