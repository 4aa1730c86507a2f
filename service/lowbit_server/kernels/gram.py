"""Sums of products of bfloat16 columns, three times as fast as in float32."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

import torch

from lowbit_server import kernels


def add_gram(inputs: torch.Tensor, sums: torch.Tensor) -> bool:
    """Add X^T X of bfloat16 inputs X (tokens, in) to the upper triangle of float32 sums (in, in).

    The number of threads changes no bit. Returns False, and adds nothing, where there is no
    kernel for it.
    """
    library = kernels.library()
    if library is None or inputs.dtype is not torch.bfloat16 or inputs.device.type != "cpu":
        return False
    inputs = inputs.contiguous()
    added: int = library.lowbit_gram(
        c_void_p(inputs.data_ptr()),
        c_int64(inputs.shape[0]),
        c_int64(inputs.shape[1]),
        c_void_p(sums.data_ptr()),
        c_int(torch.get_num_threads()),
    )
    return bool(added)
