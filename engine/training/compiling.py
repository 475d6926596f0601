"""torch.compile for a training, with one line where it cannot work."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from engine.errors import RunFailed

# A process may train models of many shapes one after the other; torch would give up after 8 graphs.
MOST_GRAPHS = 10_000


@contextmanager
def compiled(model: nn.Module, wanted: bool | str) -> Iterator[nn.Module]:
    """Yield the model, compiled if wanted is True, with the same parameters.

    Every size of a batch has a graph of its own, so that an interrupted training is resumed with
    the same graphs, and bits: graphs for any size would be made, or not, depending on the sizes
    that came before.
    """
    if wanted is not True:
        yield model
        return
    # Importing them takes seconds.
    from torch._dynamo import config as graphs
    from torch._dynamo.exc import TorchDynamoException
    from torch._functorch import config as gradients

    limits = {"recompile_limit": MOST_GRAPHS, "accumulated_recompile_limit": MOST_GRAPHS}
    # Accounting goes backward through a graph twice, and the first time may not use up its tensors;
    # also where that graph was made, and kept, by a training that goes through it once.
    with graphs.patch(**limits), gradients.patch(donated_buffer=False):
        try:
            yield torch.compile(model, fullgraph=True, dynamic=False)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = f"{type(cause).__name__}: {cause}".strip().partition("\n")[0]
            raise RunFailed(
                f"train.compile: torch.compile failed: {reason}. It needs a C++ compiler such as "
                "g++, on a GPU also Triton; train.compile=false trains without"
            ) from None
