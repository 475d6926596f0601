"""Layer groups: what the paper calls a layer, and the chain of stages that a model is.

Every model is a chain of *stages*, one per layer group, in forward order. What flows from stage to
stage is the state: a tensor, or inside a residual block the pair (branch, shortcut). So an
experiment can compute the activations in front of a group once and go on from there with other
weights (`run_stages`), and never repeats what lies below the group that it changes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from models.wiring import Wiring

State = Tensor | tuple[Tensor, ...]
Stage = tuple[str, tuple[str, ...], Callable[[State], State]]  # name, prefixes, forward


@dataclass(frozen=True)
class LayerGroup:
    """One layer of the paper: a set of parameters and buffers, and the stage that uses them."""

    index: int
    name: str
    prefixes: tuple[str, ...]  # modules or parameters; their tensors' names begin like this
    forward: Callable[[State], State]  # bound to the model that the group was made from

    def owns(self, name: str) -> bool:
        """Return True if this parameter or buffer (a state_dict key) is in the group."""
        return any(name == prefix or name.startswith(prefix + ".") for prefix in self.prefixes)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The group's parameters by name, in the model's order; the model may be a copy."""
        return {name: p for name, p in model.named_parameters() if self.owns(name)}


class StagedModel(nn.Module, ABC):
    """A model that is defined by its stages: forward runs them, so the two cannot drift apart."""

    min_image_size: ClassVar[int] = 1
    channel_dim: ClassVar[int] = 1  # of the activations at the dropout sites
    wiring: Wiring | None = None  # as observed; None: modules are declared in forward order

    @abstractmethod
    def stages(self) -> list[Stage]:
        """Return the stages in forward order; their parameters partition the model's."""

    def dropout_sites(self, kind: str = "blocks") -> dict[str, int]:
        """Map the modules behind which dropout is inserted to the channels that leave them."""
        return {}

    def values_behind(self, stage: int, state: State) -> tuple[Tensor, ...]:
        """Return the state's tensors behind a stage, without those kept for their size alone."""
        return state if isinstance(state, tuple) else (state,)

    def forward(self, images: Tensor) -> Tensor:
        state = images
        for _, _, stage in type(self).stages(self):
            state = stage(state)
        return state


def layer_groups(model: StagedModel) -> list[LayerGroup]:
    """The model's layer groups in forward order; they partition its parameters and buffers."""
    # Called on the class: a network's own module named stages hides the method (DerivedChain).
    stages = type(model).stages(model)
    groups = [LayerGroup(index, *stage) for index, stage in enumerate(stages)]
    for name in model.state_dict():
        owners = [group.name for group in groups if group.owns(name)]
        assert len(owners) == 1, f"{name} must belong to one layer group, not to {owners}"
    return groups


def run_stages(
    groups: Sequence[LayerGroup], state: State, start: int = 0, stop: int | None = None
) -> State:
    """Run the groups start..stop-1 on the state in front of group `start`; all: the logits."""
    for group in groups[start:stop]:
        state = group.forward(state)
    return state
