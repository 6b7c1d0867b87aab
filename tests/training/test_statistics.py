"""What a run says and learns does not depend on how a batch is cut: router statistics, validation
losses, epochs, FLOPs, and what is frozen. The right values are transformers', torch.optim's, those
of torch.utils.flop_counter, or autograd's over the whole batch at once."""
import contextlib
import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import classify
from training.batch import mask_valid_tokens
import distill
import dpo
import kernels
from layers import lora as lora_layers
import sft
import train
from config import UserError, configure
from data import chats, loader
from training.machine import Machine
from model import ModelConfig, Transformer
from training.optim import Optimizer
from runs import Grads, quiet_machine       # noqa: F401
from dpo_base import base, pairs, words    # noqa: F401
from test_dpo import packed    # noqa: F401
from training import log, router

CPU = Machine(torch.device("cpu"), torch.float32)
SMALL = dict(vocab_size=61, block_size=48, n_layer=2, n_head=2, n_embd=32)
EXPERTS = dict(num_experts=4, moe_intermediate_size=16)


def make(name="qwen3_moe", **changes):
    torch.manual_seed(0)
    experts = EXPERTS if name.endswith("moe") or name == "mixtral" else {}
    model = Transformer(ModelConfig.from_family(name, **{**SMALL, **experts, **changes})).train()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model


def conversations(count, seed=0, longest=20):
    """Rendered conversations of random lengths, whose second half is the answer."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, longest, count)
    return [(rng.integers(0, 61, n), np.arange(n) >= n // 2) for n in lengths]


def valid_of(packed, rows):
    """Mask (rows, T) of what is not padding, from the lengths of the conversations."""
    mask = torch.zeros(len(rows), packed.block_size, dtype=torch.bool)
    for b, row in enumerate(rows):
        mask[b, :sum(len(packed.conversations[i][0]) for i in packed.rows[row])] = True
    return mask


class Rank(Machine):
    """A rank among threads of this process: the sums over ranks are those of real ones."""

    def __init__(self, rank, world, slots, barrier):
        super().__init__(torch.device("cpu"), torch.float32, rank, world)
        self.slots, self.barrier = slots, barrier

    def add(self, t):
        self.slots[self.rank] = t.clone()
        self.barrier.wait(timeout=30)
        t.copy_(sum(self.slots))
        self.barrier.wait(timeout=30)
        return t


def on_ranks(world, work):
    """The results of work(machine) on that many ranks."""
    slots, barrier, results = [None] * world, threading.Barrier(world), [None] * world

    def run(rank):
        try:
            results[rank] = work(Rank(rank, world, slots, barrier))
        except BaseException:
            barrier.abort()
            raise
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert None not in results
    return results


# --------------------------------------------------------------- routers: the global batch's own

def by_hand(logits, valid, chosen, sigmoid):
    """balance of one layer: transformers' where scores are a softmax, else its formula."""
    if not sigmoid:
        return load_balancing_loss_func((logits.flatten(0, 1),), 4, 2, valid.long())
    p = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    f = F.one_hot(chosen, 4).sum(-2)[valid].float().mean(0)
    return 4 * (f * p[valid].mean(0)).sum()


def whole_batch(model, batch, valid, cfg):
    """(loss, balance, load, gradients) by autograd over the global batch in one piece."""
    seen = []
    hooks = [m.register_forward_hook(lambda m, a, out: seen.append(out[1]))
             for m in model.modules() if type(m).__name__ == "MoE"]
    logits = model(batch["ids"], doc=batch["doc"])
    for hook in hooks:
        hook.remove()
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())
    sigmoid = model.config.scoring_func == "sigmoid"
    rows = [slice(b, b + 1) for b in range(len(valid))] if cfg.router_sequence_wise else [slice(9)]
    balance = torch.stack([torch.stack([
        by_hand(s["logits"][r], valid[r], s["chosen"][r], sigmoid) for r in rows]).mean()
        for s in seen]).mean()
    z = torch.stack([torch.logsumexp(s["logits"], -1)[valid].square().mean() for s in seen]).mean()
    total = loss + cfg.router_aux_loss_coef * balance + cfg.router_z_loss_coef * z
    total.backward()
    load = torch.stack([torch.bincount(s["chosen"][valid].flatten(), minlength=4) for s in seen])
    return total.item(), balance.item(), load, {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None}


class Kept(Grads):
    """Keeps the gradients; the routers' bias has none."""

    def step(self, lr_scale=1.0):
        self.last = {n: p.grad.clone() for n, p in self.model.named_parameters()
                     if p.grad is not None}


