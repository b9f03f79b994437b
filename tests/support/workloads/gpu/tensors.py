"""PyTorch for the GPU cases: determinism, seeded weights, digests."""

from __future__ import annotations

import ctypes
import hashlib
import os
from typing import Any

# Read by cuBLAS when it makes its first handle.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch as torch  # type: ignore[import-not-found, unused-ignore]

from support.workloads.gpu import base

CHUNK = 256 << 20
"""Bytes of one tensor of weights."""
SAMPLE = 2 << 20
"""One number in so many bytes of the weights is part of every answer."""
# Of Knuth's MMIX generator: integer arithmetic gives the same bits on every GPU.
MULTIPLY, ADD = 6364136223846793005, 1442695040888963407


def set_up() -> None:
    """The same results in every run, and no gradients."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else every torch.empty is filled, gigabytes of weights as well.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.set_grad_enabled(False)
    torch.cuda.init()


def serve(case: base.Case) -> None:
    torch.cuda.synchronize()
    base.serve(case)


def weights(size: int, seed: int, dtype: Any = torch.bfloat16) -> list[Any]:
    """`size` bytes of random numbers, made on the GPU, in tensors of CHUNK bytes and a rest."""
    generator = torch.Generator(device="cuda")
    generator.manual_seed(seed)
    made = []
    width = torch.empty(0, dtype=dtype).element_size()
    for start in range(0, size, CHUNK):
        part = torch.empty(min(CHUNK, size - start) // width, dtype=dtype, device="cuda")
        # So wide that a state that is multiplied by a matrix of them again and again neither dies nor settles.
        made.append(part.uniform_(-0.05, 0.05, generator=generator))
    return made


def samples(parts: list[Any]) -> Any:
    """A number of every SAMPLE bytes of the weights, added up on the GPU: wrong if any block is missing."""
    return torch.stack([part.view(torch.int16)[:: SAMPLE // 2].to(torch.int64).sum() for part in parts]).sum()


def counted(size: int, seed: int) -> Any:
    """`size` bytes of 64-bit integers, all different."""
    return torch.arange(seed << 32, (seed << 32) + size // 8, dtype=torch.int64, device="cuda")


def advance(numbers: Any) -> None:
    """One step of the generator, in place."""
    numbers.mul_(MULTIPLY).add_(ADD)


def digest(*tensors: Any) -> str:
    """BLAKE2b of the tensors' bytes."""
    state = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        here = tensor.detach().contiguous().cpu()
        state.update(ctypes.string_at(here.data_ptr(), here.numel() * here.element_size()))
    return state.hexdigest()


def total(parts: list[Any]) -> str:
    """Of all bytes of the weights, by their place: added up on the GPU."""
    return digest(torch.stack([part.view(torch.int64).sum() for part in parts]))


def spin(seconds: float) -> None:
    """A kernel that takes about so long."""
    torch.cuda._sleep(int(seconds * 1.7e9))
