"""Where an adapter starts: A uniform, B the compressed negative gradient."""

import hashlib
import math

import torch

from tunemap.methods.parameters import Shape


def initial_a(shape: Shape, rank: int, generator: torch.Generator) -> torch.Tensor:
    """A (rank x in, fp32) uniform in +-1/sqrt(in) for a module of `shape` (out, in): also PEFT's own default."""
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(rank, shape[1], dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def initial_b(gradient: torch.Tensor, a: torch.Tensor, *, alpha: float, gamma: float) -> torch.Tensor:
    """B (out x rank, fp32) = -(gamma sqrt(in) / alpha) G A^T (A A^T)^-1, from G (out x in) and A (rank x in).

    Under the scaling alpha / sqrt(rank) the adapter then adds dW = -gamma sqrt(in / rank) G P, with P the projector on
    the rows of A: one step of gradient descent, compressed, of norm about gamma |G|. The minus sign is what makes it
    descend (paper, eq. 8-10; the released code lost it in August 2025).
    """
    g, a = gradient.float(), a.float()
    # The small rank x rank system in double: fp32 would lose digits to the condition number of A A^T.
    solved = torch.linalg.solve((a @ a.T).double(), (a @ g.T).double())
    return (solved.T * (-gamma * math.sqrt(a.shape[1]) / alpha)).to(torch.float32).contiguous()


def module_generator(seed: int, name: str) -> torch.Generator:
    """The random stream of one module's A: independent of other modules, of their order and of the world size."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(digest ^ seed)