CUTS = [(1, 9), (1, 4), (1, 1), (2, 2), (3, 1), (4, 2)]         # ranks, batch_size


@pytest.mark.parametrize("name, settings", [
    ("qwen3_moe", {}), ("qwen3_moe", {"router_sequence_wise": True}), ("glm4_moe", {}),
    ("glm4_moe", {"router_aux_loss_coef": 0.0})])
def test_a_step_of_an_moe_model_is_that_of_the_whole_batch_however_it_is_cut(name, settings):
    """Loss, balance, load, bias and all gradients, of rows that are half padding."""
    settings = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.05, **settings}
    data = chats.Packed(conversations(9, longest=40), 9, 80)
    data.rows = [[i] for i in range(9)]
    batch, valid = data.gather(range(9)), valid_of(data, range(9))
    assert 0.5 < (~valid).float().mean() < 0.9 and torch.equal(mask_valid_tokens(batch), valid)
    shape = dict(n_layer=3) if name == "glm4_moe" else {}       # the first of which is dense
    total, balance, load, wanted = whole_batch(make(name, **shape), batch, valid,
                                               train.Config(**settings))

    for world, size in CUTS:
        cfg = train.Config(batch_size=size, block_size=80, grad_clip=0.0, router_bias_rate=0.25,
                           **settings)
        models = [make(name, **shape) for _ in range(world)]

        def step(machine):
            model = models[machine.rank]
            model.no_sync, optimizer = contextlib.nullcontext, Kept(model)
            done = train.take_step(cfg, model, batch, train.next_token_loss(cfg, masked=True),
                                   machine, optimizer, train.State(), False)
            return done, optimizer.last, model
        results = on_ranks(world, step)
        for done, _, model in results:
            assert done.metrics["loss"] == pytest.approx(total, rel=1e-6)
            assert done.metrics["balance"] == pytest.approx(balance, rel=2e-6)
            busiest = (4 * load.amax(-1) / load.sum(-1)).max().item()
            assert done.metrics["load_max"] == pytest.approx(busiest)
            assert done.metrics["idle_experts"] == (load == 0).sum() and done.tokens == valid.sum()
            if name == "glm4_moe":
                moved = [m.gate.e_score_correction_bias for m in model.modules()
                         if type(m).__name__ == "MoE"]
                expected = 0.25 * torch.sign(load.float().mean(-1, keepdim=True) - load)
                assert torch.equal(torch.stack(moved).detach(), expected)
        # DDP's average of the ranks
        got = {n: sum(r[1][n] for r in results) / world for n in wanted}
        scale = torch.cat([g.flatten() for g in wanted.values()]).norm()
        for key, g in wanted.items():
            assert (got[key] - g).norm() < 1e-5 * max(g.norm(), 1e-2 * scale), (world, size, key)


def test_dropout_routes_a_micro_batch_twice_alike(monkeypatch):
    """What is counted ahead is what is learnt from: the same draws, token for token."""
    cfg = train.Config(batch_size=2, block_size=40, router_aux_loss_coef=0.5)
    model, seen = make(dropout=0.3, n_layer=1), []
    moe = model.model.layers.get_submodule("0").mlp
    moe.register_forward_hook(lambda m, a, out: seen.append(out[1]["chosen"]))
    batch = chats.Packed(conversations(13), 6, 40)(0)
    train.take_step(cfg, model, batch, train.next_token_loss(cfg, masked=True), CPU, Grads(model),
                    train.State(), False)
    assert len(seen) == 5                               # 2 and 3 ahead, then all three
    assert torch.equal(seen[0], seen[3]) and torch.equal(seen[1], seen[4])
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("flags", [
    dict(router_aux_loss_coef=0.0), dict(router_sequence_wise=True), dict(batch_size=6)])
