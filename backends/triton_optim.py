"""Triton kernels for the two ends of a training step: the loss on logits, and the optimizer.

    import kernels, triton_optim         # registers a `triton` form with each operation
    kernels.use("triton")
    TRITON_INTERPRET=1 pytest tests/backends/test_triton_rows.py     # without a GPU

The cross entropy is one pass over the logits each way. The optimizer's steps walk all parameters
in one launch: a table in device memory says where each tensor lies, so that hundreds of small
tensors cost one launch and not hundreds, and nothing is copied into flat buffers. AdamW reads p,
g, m, v and writes p, m, v once, 28 bytes a parameter in float32. Nothing is read back to the host:
the clipping factor stays on the device. How to read a kernel: see triton_pointwise.py.
"""
from itertools import accumulate
from typing import Iterator, Sequence

from config import refuse_to_run

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels
from backends.triton_common import check, expect, ship


# ------------------------------------------------------------------- one launch, many tensors


TENSORS = 256                            # tensors a launch, elements a program
CHUNK = 4096


@triton.jit
def my_part(table, count, TENSORS: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """(which tensor, element numbers (CHUNK,), which of them exist) of this program.

    table (2 + k, count) int64: programs up to and with each tensor, its size, then k addresses.
    """
    pid = tl.program_id(0)
    at = tl.arange(0, TENSORS)
    ends = tl.load(table + at, at < count, 2147483647)
    which = tl.sum((ends <= pid).to(tl.int32), 0)         # tensors that end before this program
    begin = tl.load(table + which - 1, which > 0, 0)
    size = tl.load(table + count + which)
    # the position inside a tensor is int64: one may pass 2^31 elements
    if ALIGNED:
        size = tl.multiple_of(size, 16)                   # so that a mask covers whole vectors
    part = (pid - begin) * CHUNK + tl.arange(0, CHUNK)
    return which, part, part < size


@triton.jit
def address(table, count, row: tl.constexpr, which, like, ALIGNED: tl.constexpr):
    """The pointer in row `row` of the table's addresses, of the type of `like`.

    The compiler sees a number read from memory and would load element by element: it has to be
    told that the address is a multiple of 16 bytes, which the host has checked.
    """
    pointer = tl.load(table + (2 + row) * count + which).to(like.dtype)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


def launches(*lists: Sequence[Tensor]) -> Iterator[tuple]:
    """Yield (programs, table, count, first tensor of each list, constants) of as few launches as
    types and TENSORS allow. Tensors of one place in the lists have one shape; all are dense."""
    kinds: dict[tuple, list] = {}
    for row in zip(*lists):
        if row[0].numel():
            kinds.setdefault(tuple(t.dtype for t in row), []).append(row)
    for rows in kinds.values():
        for i in range(0, len(rows), TENSORS):
            group = rows[i:i + TENSORS]
            sizes = [row[0].numel() for row in group]
            ends = list(accumulate(triton.cdiv(n, CHUNK) for n in sizes))
            places = [[t.data_ptr() for t in column] for column in zip(*group)]
            cuda = group[0][0].is_cuda
            # from pinned memory the copy is queued like a kernel: the host does not wait for it
            table = torch.tensor([ends, sizes, *places], dtype=torch.int64, pin_memory=cuda)
            table = table.to(group[0][0].device, non_blocking=True)
            aligned = all(n % 16 == 0 for numbers in (sizes, *places) for n in numbers)
            yield ends[-1], table, len(group), group[0], dict(
                TENSORS=TENSORS, CHUNK=CHUNK, ALIGNED=aligned, num_warps=8)


def dense(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the same lists with copies in the place of what is not contiguous."""
    check(*{(t.dtype, t.device): t for tensors in lists for t in tensors}.values())
    expect(all(len({t.shape for t in row}) == 1 for row in zip(*lists)) and
           len({len(tensors) for tensors in lists}) == 1,
           "an optimizer step", "lists of the same length, and of the same shapes in each place")
    return [[t.contiguous() for t in tensors] for tensors in lists]


def write_back(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    for t, copy in zip(tensors, copies):
        if copy is not t:
            t.copy_(copy)


def sharded(tensors: Sequence[Tensor]) -> bool:
    """True for FSDP's DTensors: PyTorch's own operators know what to do across ranks."""
    return any(hasattr(t, "to_local") for t in tensors)


# -------------------------------------------------------------------------------- optimizer


@triton.jit
def adamw_step(table, count, p_like, g_like, m_like, v_like, decay, rate, fresh1, fresh2, eps,
               correction, TENSORS: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    # p <- p (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps) (Loshchilov 2019), with decay = 1 - lr wd,
    # rate = lr / (1 - b1^step) and correction = 1 / (1 - b2^step): the hats cost no pass
    which, part, mask = my_part(table, count, TENSORS, CHUNK, ALIGNED)
    p_at = address(table, count, 0, which, p_like, ALIGNED) + part
    g_at = address(table, count, 1, which, g_like, ALIGNED) + part
    m_at = address(table, count, 2, which, m_like, ALIGNED) + part
    v_at = address(table, count, 3, which, v_like, ALIGNED) + part
    p = tl.load(p_at, mask, 0.0).to(tl.float32)
    g = tl.load(g_at, mask, 0.0).to(tl.float32)
    m = tl.load(m_at, mask, 0.0).to(tl.float32)
    v = tl.load(v_at, mask, 0.0).to(tl.float32)
    # fresh = 1 - beta comes from the host: 1 - 0.999 in float32 is wrong in its fifth digit
    m += (g - m) * fresh1
    v += (g * g - v) * fresh2
    p = p * decay - rate * m / (tl.sqrt(v * correction) + eps)
    tl.store(p_at, p.to(p_like.dtype.element_ty), mask)
    tl.store(m_at, m.to(m_like.dtype.element_ty), mask)
    tl.store(v_at, v.to(v_like.dtype.element_ty), mask)


@kernels.adamw.triton
def adamw_triton(params, grads, m, v, *, step, lr, beta1, beta2, eps, weight_decay):
    if sharded(params):
        return kernels.adamw.implementations["torch"](
            params, grads, m, v, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay)
    p2, g2, m2, v2 = dense(params, grads, m, v)
    for programs, table, count, like, constants in launches(p2, g2, m2, v2):
        adamw_step[(programs,)](
            table, count, *like, 1 - lr * weight_decay, lr / (1 - beta1 ** step), 1 - beta1,
            1 - beta2, eps, 1 / (1 - beta2 ** step), **constants)
    for tensors, copies in zip((params, m, v), (p2, m2, v2)):
        write_back(tensors, copies)


@triton.jit
def muon_momentum(table, count, m_like, g_like, u_like, beta, fresh, TENSORS: tl.constexpr,
                  CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    # M <- b M + (1 - b) g and what Nesterov descends along, b M + (1 - b) g once more
    which, part, mask = my_part(table, count, TENSORS, CHUNK, ALIGNED)
    m_at = address(table, count, 0, which, m_like, ALIGNED) + part
    g_at = address(table, count, 1, which, g_like, ALIGNED) + part
    u_at = address(table, count, 2, which, u_like, ALIGNED) + part
    m = tl.load(m_at, mask, 0.0).to(tl.float32)
    g = tl.load(g_at, mask, 0.0).to(tl.float32)
    m += (g - m) * fresh
    tl.store(m_at, m.to(m_like.dtype.element_ty), mask)
    tl.store(u_at, (g + (m - g) * beta).to(u_like.dtype.element_ty), mask)


@triton.jit
def muon_descend(table, count, p_like, u_like, decay, rate, TENSORS: tl.constexpr,
                 CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    # p <- p (1 - lr wd) - rate u, the orthogonal update u in bfloat16 as the matmuls left it
    which, part, mask = my_part(table, count, TENSORS, CHUNK, ALIGNED)
    p_at = address(table, count, 0, which, p_like, ALIGNED) + part
    u_at = address(table, count, 1, which, u_like, ALIGNED) + part
    p = tl.load(p_at, mask, 0.0).to(tl.float32)
    u = tl.load(u_at, mask, 0.0).to(tl.float32)
    tl.store(p_at, (p * decay - rate * u).to(p_like.dtype.element_ty), mask)


@kernels.muon.triton
def muon_triton(params, grads, momentum, *, lr, beta, weight_decay, steps=5):
    if sharded(params):
        return kernels.muon.implementations["torch"](
            params, grads, momentum, lr=lr, beta=beta, weight_decay=weight_decay, steps=steps)
    p2, g2, m2 = dense(params, grads, momentum)
    shapes: dict[tuple, list[int]] = {}
    for i, p in enumerate(params):
        shapes.setdefault(tuple(p.shape), []).append(i)
    # matrices of one shape go through Newton-Schulz together; it is all matmul, and cuBLAS's
    stacks = {shape: torch.empty(len(members), *shape, dtype=torch.bfloat16,
                                 device=params[0].device) for shape, members in shapes.items()}
    updates = [u for stack in stacks.values() for u in stack.unbind()]
    order = [i for members in shapes.values() for i in members]
    lists = [m2[i] for i in order], [g2[i] for i in order], updates
    for programs, table, count, like, constants in launches(*lists):
        muon_momentum[(programs,)](table, count, *like, beta, 1 - beta, **constants)
    for (rows, cols), members in shapes.items():
        directions = kernels.newton_schulz(stacks[rows, cols], steps).contiguous().unbind()
        rate = lr * max(1.0, rows / cols) ** 0.5
        for programs, table, count, like, constants in launches([p2[i] for i in members],
                                                                directions):
            muon_descend[(programs,)](table, count, *like, 1 - lr * weight_decay, rate,
                                      **constants)
    write_back(params, p2)
    write_back(momentum, m2)


@triton.jit
def sum_squares(table, count, g_like, partial, TENSORS: tl.constexpr, CHUNK: tl.constexpr,
                ALIGNED: tl.constexpr):
    # lanes past the end add 0; a NaN or an infinity anywhere reaches the norm
    which, part, mask = my_part(table, count, TENSORS, CHUNK, ALIGNED)
    g = tl.load(address(table, count, 0, which, g_like, ALIGNED) + part, mask, 0.0)
    g = g.to(tl.float32)
    tl.store(partial + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit
def multiply(table, count, g_like, factor, TENSORS: tl.constexpr, CHUNK: tl.constexpr,
             ALIGNED: tl.constexpr):
    which, part, mask = my_part(table, count, TENSORS, CHUNK, ALIGNED)
    by = tl.load(factor)
    if by != 1.0:                        # most steps clip nothing: then nothing is read or written
        g_at = address(table, count, 0, which, g_like, ALIGNED) + part
        g = tl.load(g_at, mask, 0.0).to(tl.float32)
        tl.store(g_at, (g * by).to(g_like.dtype.element_ty), mask)


@kernels.clip_grad_norm.triton
def clip_grad_norm_triton(grads, max_norm, scale=1.0):
    grads = list(grads)
    if sharded(grads):
        return kernels.clip_grad_norm.implementations["torch"](grads, max_norm, scale)
    copies, = dense(grads)
    parts = list(launches(copies))
    sums = [torch.zeros(1, device=grads[0].device)]
    for programs, table, count, like, constants in parts:
        sums.append(torch.empty(programs, dtype=torch.float32, device=table.device))
        sum_squares[(programs,)](table, count, *like, sums[-1], **constants)
    # a fixed order of addition: the same gradients have the same norm in every run
    norm = torch.cat(sums).double().sum().sqrt().float() * scale
    factor = torch.ones_like(norm) * scale               # a fill, not a copy from the host
    if max_norm:
        factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for programs, table, count, like, constants in parts:
        multiply[(programs,)](table, count, *like, factor, **constants)
    write_back(grads, copies)
    return norm


# ------------------------------------------------------------------------- what can be launched


def list_shipped() -> Iterator[tuple]:
    """Yield every configuration of the optimizer steps that can be launched."""
    for aligned in (False, True):
        flags = dict(TENSORS=TENSORS, CHUNK=CHUNK, ALIGNED=aligned)
        for function, types in ((adamw_step, "liffffxxxxxx"), (muon_momentum, "liffbxx"),
                                (muon_descend, "lifbxx"), (sum_squares, "liff"),
                                (multiply, "liff")):
            yield ship(function, types, dict(num_warps=8), **flags)


SHIPPED = list(list_shipped())


if __name__ == "__main__":
    refuse_to_run()
