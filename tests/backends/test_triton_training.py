"""Whole training steps with the Triton kernels, in the interpreter: the dispatch, every operation
of a model at once, the optimizer, and what surrounds them (checkpointing, documents, mixtures)."""
import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest                                           # noqa: E402
import torch                                            # noqa: E402

import kernels                                          # noqa: E402
from config import UserError                            # noqa: E402
from training.machine import join_ranks                          # noqa: E402
from model import ModelConfig, Transformer              # noqa: E402
from kernels import clip_grad_norm                                # noqa: E402
from training.optim import Optimizer                              # noqa: E402
from families import SCRATCH

V, T = 31, 16
# small: the interpreter takes a millisecond for what a GPU does in a microsecond
SHAPE = dict(vocab_size=V, block_size=T, n_layer=1, n_head=2, n_embd=16)
KINDS = {
    "gpt2": dict(SCRATCH["gpt2"].flags, **SHAPE),
    "llama": dict(SCRATCH["llama"].flags, **SHAPE, n_kv_head=1),
    "gemma": dict(SCRATCH["gemma3"].flags, **SHAPE, n_kv_head=1, head_dim=16, sliding_window=5),
    "mixture": dict(
        SCRATCH["qwen3_moe"].flags,
        **SHAPE,
        n_kv_head=1,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    ),
}


@pytest.fixture(autouse=True)
def as_it_was():
    before = kernels.use("auto")
    yield
    kernels.use(before)


def train(form: str, kind: str, steps: int, optimizer: str = "adamw", documents: bool = False,
          **changes) -> list[float]:
    """The losses of a run that learns a row of random tokens by heart."""
    kernels.use(form)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**KINDS[kind], **changes})).train()
    rule = Optimizer(model.named_parameters(), optimizer, 0.01, 0.9, 0.95, weight_decay=0.1,
                     muon_learning_rate=0.02)
    ids = torch.randint(0, V, (1, T + 1))
    doc = (torch.arange(T) // 7).unsqueeze(0) if documents else None
    losses = []
    for _ in range(steps):
        loss = model(ids[:, :-1], doc=doc, head=lambda h, w: kernels.linear_cross_entropy(
            h, w, ids[:, 1:], z_loss=1e-4, softcap=model.config.final_logit_softcapping))
        loss.backward()
        clip_grad_norm(rule.gradients(), 1.0, 1 / ids[:, 1:].numel())
        rule.step(1.0)
        rule.zero_grad()
        losses.append(loss.item() / ids[:, 1:].numel())
    return losses


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


def test_fifty_steps_are_the_same_in_every_form():
    """Errors of a kernel that its own test lets pass would add up here."""
    losses = {form: train(form, "llama", 50) for form in ("reference", "torch", "triton")}
    assert losses["reference"][-1] < 0.7 * losses["reference"][0]
    assert apart(losses["torch"], losses["reference"]) < 1e-3
    assert apart(losses["triton"], losses["reference"]) < 1e-3


@pytest.mark.parametrize("kind, options", [
    ("gpt2", {}), ("gemma", {}), ("mixture", {}), ("llama", dict(documents=True, optimizer="muon")),
    ("gpt2", dict(activation="relu2")), ("llama", dict(rope_interleaved=True, rope_theta=100.0)),
    ("llama", dict(n_head=2, n_kv_head=1, head_dim=20, partial_rotary_factor=0.5))], ids=str)
def test_a_few_steps_of_every_kind_of_model(kind, options):
    assert apart(train("triton", kind, 2, **options), train("reference", kind, 2, **options)) < 1e-4


def test_activation_checkpointing_changes_nothing(monkeypatch):
    plain = train("triton", "llama", 2)
    real = Transformer.train

    def checkpointed(self, mode=True):
        self.checkpointing = True
        return real(self, mode)
    monkeypatch.setattr(Transformer, "train", checkpointed)
    assert apart(train("triton", "llama", 2), plain) < 1e-6


def one_rank(rank: int, folder: str) -> None:
    """A backward of half of the rows under DDP; rank 0 saves the mean gradient."""
    join_ranks("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    grads = gradients(slice(rank, rank + 1), torch.nn.parallel.DistributedDataParallel)
    if rank == 0:
        torch.save(grads, f"{folder}/grads.pt")
    torch.distributed.destroy_process_group()
    # gloo's threads are over: one left running aborts the process, now and then, at its end
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in names), names


def gradients(rows: slice, wrap=lambda model: model) -> list[torch.Tensor]:
    kernels.use("triton")
    torch.manual_seed(0)
    model = wrap(Transformer(ModelConfig(**KINDS["llama"])).train())
    ids = torch.randint(0, V, (2, T + 1))[rows]
    model(ids[:, :-1], head=lambda h, w: kernels.linear_cross_entropy(h, w, ids[:, 1:])).backward()
    return [p.grad for p in model.parameters()]


def test_two_ranks_have_the_gradient_of_one(tmp_path):
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    shared = torch.load(tmp_path / "grads.pt", weights_only=True)
    for a, b in zip(shared, gradients(slice(0, 2))):
        torch.testing.assert_close(2 * a, b, rtol=1e-4, atol=1e-5)


def test_every_operation_of_a_step_runs_in_triton(monkeypatch):
    """A form that is missing falls back in silence: here it may not, linear (cuBLAS) apart."""
    kernels.ready("triton")
    for name, operation in kernels.OPERATIONS.items():
        if "triton" in operation.implementations:
            for other in ("torch", "cpu"):
                if other in operation.implementations:
                    monkeypatch.setitem(operation.implementations, other, None)
    wanted = """embedding rms_norm layer_norm rope gelu silu relu relu2 glu dropout softmax linear
    attention cross_entropy linear_cross_entropy linear_kl moe adamw muon clip_grad_norm"""
    assert {
        n for n in wanted.split() if "triton" not in kernels.OPERATIONS[n].implementations
    } == set()


def test_a_cpu_tensor_without_the_interpreter_is_one_sentence(monkeypatch):
    from backends import triton_common
    kernels.use("triton")
    monkeypatch.setattr(triton_common, "INTERPRETED", False)
    with pytest.raises(UserError, match="need a GPU"):
        kernels.softmax(torch.zeros(2, 3))
