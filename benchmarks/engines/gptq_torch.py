"""GPTQ of one weight in PyTorch: algorithm 1 of the paper (Frantar et al. 2022), with
groups, as a plain loop.

H⁻¹ by Cholesky, its upper Cholesky factor, blocks of 128 columns; a group's scale is taken
when the group begins. Everything in float32 on the CPU, without gradients. It works on the
transposed weight, so that each column is contiguous, as in refllm.
"""

from __future__ import annotations

import time

import torch
from common import Channel

from engines.gptq import Task, draw

BLOCK = 128
DAMP = 0.01


@torch.inference_mode()
def gptq(
    weight: torch.Tensor, h: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, float]:
    """Codes [N, M] and the loss ½ Σ e² of a weight W[M, N] with the Hessian h[N, N]."""
    h = h.clone()
    index = torch.arange(h.shape[0])
    h[index, index] += DAMP * torch.mean(torch.diagonal(h))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    work = weight.T.contiguous()  # [N, M]
    codes = torch.empty_like(work, dtype=torch.uint8)
    top = 2**bits - 1
    half = 2 ** (bits - 1)
    loss = 0.0
    scale = work[0]
    for a in range(0, work.shape[0], BLOCK):
        b = min(a + BLOCK, work.shape[0])
        part = work[a:b].clone()
        errors = torch.empty_like(work[a:b])
        factor = upper[a:b, a:b]
        for i in range(b - a):
            if (a + i) % group == 0:
                if a + i + group <= b:
                    known = part[i : i + group]
                else:
                    known = work[a + i : a + i + group]
                scale = torch.clamp(known.abs().amax(dim=0) * (2 / top), min=1e-9)
            w = part[i]
            q = torch.clamp(torch.round(w / scale) + half, 0, top)
            codes[a + i] = q
            error = (w - scale * (q - half)) / factor[i, i]
            part[i:] -= torch.outer(factor[i, i:], error)
            errors[i] = error
        loss += 0.5 * float(torch.sum(errors.double() ** 2))
        work[b:] -= upper[a:b, b:].T @ errors
    return codes, loss


def main() -> None:
    channel = Channel()
    known = {}
    channel.send(engine="torch")
    while (request := channel.receive()) is not None:
        task = Task(**request)
        if task not in known:
            known = {task: tuple(torch.from_numpy(array) for array in draw(task))}
        weight, h = known[task]
        began = time.perf_counter()
        computing = time.process_time()
        _, loss = gptq(weight, h, task.bits, task.group)
        channel.send(
            seconds=time.perf_counter() - began, cpu=time.process_time() - computing, loss=loss
        )


if __name__ == "__main__":
    main()