def test_nothing_is_counted_ahead_where_nothing_depends_on_it(flags):
    cfg = train.Config(**{"batch_size": 2, "block_size": 40, **flags})
    model, calls = make(n_layer=1), []
    model.register_forward_hook(lambda *a: calls.append(1))
    batch = chats.Packed(conversations(13), 6, 40)(0)
    train.take_step(cfg, model, batch, train.next_token_loss(cfg, masked=True), CPU, Grads(model),
                    train.State(), False)
    assert len(calls) == 6 // cfg.batch_size


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_pairs_of_an_moe_model_are_divided_by_those_of_the_global_batch(words, loss):  # noqa: F811
    """Rows hold one to three pairs: a micro-batch's share of the routers' losses is not theirs."""
    cfg = dpo.Config(loss=loss, grad_clip=0.0, router_aux_loss_coef=0.5, router_z_loss_coef=0.05)
    data = packed(words, pairs(14, 3), 6)
    batch, results = data(0), []
    counts = [int(dpo.count_pairs({k: v[b:b + 1] for k, v in batch.items()})) for b in range(6)]
    assert len(set(counts)) > 1 and counts == [len(data.rows[r]) // 2 for r in (
        [*data.epoch(0), *data.epoch(1)][:6])]
    for size in (6, 4, 1):
        cfg.batch_size = size
        model = make(vocab_size=words.vocab_size, block_size=128)
        optimizer = Grads(model)
        done = train.take_step(cfg, model, batch, dpo.pair_loss(cfg), CPU, optimizer,
                               train.State(), False)
        results.append((done.metrics["loss"], done.metrics["balance"], optimizer.last))
    for value, balance, grads in results[1:]:
        assert (value, balance) == pytest.approx(results[0][:2], rel=1e-6)
        for key, g in results[0][2].items():
            assert (grads[key] - g).norm() < 1e-5 * g.norm() + 1e-7, key


# ------------------------------------------------------------------- what is frozen does not move

