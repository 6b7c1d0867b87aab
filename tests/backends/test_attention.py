"""Attention in every implementation, against a loop over queries and PyTorch's SDPA.
"""
import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from gates import (FORMS, GATES, backend, check_forms, close, distance, documents, f64, strided)


def attention_loop(q, k, v, scale, window=0, softcap=0.0, doc=None, positions=None):
    """The formula one query at a time, in plain words: slow, and hard to get wrong."""
    (B, H, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    y = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            kv = h // (H // Hkv)                        # query heads of a group are neighbours
            for t in range(T):
                i = S - T + t if positions is None else int(positions[b, t])
                seen = [j for j in range(S) if j <= i and (not window or i - j < window)
                        and (doc is None or doc[b, j] == doc[b, S - T + t])]
                score = torch.stack([q[b, h, t] @ k[b, kv, j] * scale for j in seen])
                if softcap:
                    score = softcap * torch.tanh(score / softcap)
                y[b, h, t] = torch.softmax(score, 0) @ v[b, kv, seen]
    return y


VARIANTS = {
    "plain": {}, "scale": dict(scale=0.15), "softcap": dict(softcap=1.5),
    "window of 1": dict(window=1), "window": dict(window=3), "window beyond T": dict(window=99),
    "documents": dict(doc=[3, 1, 2]), "documents of one token": dict(doc=[1]),
    "all": dict(doc=[5, 1], window=3, softcap=2.0, scale=0.2),
}


def options(name, B, T):
    """Keyword arguments of a variant, with its documents made for this shape."""
    kw = dict(VARIANTS[name])
    return dict(kw, doc=documents(B, T, kw["doc"])) if "doc" in kw else kw


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("H, Hkv, T, S", [(4, 4, 9, 9), (4, 2, 9, 9), (3, 1, 4, 9), (2, 2, 1, 9),
                                          (2, 1, 1, 1)])
def test_attention_reference_is_the_loop(name, H, Hkv, T, S):
    q, k, v = (torch.randn(2, h, n, 6, dtype=f64) for h, n in ((H, T), (Hkv, S), (Hkv, S)))
    kw = options(name, 2, S)
    expected = attention_loop(q, k, v, **{"scale": 6 ** -0.5, **kw})
    for form in FORMS:
        with backend(form):
            close(kernels.attention(q, k, v, **kw), expected)


def test_attention_reference_is_sdpa_with_an_explicit_mask():
    q, k, v = torch.randn(3, 2, 3, 17, 8, dtype=f64)
    i = torch.arange(17)
    mask = (i[None] <= i[:, None]) & (i[:, None] - i[None] < 5)
    close(kernels.attention.reference(q, k, v, window=5),
          F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("window", [0, 3])
def test_attention_of_ragged_rows_at_their_own_positions(form, T, window):
    """Serving unequal prompts: row b stands at its own place among the cached keys."""
    q, (k, v) = torch.randn(3, 4, T, 6, dtype=f64), torch.randn(2, 3, 2, 9, 6, dtype=f64)
    positions = torch.tensor([2, 7, 0]).unsqueeze(1) + torch.arange(T)
    with backend(form):
        close(kernels.attention(q, k, v, positions=positions, window=window),
              attention_loop(q, k, v, 6 ** -0.5, window, positions=positions))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("B, H, Hkv, T, D", [
    (2, 4, 2, 9, 8), (1, 1, 1, 1, 5), (2, 3, 1, 130, 80), (1, 2, 2, 257, 16)])
def test_attention_forms_agree(name, B, H, Hkv, T, D):
    """T = 130 and 257 leave a ragged last block; H > Hkv sums gradients over a group."""
    kw = options(name, B, T)
    check_forms(lambda q, k, v: kernels.attention(q, k, v, **kw),
                (B, H, T, D), (B, Hkv, T, D), (B, Hkv, T, D))


def test_attention_of_more_heads_than_a_group():
    """B*H = 50 leaves two heads for the second group of 48; with documents a row is a group."""
    for doc in (None, documents(10, 5, [2, 1])):
        check_forms(lambda q, k, v: kernels.attention(q, k, v, doc=doc),
                    *[(10, 5, 5, 4)] * 3, dtypes=[torch.float32])


def test_attention_of_strided_inputs():
    check_forms(kernels.attention, *(strided(2, 3, 9, 8) for _ in range(3)))


def test_attention_of_an_empty_batch():
    check_forms(kernels.attention, *[(0, 3, 9, 8)] * 3, dtypes=[torch.float32])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 40])
