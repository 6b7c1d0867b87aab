"""triton_attention.py in Triton's interpreter, against float64 autograd of the reference.

The gate is that of gates.py: relative L2 of the output and of dq, dk and dv at most 1e-5 in
float32, 1e-3 in float16, 1e-2 in bfloat16. One wrong element of a mask is a hundred times that.
The sizes follow the tiles: 130 tokens are more than one tile of every type and leave a ragged
last one; 16 to 80 tokens keep the interpreter quick where one tile is enough.

What the interpreter cannot show (registers, spills, tensor cores) is for test_triton_compile.py.
"""
import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("FAILED TO INTERPRET: triton was imported before TRITON_INTERPRET=1 was set; run "
                "this file alone, or set it on line 1 of conftest.py", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

import math

import torch
from torch.utils.checkpoint import checkpoint

import bf16_interpreter
import kernels
from backends import triton_attention
from config import UserError
from gates import GATES, distance, documents, f64, strided

bf16_interpreter.install()
# lanes outside a tile compute -inf - -inf and the like before they are masked away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
attend = kernels.attention.implementations["triton"]
fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
ALL = (fp32, fp16, bf16)


def random(B, H, Hkv, T, D, S=None):
    """q (B, H, T, D), k and v (B, Hkv, S or T, D), in float64."""
    S = S or T
    return [torch.randn(B, h, n, D, dtype=f64) for h, n in ((H, T), (Hkv, S), (Hkv, S))]


def with_gradients(form, tensors, up, **options):
    """[y, dq, dk, dv] of form(q, k, v, **options) for the upstream gradient `up`."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = form(*leaves, **options)
    return [y, *torch.autograd.grad(y, leaves, up.to(y.dtype))]


def hold(got, expected, dtype):
    """Every tensor finite and within the gate of its type."""
    for name, a, b in zip(("y", "dq", "dk", "dv"), got, expected):
        assert a.isfinite().all(), f"{dtype} {name} is not finite"
        gap = distance(a, b)
        assert gap <= GATES[dtype], f"{dtype} {name}: {gap:.2e}"


def agree(tensors, dtypes=(fp32,), **options):
    """Forward and gradients of the kernels, in each type, against the reference in float64."""
    for dtype in dtypes:
        narrow = [x.to(dtype) for x in tensors]         # rounding an input is not their error
        up = torch.randn(narrow[0].shape, dtype=dtype)
        expected = with_gradients(kernels.attention.reference, [x.to(f64) for x in narrow], up,
                                  **options)
        hold(with_gradients(attend, narrow, up, **options), expected, dtype)


# ------------------------------------------------------------------------ forward, backward

# (B, H, Hkv, T, D), the types, the options; `doc` holds the lengths of documents
CASES = {
    "plain": ((1, 2, 2, 130, 64), ALL, {}),
    "one token": ((2, 2, 1, 1, 16), ALL, {}),
    "two tokens": ((3, 2, 2, 2, 5), (fp32,), {}),
    "grouped heads, D 80, a scale": ((1, 6, 2, 37, 80), (fp32, bf16), dict(scale=0.3)),
    "one key head": ((1, 4, 1, 67, 16), (fp32,), {}),
    "D 256": ((1, 2, 1, 41, 256), (fp32, bf16), {}),
    "softcap": ((1, 2, 1, 75, 64), ALL, dict(softcap=1.5)),
    "window of 1": ((1, 1, 1, 70, 16), (fp32, bf16), dict(window=1)),
    # a window of 18 ends one query into a tile: an error of one there loses the whole tile
    "window": ((1, 2, 1, 130, 16), (fp32, bf16), dict(window=18)),
    # so wide that whole tiles lie between its far edge and the diagonal
    "wide window": ((1, 1, 1, 210, 16), (fp32, fp16), dict(window=131)),
    "window beyond T": ((1, 1, 1, 65, 16), (fp32,), dict(window=1000)),
    "documents": ((2, 2, 1, 130, 16), (fp32, bf16), dict(doc=[50, 1, 30])),
    # past 256 keys the backward knows where a document ends: here one query into a tile
    "long documents": ((1, 1, 1, 290, 16), (fp32,), dict(doc=[273, 17])),
    "documents of one token": ((2, 1, 1, 40, 16), (fp32,), dict(doc=[1])),
    "all": ((2, 4, 2, 69, 80), (fp32, bf16), dict(doc=[45, 1, 7], window=9, softcap=2.0,
                                                  scale=0.2)),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name):
    shape, dtypes, options = CASES[name]
    if "doc" in options:
        options = dict(options, doc=documents(shape[0], shape[3], options["doc"]))
    agree(random(*shape), dtypes, **options)


def test_document_numbers_may_stand_in_any_order():
    """Numbers that come back, fall and are negative: only being equal counts."""
    doc = torch.tensor([5, -2, 5, 2 ** 40, 0, -2])[torch.randint(6, (2, 9))]
    doc = doc.repeat_interleave(8, 1)[:, :70]
    agree(random(2, 2, 1, 70, 16), (fp32, bf16), doc=doc)
    agree(random(2, 1, 1, 70, 16), (fp32,), doc=torch.randint(3, (2, 70)), window=30)


def test_fewer_queries_than_keys():
    """The queries are the last T of S; with documents and a window too. The first stands at 62:
    it sees all but one key of a tile, which must not pass for a whole one."""
    for options in ({}, dict(window=30), dict(doc=documents(2, 97, [40, 1, 33]))):
        agree(random(2, 2, 1, 35, 16, S=97), (fp32, bf16), **options)


def test_queries_at_their_own_positions():
    """Rows of unequal length in one batch, gradients included: query t of row b stands where
    positions[b, t] says, and what lies ahead of it in the cache is not looked at."""
    positions = torch.tensor([[0], [11], [60]]) + torch.arange(9)
    for options in ({}, dict(window=20, softcap=2.0)):
        agree(random(3, 4, 2, 9, 16, S=69), (fp32, bf16), positions=positions, **options)


def test_strided_inputs():
    """Views of one fused (B, T, (H + 2 Hkv) D) projection, as a model hands them over; and
    tensors whose features are not neighbours in memory."""
    B, H, Hkv, T, D = 2, 4, 2, 37, 16
    for dtype in (fp32, bf16):
        fused = torch.randn(B, T, (H + 2 * Hkv) * D).to(dtype)

        def run(form, fused):
            fused = fused.detach().requires_grad_()
            q, k, v = (x.unflatten(-1, (-1, D)).transpose(1, 2)
                       for x in fused.split([H * D, Hkv * D, Hkv * D], -1))
            y = form(q, k, v)
            return [y, *torch.autograd.grad(y, fused, up.to(y.dtype))]
        up = torch.randn(B, H, T, D, dtype=dtype)
        hold(run(attend, fused), run(kernels.attention.reference, fused.to(f64)), dtype)
    agree([strided(2, 3, 19, 24) for _ in range(3)])
    # a gradient that is one number everywhere has strides of 0
    q, k, v = random(1, 1, 1, 9, 16)
    up = torch.ones((), dtype=f64).expand(q.shape)
    expected = with_gradients(kernels.attention.reference, (q, k, v), up)
    narrow = [x.float() for x in (q, k, v)]
    leaves = [x.requires_grad_() for x in narrow]
    hold([expected[0], *torch.autograd.grad(attend(*leaves).sum(), leaves)], expected, fp32)


def test_empty_batch_and_no_queries():
    agree(random(0, 3, 1, 9, 16))
    agree([torch.randn(2, 2, 0, 16), *torch.randn(2, 2, 1, 5, 16)])
    assert attend(*(torch.randn(0, 2, 4, 8) for _ in range(3))).shape == (0, 2, 4, 8)


def test_packed_documents_are_each_document_alone():
    lengths = [1, 60, 30, 2, 39]
    tensors = [x.float() for x in random(1, 2, 1, sum(lengths), 16)]
    up = torch.randn(tensors[0].shape)
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    for window in (0, 25):
        together = with_gradients(attend, tensors, up, doc=doc, window=window)
        parts = [x.split(lengths, 2) for x in (*tensors, up)]
        for i, (*qkv, part) in enumerate(zip(*parts)):
            alone = with_gradients(attend, qkv, part, window=window)
            for a, b in zip(together, alone):
                assert distance(a.split(lengths, 2)[i], b) < 1e-6


def test_nothing_leaks_from_the_future():
    """Keys and values ahead change no bit; huge ones behind a mask make no NaN."""
    q, k, v = (x.float() for x in random(1, 1, 1, 75, 16))
    up = torch.randn(q.shape)
    up[:, :, 50:] = 0
    before = with_gradients(attend, (q, k, v), up)
    k[:, :, 50:], v[:, :, 50:] = 1e4, 1e30
    after = with_gradients(attend, (q, k, v), up)
    for a, b in zip(before, after):
        assert torch.equal(a[:, :, :50], b[:, :, :50])
    assert not after[2][:, :, 50:].any() and not after[3][:, :, 50:].any()


@pytest.mark.parametrize("shift", [150.0, -150.0, 3e4])
def test_scores_far_from_zero(shift):
    """exp overflows at 89 and vanishes at -104; a running maximum that is subtracted does not
    care. The gate is wider: float32 rounds a score of 150 at its seventh digit."""
    q, k, v = random(1, 1, 1, 70, 16)
    q[..., 0], k[..., 0] = shift / 5, 20                    # times 1/sqrt(16): the shift
    up = torch.randn(q.shape)
    expected = with_gradients(kernels.attention.reference, (q, k, v), up)
    got = with_gradients(attend, [x.float() for x in (q, k, v)], up)
    for a, b in zip(got, expected):
        assert distance(a, b) < abs(shift) * 1e-6


def test_the_same_input_gives_the_same_gradient():
    tensors = [x.float() for x in random(1, 4, 1, 70, 16)]
    up = torch.randn(tensors[0].shape)
    first, again = (with_gradients(attend, tensors, up) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


# ----------------------------------------------------------------------- tokens over a cache

# (B, H, Hkv, T, S, D) and the options; positions: where the first query of each row stands
FEW = {
    "one token": ((2, 4, 4, 1, 300, 16), {}),
    "a group reads its keys once": ((1, 8, 2, 1, 150, 64), {}),
    "three tokens": ((2, 4, 2, 3, 200, 80), {}),
    "window": ((2, 2, 1, 2, 300, 16), dict(window=33)),
    "ragged rows": ((3, 4, 2, 1, 300, 16), dict(positions=[0, 130, 299])),
    "ragged rows, window, softcap": ((3, 2, 1, 2, 300, 16),
                                     dict(positions=[3, 130, 298], window=40, softcap=2.0)),
    "documents": ((2, 2, 1, 2, 300, 16), dict(doc=[170, 40])),
    "one key": ((2, 2, 1, 1, 1, 16), {}),
    "fewer keys than a tile": ((1, 2, 1, 4, 9, 128), dict(scale=0.5)),
}


@pytest.mark.parametrize("name", FEW)
def test_a_few_tokens_over_a_cache(name, monkeypatch):
    """Without gradients the keys are split between programs and the parts joined; parts whose
    keys are all masked weigh nothing."""
    (B, H, Hkv, T, S, D), options = FEW[name]
    if "positions" in options:
        options = dict(options, positions=torch.tensor(options["positions"])[:, None]
                       + torch.arange(T))
    if "doc" in options:
        options = dict(options, doc=documents(B, S, options["doc"]))
    used, few = [], triton_attention.attend_few
    monkeypatch.setattr(triton_attention, "attend_few", lambda *a: used.append(1) or few(*a))
    for dtype in (fp32, bf16):
        q, k, v = (x.to(dtype) for x in random(B, H, Hkv, T, D, S=S))
        # a cache holds more room than keys, (B, S, Hkv, D) in memory
        k, v = (torch.cat((x.transpose(1, 2), torch.full((B, 7, Hkv, D), math.nan, dtype=dtype)),
                          1)[:, :S].transpose(1, 2) for x in (k, v))
        with torch.no_grad():
            y = attend(q, k, v, **options)
        expected = kernels.attention.reference(*(x.to(f64) for x in (q, k, v)), **options)
        hold([y], [expected], dtype)
    assert len(used) == 2, "the kernel for a few tokens was not used"


# ---------------------------------------------------------------- in a program that trains

def test_dropout_keeps_the_mean_and_repeats_its_mask_in_the_backward():
    """With v the identity the output is the dropped weights, so the mask is read from it; the
    gradients are those of the softmax written out in float64 with that mask."""
    B, H, T, p = 2, 2, 80, 0.25
    eye = torch.eye(T).expand(B, H, T, T)
    below = torch.ones(T, T).tril().bool()
    for dtype in (fp32, bf16):
        q, k, v = (x.to(dtype) for x in (*torch.randn(2, B, H, T, T), eye))
        up = torch.randn(B, H, T, T, dtype=dtype)
        got = with_gradients(attend, (q, k, v), up, dropout_p=p)
        masks = []

        def formula(q, k, v):
            score = (q @ k.transpose(-1, -2) * T ** -0.5).masked_fill(~below, -math.inf)
            weights = torch.softmax(score, -1)
            masks.append((got[0] != 0) | (weights.to(dtype) == 0))
            return (weights * masks[-1] / (1 - p)) @ v
        expected = with_gradients(formula, [x.to(f64) for x in (q, k, v)], up)
        hold(got, expected, dtype)
        live = below.expand(B, H, T, T)
        rate = 1 - masks[0][live].double().mean()
        assert abs(rate - p) < 4 * math.sqrt(p / live.sum())
        # no two heads or rows of the batch share a mask
        flat = masks[0].flatten(0, 1)[:, below]
        assert all((flat[a] != flat[b]).any() for a in range(4) for b in range(a))


def test_dropout_follows_the_seed():
    q, k, v = (x.float() for x in random(1, 1, 1, 20, 16))

    def draw(seed):
        torch.manual_seed(seed)
        return attend(q, k, v, dropout_p=0.5)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_autocast_computes_in_the_half_type_and_returns_float32_gradients():
    tensors = [x.float() for x in random(1, 2, 1, 37, 16)]
    up = torch.randn(tensors[0].shape)
    expected = with_gradients(kernels.attention.reference, [x.to(f64) for x in tensors], up)
    with torch.autocast("cpu", dtype=bf16):
        got = with_gradients(attend, tensors, up)
    assert [x.dtype for x in got] == [bf16, fp32, fp32, fp32]
    hold(got, expected, bf16)


def test_activation_checkpointing_gives_the_same_gradients():
    """Dropout included: the recomputed forward draws the mask of the first."""
    tensors = [x.float() for x in random(1, 2, 1, 37, 16)]
    up = torch.randn(tensors[0].shape)
    for p in (0.0, 0.3):
        results = []
        for form in (attend, lambda *a, **kw: checkpoint(attend, *a, use_reentrant=False, **kw)):
            torch.manual_seed(1)
            results.append(with_gradients(form, tensors, up, dropout_p=p))
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_only_some_inputs_learn():
    """A frozen key projection must cost no error: None where no gradient is asked for."""
    q, k, v = (x.float() for x in random(1, 2, 1, 9, 16))
    v.requires_grad_()
    attend(q, k, v).sum().backward()
    assert q.grad is None and k.grad is None and v.grad.isfinite().all()


# ------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("change, options, words", [
    (lambda q, k, v: (torch.randn(1, 2, 3, 512),) * 3, {}, "head_dim up to 256.*512"),
    (lambda q, k, v: (q.double(), k.double(), v.double()), {}, "float64"),
    (lambda q, k, v: (q, k, v), dict(scale=-0.5), "scale must be positive.*-0.5"),
    (lambda q, k, v: (q, k[:, :, :5], v), {}, "shapes do not fit"),
    (lambda q, k, v: (q, k[..., :8], v), {}, "shapes do not fit"),
    (lambda q, k, v: (q[:, :3], k, v), {}, "shapes do not fit"),
    (lambda q, k, v: (q, k[:, :, :2], v[:, :, :2]), {}, "shapes do not fit"),
    (lambda q, k, v: (q, k[:1], v[:1]), {}, "shapes do not fit"),
    (lambda q, k, v: (q, k, v), dict(doc=torch.zeros(2, 5)), "shapes do not fit"),
    (lambda q, k, v: (q, k, v), dict(positions=torch.zeros(2, 8)), "shapes do not fit"),
])
def test_what_does_not_fit_is_one_sentence(change, options, words):
    """A kernel that took these would read memory that is not its own."""
    with pytest.raises(UserError, match=words) as error:
        attend(*change(torch.randn(2, 4, 9, 16), *torch.randn(2, 2, 2, 9, 16)), **options)
    assert "\n" not in str(error.value)
