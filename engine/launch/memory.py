"""Running out of memory: recognize it in any library's words, tell the sizes, free what is held."""

import gc
import re
import traceback

import torch

_OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|(CUDNN|CUBLAS)_STATUS_ALLOC_FAILED")
_SENTENCES = 3  # of torch's message: what failed, how much was asked for, how much there is


def out_of_memory(error: BaseException) -> str | None:
    """Return one line with the sizes and what to lower; None for any other error."""
    if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
        return None
    line = str(error).strip().partition("\n")[0]
    line = re.sub(r"^\[enforce fail at [^\]]*\][\s.]*", "", line)
    sentences = re.split(r"\.\s+(?=[A-Z])", line)[:_SENTENCES]
    reason = ". ".join(sentences).rstrip(". ") or "no size is known"
    if "ALLOC_FAILED" in reason:  # which tells no size
        reason += _free_on_gpu()
    return (
        f"out of memory: {reason}; a lower train.batch_size, data.train_size or size of the model "
        "(model.width) may help"
    )


def _free_on_gpu() -> str:
    if not torch.cuda.is_initialized():
        return ""
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    return f" ({free:.2f} GiB of {total:.2f} GiB are free)"


def free_memory_of(error: BaseException) -> None:
    """Release the tensors that an error's frames hold, and give cached memory back to the GPU."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
