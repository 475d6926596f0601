"""torch.compile for a training, with one line where it cannot work."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.errors import RunFailed

# A process may train models of many shapes one after the other; torch would give up after 8 graphs.
MOST_GRAPHS = 10_000


@contextmanager
def compiled(model: nn.Module, wanted: bool | str) -> Iterator[nn.Module]:
    """Yield the model, compiled if wanted is True, as CUDA graphs if it is "graphs".

    Its parameters are the model's.

    Every size of a batch has a graph of its own, so that an interrupted training is resumed with
    the same graphs, and bits: graphs for any size would be made, or not, depending on the sizes
    that came before.
    """
    if wanted not in (True, "graphs"):
        yield model
        return
    # Importing them takes seconds.
    from torch._dynamo import config as graphs
    from torch._dynamo.exc import TorchDynamoException
    from torch._functorch import config as gradients

    static = {"fullgraph": True, "dynamic": False}
    limits = {"recompile_limit": MOST_GRAPHS, "accumulated_recompile_limit": MOST_GRAPHS}
    # Accounting goes backward through a graph twice, and the first time may not use up its tensors;
    # also where that graph was made, and kept, by a training that goes through it once.
    with graphs.patch(**limits), gradients.patch(donated_buffer=False):
        try:
            if wanted == "graphs":
                yield _Replayed(torch.compile(model, mode="reduce-overhead", **static))
            else:
                yield torch.compile(model, **static)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = f"{type(cause).__name__}: {cause}".strip().partition("\n")[0]
            raise RunFailed(
                f"train.compile: torch.compile failed: {reason}. It needs a C++ compiler such as "
                "g++, on a GPU also Triton; train.compile=false trains without"
            ) from None


class _Replayed(nn.Module):
    """A network computed by CUDA graphs, whose results each forward pass would overwrite.

    The results are copied, and torch is told that a pass begins: it would have to guess, as
    accounting goes backward twice.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.network(images).clone()