@pytest.mark.parametrize(
    "freeze, moves",
    [
        (lambda m: lora_layers.add_lora(m, 2, 4), []),
        (classify.freeze, [2]),
        (lambda m: None, [1, 2]),
    ],
    ids=["lora", "last", "all"],
)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_moves_what_trains_and_nothing_else(freeze, moves, kind):
    cfg = train.Config(batch_size=3, block_size=40, router_bias_rate=0.1, weight_decay=0.5)
    model = make("glm4_moe", n_layer=3)
    freeze(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    biases = [n for n in before if n.endswith("e_score_correction_bias")]
    optimizer = Optimizer(model.named_parameters(), kind, weight_decay=0.5)
    batch = chats.Packed(conversations(13), 6, 40)(0)
    train.take_step(cfg, model, batch, train.next_token_loss(cfg, masked=True), CPU, optimizer,
                    train.State(), False)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert not any(dict(model.named_parameters())[n].requires_grad for n in biases)
    assert {n for n in biases if n in moved} == {f"model.layers.{i}.mlp.gate."
                                                 "e_score_correction_bias" for i in moves}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    # A of an adapter whose B is still 0 has a gradient of zeros; decay moves it all the same
    assert moved - set(biases) == trained


# ---------------------------------------------------------------------------------- validation

@pytest.fixture(scope="module")
def scored(words):                                              # noqa: F811
    """Name -> (model, loss, (batch_size) -> batches) of each kind of validation set."""
    model = make("llama", vocab_size=words.vocab_size, block_size=128).eval()
    talk = chats.Packed(conversations(40), 8, 40)
    text = np.random.default_rng(0).integers(0, 61, 2000)

    class Tokens:
        split = "val"

        def __len__(self):
            return len(text)

        def read(self, start, n):
            return text[start:start + n]
    labels = [(np.append(ids, 60 - len(ids) % 2), np.arange(len(ids) + 1) == len(ids))
              for ids, _ in conversations(40)]
    found = {
        "text": (train.next_token_loss(train.Config()),
                 lambda b: loader.eval_batches(Tokens(), b, 40, 19)),
        "sft": (train.next_token_loss(sft.Config(), masked=True), lambda b: talk.fixed(b, 19)),
        "classes": (classify.class_loss(classify.Config(label_smoothing=0.3), [59, 60]),
                    lambda b: chats.Packed(labels, 8, 40).fixed(b, 19))}
    for kind in ("sigmoid", "kto"):
        cfg, data = dpo.Config(loss=kind), packed(words, pairs(60, 4), 8)
        data.columns["reference"] = dpo.of_conversations(
            make("llama", vocab_size=words.vocab_size, block_size=128, n_layer=1), data, 4, CPU)
        if kind == "kto":
            data.strangers = dpo.strangers_of(data)
            known = dpo.of_conversations(model, data.strangers, 4, CPU)
            # so that z is about 15, and another one of any few pairs
            data.strangers.columns["reference"] = known - 5 * (np.arange(len(known)) % 7)
        found[kind] = (dpo.pair_loss(cfg), lambda b, data=data: data.fixed(b, 13), cfg, data)
    return model, found


@pytest.mark.parametrize("name", ["text", "sft", "classes", "sigmoid", "kto"])
def test_a_validation_loss_does_not_depend_on_batch_size_or_ranks(scored, name):
    model, found = scored
    loss, batches, *more = found[name]
    results = []
    for world, size in ((1, 16), (1, 4), (1, 1), (2, 4), (3, 1), (3, 16)):
        def score(machine):
            mine = copy.deepcopy(model)
            if name == "kto":
                cfg, data = more
                mine_data = copy.copy(data)
                mine_data.baseline = dpo.divergence(dpo.Config(loss="kto", batch_size=size), mine,
                                                    mine_data, machine)
                return train.evaluate(mine, mine_data.fixed(size, 13), loss, machine)
            return train.evaluate(mine, batches(size), loss, machine)
        results += on_ranks(world, score)
    for r in results[1:]:
        assert r == pytest.approx(results[0], rel=1e-6, abs=1e-7), r
    if name == "kto":
        assert results[0]["val_kl"] > 0


def test_the_validation_set_is_as_large_whatever_batch_size_is():
    rows = {script.__name__: {train.eval_rows(script.Config(batch_size=b, eval_iters=5))
                              for b in (1, 4, 16)} for script in (train, sft, dpo, distill)}
    assert all(found == {40} for found in rows.values())


def test_every_script_scores_the_same_rows(tmp_path, base, capfd):      # noqa: F811
    """Through main(): --eval_only at several batch sizes prints one number."""
    (tmp_path / "talk.jsonl").write_text("".join(
        f'{{"prompt": "{a} + {b}?", "response": "it is {a + b}"}}\n' for a in range(9)
        for b in range(9)))
    told = set()
    for size in (16, 3, 1):
        sft.main(configure(sft.Config, [
            f"--init_from={base()}", f"--dataset={tmp_path}/talk.jsonl", "--eval_only=1",
            f"--batch_size={size}", "--eval_iters=2", f"--out_dir={tmp_path}/out", "--device=cpu",
            "--dtype=float32", "--block_size=32"]))
        told.add(capfd.readouterr().out.split()[1])     # of: val_loss 5.6947 val_ppl …
    assert len(told) == 1


# ------------------------------------------------------------------------------------ epochs

@pytest.mark.parametrize("epochs, rows, batch, steps", [
    (1, 11, 8, 2), (1, 16, 8, 2), (2, 11, 8, 3), (0.5, 11, 8, 1), (0.1, 30, 1, 3), (1.1, 10, 1, 11),
    (3, 1, 8, 1), (1, 1, 1, 1), (0.01, 11, 8, 1), (1 / 3, 9, 1, 3), (2.5, 100, 7, 36)])
def test_epochs_are_rounded_up(epochs, rows, batch, steps):
    """So that every row is seen as often as is asked for, with the least steps that do."""
    assert sft.count_steps(epochs, rows, batch) == steps
    assert steps * batch >= epochs * rows * (1 - 1e-9)
    assert steps == 1 or (steps - 1) * batch < epochs * rows


@pytest.mark.parametrize("rows, batch", [(11, 8), (7, 3), (9, 9), (5, 4)])
def test_an_epoch_sees_every_row(rows, batch):
    data = chats.Packed([(np.arange(20), np.ones(20, bool))] * rows, batch, 19)
    assert len(data) == rows
    steps = sft.count_steps(1, rows, batch)
    seen = [int(data.epoch(k // rows)[k % rows]) for k in range(steps * batch)]
    assert set(seen) == set(range(rows))


# ------------------------------------------------------------------------------------- FLOPs

def in_place(c, a, b, *rest, out_shape=None, **kwargs):
    """What the counter does not know: addmm_, which adds an adapter's share to W x in place."""
    return 2 * a[0] * a[1] * b[1]


FROZEN = {
    "nothing": lambda m: None,
    "lora": lambda m: lora_layers.add_lora(m, 2, 4),
    "lora on q_proj": lambda m: lora_layers.add_lora(m, 2, 4, targets="q_proj"),
    "lora on down_proj": lambda m: lora_layers.add_lora(m, 3, 4, targets="down_proj"),
    "lora on the last block": lambda m: lora_layers.add_lora(
        m, 2, 4, targets="layers.2.self_attn.v_proj"
    ),
    "int8 lora": lambda m: lora_layers.add_lora(m, 2, 4, int8=True),
    "two adapters, one on": lambda m: (
        lora_layers.add_lora(m, 2, 4, name="a"),
        lora_layers.add_lora(m, 4, 4, name="b"),
    ),
    "unfreeze=last": classify.freeze,
    "the final norm alone": lambda m: [
        p.requires_grad_(n == "model.norm.weight") for n, p in m.named_parameters()
    ],
    "a norm in the middle": lambda m: [
        p.requires_grad_("1.post_attention_layernorm" in n) for n, p in m.named_parameters()
    ],
    "the embedding alone": lambda m: [
        p.requires_grad_("embed" in n) for n, p in m.named_parameters()
    ],
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "glm4_moe"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_flops_are_those_that_pytorch_counts_with_weights_frozen(name, frozen):
    """What MFU stands on; untied and tied, gated and plain, biases, norms on q and k, experts."""
    # the reference computes every expert for every token: then all are chosen
    shape = dict(num_experts_per_tok=4) if name == "glm4_moe" else {}
    model = make(name, n_layer=3, **shape)
    FROZEN[frozen](model)
    ids = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1))
    how = dict(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    kernels.use("reference")
    with FlopCounterMode(**how) as counter, torch.no_grad():
        model(ids)
    assert counter.get_total_flops() == ids.numel() * model.flops_per_token(24, training=False)
    with FlopCounterMode(**how) as counter:
        model(ids, head=lambda h, w: kernels.linear_cross_entropy(h, w, ids)).backward()
    assert counter.get_total_flops() == ids.numel() * model.flops_per_token(24)


def test_only_targets_meet_the_vocabulary():
    model = make("llama")
    targets = torch.full((2, 24), -100)
    targets[:, -6:] = 7
    batch = {"ids": torch.ones_like(targets), "targets": targets,
             "doc": torch.zeros_like(targets)}
    kernels.use("reference")
    with FlopCounterMode(display=False) as counter:
        train.next_token_loss(train.Config(), masked=True)(model, batch)[0].backward()
    assert counter.get_total_flops() == train.count_flops(model, 24, 48, 12)


def test_a_classifiers_head_is_the_rows_of_its_labels():
    model, ids = make("llama"), torch.ones(2, 24, dtype=torch.int64)
    batch = {"ids": ids, "targets": torch.full_like(ids, -100), "doc": torch.zeros_like(ids)}
    batch["targets"][:, -1] = 59
    loss = classify.class_loss(classify.Config(), [58, 59, 60])
    kernels.use("reference")
    with FlopCounterMode(display=False) as counter:
        loss(model, batch)[0].backward()
    assert counter.get_total_flops() == loss.count_flops(model, 24, 48, 2)


@pytest.mark.parametrize("settings", [{}, {"hidden": 1.0}])
def test_a_students_step_counts_its_teacher(settings, monkeypatch):
    cfg = distill.Config(temperature=1.0, **settings)
    student, teacher = make("llama"), make("llama", n_embd=48, n_layer=3).requires_grad_(False)
    matching = distill.Matching(1, 32, 48, 0) if settings else None
    monkeypatch.setattr(distill, "is_text", lambda dataset: False)
    loss = distill.distillation_loss(cfg, student, teacher, matching, 1.0)
    ids = torch.ones(2, 24, dtype=torch.int64)
    batch = {"ids": ids, "targets": torch.where(torch.arange(24) > 12, ids, -100),
             "doc": torch.zeros_like(ids)}
    kernels.use("reference")
    with FlopCounterMode(display=False) as counter:
        loss(student, batch)[0].backward()
    assert counter.get_total_flops() == loss.count_flops(student, 24, 48, 22)


def test_tokens_a_second_and_mfu_leave_padding_out(monkeypatch, tmp_path):
    """A row of 40 with 12 tokens has 12: the log says what was learnt from."""
    said = []
    monkeypatch.setattr(log, "utilisation", lambda flops, device: said.append(flops))
    monkeypatch.setattr(train.time, "perf_counter", iter(range(1000)).__next__)
    cfg = train.Config(max_iters=1, batch_size=2, block_size=40, out_dir=str(tmp_path))
    talk = [(np.arange(12), np.arange(12) >= 6), (np.arange(30), np.arange(30) >= 20)]
    rows = []
    monkeypatch.setattr(train.Journal, "record", lambda self, **row: rows.append(row))
    model = make("llama")
    monkeypatch.setattr(train, "save", lambda *a: None)
    train.fit(cfg, model, chats.Packed(talk, 2, 40), train.next_token_loss(cfg, masked=True), CPU)
    seconds = rows[0]["seconds"]
    assert rows[0]["tokens_per_second"] * seconds == pytest.approx(42)
    assert said[0] * seconds == pytest.approx(train.count_flops(model, 40, 42, 16))


# ------------------------------------------------------------------------ settings have effect

@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
@pytest.mark.parametrize("decay", [0.0, 0.1, 2.0])
def test_muon_decays_and_scales_as_torch_does(form, shape, decay):
    """torch.optim.Muon orthogonalises in bfloat16: a hundredth of a step; decay is exact."""
    kernels.use(form)
    draw = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape, generator=draw))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizer = Optimizer([("model.layers.0.mlp.up_proj.weight", ours)], "muon", 0.3,
                          weight_decay=decay, muon_learning_rate=0.05)
    oracle = torch.optim.Muon([theirs], lr=0.05, weight_decay=decay, momentum=0.95)
    start = ours.detach().clone()
    for step in range(3):
        grad = torch.randn(shape, generator=draw)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step(0.5)
        oracle.param_groups[0]["lr"] = 0.025
        oracle.step()
    gap, moved = (ours - theirs).norm(), (theirs - start).norm()
    assert gap < 0.02 * moved, gap / moved
    if decay:
        quiet = torch.nn.Parameter(start.clone())
        quiet.grad = torch.zeros(shape)
        Optimizer([("model.layers.0.mlp.up_proj.weight", quiet)], "muon", 0.3, weight_decay=decay,
                  muon_learning_rate=0.05).step()
        torch.testing.assert_close(quiet.detach(), start * (1 - 0.05 * decay))


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.3}, {"z_loss": 0.5},
                                      {"label_smoothing": 0.1, "z_loss": 0.2}])
