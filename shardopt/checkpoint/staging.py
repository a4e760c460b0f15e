"""A copy of what a rank writes, in host memory that is kept from one save to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardopt.checkpoint.blocks import places


class Staging:
    """One buffer of as many bytes as this rank writes, laid out as its file; pinned where a GPU is.

    It is kept, because memory that a process gets anew costs more than the copy: the system zeroes every page.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copy 1-D tensors, on any device, into the buffer, which is overwritten by the next call.

        Returns:
            It, as bytes.
        """
        starts, end = places([t.nbytes for t in tensors])
        on_gpu = any(t.is_cuda for t in tensors)
        if self._buffer.numel() != end:
            self.clear()
            self._buffer = torch.zeros(end, dtype=torch.uint8, pin_memory=on_gpu)
        for start, tensor in zip(starts, tensors, strict=True):
            self._buffer[start : start + tensor.nbytes].view(tensor.dtype).copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return self._buffer

    def clear(self) -> None:
        """Give the memory back."""
        self._buffer = torch.empty(0, dtype=torch.uint8)