def test_packed_documents_are_each_document_alone(form, window):
    lengths, H, D = [1, 100, 29, 70], 2, 8              # boundaries on both sides of row 128
    q, k, v = torch.randn(3, 1, H, sum(lengths), D, dtype=f64)
    doc = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).unsqueeze(0)
    with backend(form):
        together = kernels.attention(q, k, v, doc=doc, window=window)
        start = 0
        for n in lengths:
            own = slice(start, start + n)
            alone = kernels.attention(q[:, :, own], k[:, :, own], v[:, :, own], window=window)
            close(together[:, :, own], alone)
            start += n


@pytest.mark.parametrize("form", FORMS)
def test_attention_sees_no_future(form):
    for dtype in (torch.float32, torch.bfloat16):       # SDPA, and the form by hand
        q, k, v = torch.randn(3, 1, 2, 140, 8, dtype=dtype)
        with backend(form):
            before = kernels.attention(q, k, v)
            k[:, :, 131:], v[:, :, 131:] = 1e4, math.nan
            after = kernels.attention(q, k, v)
        # NaN times weight 0 is NaN: blocks ahead must not even be multiplied. Inside a block a
        # mask may do it, and SDPA's are larger, so only the first block by hand is held to that
        if form != "reference" and dtype == torch.bfloat16:
            assert torch.equal(before[:, :, :128], after[:, :, :128])
        v[:, :, 131:] = 1e4
        with backend(form):
            assert torch.equal(before[:, :, :131], kernels.attention(q, k, v)[:, :, :131])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, f64])
@pytest.mark.parametrize("form", FORMS)
def test_attention_dropout(form, dtype):
    """With v the identity the output is the dropped weights, so the mask can be read from it."""
    B, H, T, p = 3, 2, 140, 0.25
    q, k = torch.randn(2, B, H, T, T).to(dtype)
    v = torch.eye(T, dtype=dtype).expand(B, H, T, T).clone()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with backend(form):
        weights = kernels.attention(q, k, v).detach()
        y = kernels.attention(q, k, v, dropout_p=p)
        below = torch.ones(T, T).tril().bool().expand(B, H, T, T)
        live = below & (weights > 0)                    # small weights vanish in half types
        rate = (y == 0)[live].double().mean()
        assert abs(rate - p) < 4 * math.sqrt(p / live.sum())
        mask = (y != 0).to(f64) / (1 - p)
        # gradients through the mask that was drawn: the softmax written out in float64
        q2, k2, v2 = (x.detach().to(f64).requires_grad_() for x in (q, k, v))
        score = (q2 @ k2.transpose(-1, -2) * T ** -0.5).masked_fill(~below, -math.inf)
        expected = (torch.softmax(score, -1) * mask) @ v2
        gate = 1e-10 if dtype == f64 else GATES[dtype]
        assert distance(y, expected) < gate
        up = torch.randn(B, H, T, T, dtype=f64)
        got = torch.autograd.grad(y, (q, k, v), up.to(dtype))
        for a, b in zip(got, torch.autograd.grad(expected, (q2, k2, v2), up)):
            assert a.dtype == dtype and distance(a, b) < gate


def test_documents_behind_a_block_are_not_read():
    """Attention of packed rows skips the keys of documents that ended before a block of queries
    begins: they may hold anything. What it computes is that of each document alone."""
    torch.manual_seed(0)
    T, D = 200, 16
    q, k, v = (torch.randn(2, 3, T, D, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    doc = torch.stack([torch.arange(T) // 60, torch.full((T,), 7)])
    out = kernels.attention(q, k, v, doc=doc)
    for start in range(0, T, 60):
        part = slice(start, start + 60)
        alone = kernels.attention.reference(*(t[:1, :, part].double() for t in (q, k, v)))
        torch.testing.assert_close(out[:1, :, part].double(), alone, rtol=2e-2, atol=2e-2)
    whole = kernels.attention.reference(*(t[1:].double() for t in (q, k, v)))
    torch.testing.assert_close(out[1:].double(), whole, rtol=2e-2, atol=2e-2)
    from backends import cpu
    keys = sum((ks.stop - ks.start) * (rs.stop - rs.start) * (hs.stop - hs.start)
               for hs, rs, ks, _ in cpu.AttentionCPU.blocks(q.flatten(0, 1), 0, doc))
    assert keys < 0.75 * 6 * T * T, "nothing was skipped"