def test_a_classifier_is_smoothed_as_pytorch_smooths(settings):
    model, rows = make("llama"), [17, 40, 59]
    ids = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(1))
    batch = {"ids": ids, "targets": torch.full_like(ids, -100), "doc": torch.zeros_like(ids)}
    batch["targets"][:, -1] = torch.tensor([59, 17, 40])
    loss = classify.class_loss(classify.Config(**settings), rows)
    total, count, metrics = loss(model, batch)
    z = model(ids)[:, -1][:, rows].float()
    expected = F.cross_entropy(z, torch.tensor([2, 0, 1]), reduction="sum",
                               label_smoothing=settings.get("label_smoothing", 0.0))
    plain = F.cross_entropy(z, torch.tensor([2, 0, 1]), reduction="sum")
    expected = expected + settings.get("z_loss", 0.0) * torch.logsumexp(z, -1).square().sum()
    assert count == 3 and total.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():                                   # a score is that of the labels alone
        assert loss(model, batch)[0].item() == pytest.approx(plain.item(), rel=1e-5)


def test_a_classifier_of_experts_balances_them():
    model = make("qwen3_moe")
    ids = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(1))
    batch = {"ids": ids, "targets": torch.full_like(ids, -100), "doc": torch.zeros_like(ids)}
    batch["targets"][:, -1] = 59
    values = [classify.class_loss(classify.Config(router_aux_loss_coef=c), [17, 59])(model, batch)
              for c in (0.0, 0.5)]
    balance = values[1][2]["balance"]
    assert (values[1][0] - values[0][0]).item() == pytest.approx(0.5 * balance.item(), rel=1e-4)
    assert balance > 3 * 1.5


def test_dpo_refuses_a_penalty_that_its_losses_lack():
    for loss in dpo.LOSSES:
        with pytest.raises(UserError, match="--z_loss=0.5 .*leave it out"):
            dpo.check(dpo.Config(loss=loss, z_loss=0.5, block_size=32, max_iters=1))


def test_the_router_module_knows_padding_as_the_packer_does():
    """valid_tokens against the lengths of what was packed; text has no padding at all."""
    for seed in range(5):
        data = chats.Packed(conversations(9, seed, 30), 4, 33, pad=seed)
        rows = list(range(len(data)))
        batch = data.gather(rows)
        assert torch.equal(mask_valid_tokens(batch), valid_of(data, rows))
        whole = router.GlobalBatch(batch)
        assert whole.tokens == valid_of(data, rows).sum() and whole.rows == len(rows)
    ids = torch.ones(2, 8, dtype=torch.int64)
    assert mask_valid_tokens({"ids": ids, "targets": ids}).all()
    assert mask_valid_tokens({"ids": ids, "targets": ids, "doc": ids.cumsum(1).int()}).all()
