"""Mixture of experts in training: who learns from what, who is counted, and across ranks."""
import math

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import kernels
import train
from benchmarks.training import EXAMPLES
from config import UserError, configure
from model import ModelConfig, Transformer
from runs import (assert_same_run, close, curve, last, log, quiet_machine,  # noqa: F401
                  ranks, weights)
from test_train import CALM    # noqa: F401
from train_base import data, fork, forks, go, go_on    # noqa: F401
from training import router
from training.batch import count_targets

SMALL = dict(vocab_size=61, block_size=32, n_layer=2, n_head=2, n_embd=32, num_experts=4,
             moe_intermediate_size=16)


def make(name="qwen3_moe", **changes):
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_family(name, **{**SMALL, **changes})).train()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model


def some_ids(*shape):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


def lm_loss(model, ids, **how):
    return model(ids, head=lambda h, w: kernels.linear_cross_entropy(h, w, ids), **how)


def gates(model):
    return [p.grad for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]


# ---------------------------------------------------------------------------- the router

def test_a_top_1_router_learns_from_the_language_models_loss():
    """family() does not renormalise one share: its gradient would be zero, and is, where asked."""
    model = make(num_experts_per_tok=1)
    assert not model.config.norm_topk_prob
    lm_loss(model, some_ids(2, 24)).backward()
    learnt = [g.norm().item() for g in gates(model)]
    assert min(learnt) > 1e-2, learnt
    dead = Transformer(ModelConfig(**{**vars(model.config), "norm_topk_prob": True})).train()
    dead.load_state_dict(model.state_dict())
    lm_loss(dead, some_ids(2, 24)).backward()
    assert max(g.norm().item() for g in gates(dead)) < 1e-4 * min(learnt)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe"])
def test_every_router_and_expert_that_was_chosen_learns(name):
    model = make(name)
    lm_loss(model, some_ids(2, 24)).backward()
    assert all(g.norm() > 1e-3 for g in gates(model))
    for key, p in model.named_parameters():
        if p.ndim == 3:
            assert p.grad.shape == p.shape and p.grad.flatten(1).norm(dim=1).min() > 1e-4, key


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_no_token_is_dropped_however_uneven_the_load(form):
    """All tokens to one expert: the result is that expert's MLP for each of them."""
    torch.manual_seed(0)
    x, g, u = torch.randn(50, 8), torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    d, chosen, share = torch.randn(4, 8, 6), torch.full((50, 1), 2), torch.rand(50, 1)
    before = kernels.use(form)
    try:
        y = kernels.moe(x, chosen, share, g, u, d)
    finally:
        kernels.use(before)
    expected = share * (torch.nn.functional.silu(x @ g[2].T) * (x @ u[2].T) @ d[2].T)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_an_expert_without_tokens_has_a_gradient_of_zeros():
    """Not none: DDP would wait for it for ever."""
    torch.manual_seed(0)
    stacks = [torch.randn(4, *s, requires_grad=True) for s in ((6, 8), (6, 8), (8, 6))]
    kernels.moe(torch.randn(5, 8), torch.tensor([[0], [2], [2], [0], [0]]), torch.rand(5, 1),
                *stacks).sum().backward()
    for p in stacks:
        assert p.grad[[1, 3]].abs().max() == 0 and p.grad[[0, 2]].flatten(1).norm(dim=1).min() > 0


def test_the_correction_bias_counts_for_the_choice_and_not_for_the_share():
    model = make("glm4_moe", first_k_dense_replace=0, n_layer=1, n_shared_experts=0)
    layer, x = model.model.layers.get_submodule("0").mlp, torch.randn(1, 6, 32)
    _, before = layer(x)
    with torch.no_grad():
        layer.gate.e_score_correction_bias[3] = 10.0
    _, after = layer(x)
    assert (after["chosen"] == 3).any(-1).all() and torch.equal(before["scores"], after["scores"])
    assert not layer.gate.e_score_correction_bias.requires_grad


# ---------------------------------------------------------------- balance and z loss, by oracles

def test_an_even_load_has_the_least_balance_loss():
    """k; what it is otherwise, transformers says: tests/training/test_statistics.py."""
    even = {"logits": torch.zeros(1, 4, 4), "scores": torch.full((1, 4, 4), 0.25),
            "chosen": torch.tensor([[[0, 1], [2, 3], [0, 1], [2, 3]]])}
    batch = {"ids": some_ids(1, 4), "targets": some_ids(1, 4)}
    _, metrics = router.compute_losses(train.Config(), [even], batch, count_targets)
    assert metrics["balance"].item() / 4 == pytest.approx(2)


@pytest.mark.parametrize("aux", [dict(router_aux_loss_coef=1.0), dict(router_z_loss_coef=1.0)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_routers_losses_reach_the_gradient_with_their_weight(aux, checkpointing):
    """The gradient of train's sum is that of the language model + tokens x coefficient x mean."""
    cfg = train.Config(**{"router_aux_loss_coef": 0.0, "router_sequence_wise": True, **aux})
    model, ids = make(), some_ids(2, 24)
    batch = {"ids": ids, "targets": torch.where(torch.rand(ids.shape) < 0.3, -1, ids)}
    batch["targets"][batch["targets"] < 0] = -100
    model.checkpointing = checkpointing
    total, count, metrics = train.next_token_loss(cfg)(model, batch)
    got = torch.autograd.grad(total, [model.model.embed_tokens.weight])[0]
    model.checkpointing = False
    value, routes = model(ids, router=True, head=lambda h, w: kernels.linear_cross_entropy(
        h, w, batch["targets"]))
    by_row = [load_balancing_loss_func((seen["logits"][b],), 4, 2) for seen in routes
              for b in range(2)]
    z = [torch.logsumexp(seen["logits"], -1).square().mean() for seen in routes]
    extra = torch.stack(by_row if "router_aux_loss_coef" in aux else z).mean()
    expected = torch.autograd.grad(value + count * extra, [model.model.embed_tokens.weight])[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    chosen = torch.stack([torch.bincount(seen["chosen"].flatten(), minlength=4)
                          for seen in routes])
    assert torch.equal(metrics["load"], chosen.float()) and metrics["load"].sum() == 2 * 2 * 48
    with torch.no_grad():                               # and evaluation is the language model's
        assert train.next_token_loss(cfg)(model, batch)[0].item() == pytest.approx(value.item())


def test_a_softcapped_models_loss_is_that_of_its_logits():
    """Gemma 2 caps its logits: training on the bare ones would teach another distribution."""
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig.from_family(
            "gemma2",
            **{**SMALL, "num_experts": 0, "sliding_window": 8, "final_logit_softcapping": 2.0},
        )
    )
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    ids = some_ids(2, 24)
    total, count, _ = train.next_token_loss(train.Config())(model, {"ids": ids, "targets": ids})
    expected = torch.nn.functional.cross_entropy(model.logits(ids).flatten(0, 1), ids.flatten())
    assert (total / count).item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.logits(ids).abs().max() <= 2.0


# --------------------------------------------------------------------------------- whole runs

MIXTURE = ["--family=glm4_moe", "--num_experts=16", "--num_experts_per_tok=2", "--n_layer=3",
           "--moe_intermediate_size=16"]


@pytest.mark.parametrize("flags", [
    ["--router_aux_loss_coef=0"], ["--router_aux_loss_coef=0.1", "--router_sequence_wise=1"],
    ["--router_aux_loss_coef=0.1"]], ids=["bias alone", "of each row", "of the batch"])
def test_one_rank_is_three_ranks_with_experts_that_saw_no_token(go, fork, tmp_path, flags):
    """4 tokens a row for 16 experts, most of which stay idle in it; ranks have 1, 1 and 2 rows."""
    rows = ["--block_size=4", "--batch_size=1", "--gradient_accumulation_steps=4", CALM,
            "--max_iters=12", "--eval_interval=6", *MIXTURE, *flags]
    one, two = go("one", *rows, "--batch_size=4", "--gradient_accumulation_steps=1"), (
        tmp_path / "two")
    outcomes = [r.wait() for r in ranks(fork, 3, *rows, f"--out_dir={two}")]
    assert [o[0] for o in outcomes] == [0, 0, 0], outcomes
    assert min(curve(one, "idle_experts")) > 0
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    assert torch.equal(weights(last(one))[bias], weights(last(two))[bias])
    close(one, two)
    for key in ("idle_experts", "load_max"):            # counted over all ranks
        assert curve(one, key) == curve(two, key)
    assert np.allclose(curve(one, "balance"), curve(two, "balance"))


def test_a_mixture_resumes_bit_for_bit_with_its_bias(go):
    flags = [*MIXTURE, "--router_bias_rate=0.05", "--optimizer=muon"]
    straight = go("straight", *flags)
    halves = go("halves", *flags, "--max_iters=10", "--lr_decay_iters=20")
    go_on(halves, "--max_iters=20")
    assert_same_run(straight, halves)
    bias = weights(last(straight))["model.layers.1.mlp.gate.e_score_correction_bias"]
    # twenty steps of 0.05 up or down, and none where the load was even
    assert bias.abs().max() > 0.05
    assert (bias / 0.05 - (bias / 0.05).round()).abs().max() < 1e-3


@pytest.mark.parametrize("how", [["--router_aux_loss_coef=0.2", "--router_bias_rate=0"],
                                 ["--router_aux_loss_coef=0", "--router_bias_rate=0.02"]])
def test_balance_loss_and_bias_each_even_the_load_out(go, how):
    flags = [*MIXTURE, "--num_experts=8", "--max_iters=60", "--batch_size=8"]
    none = go("none", *flags, "--router_aux_loss_coef=0", "--router_bias_rate=0")
    some = go("some", *flags, *how)
    assert np.mean(curve(some, "load_max")[-10:]) < 0.8 * np.mean(curve(none, "load_max")[-10:])


def test_the_log_of_a_dense_model_has_no_load(go):
    assert not {"load_max", "balance", "idle_experts"} & set(log(go("dense", "--max_iters=2"))[0])


# every example of a family learns, as it stands but for its length and its data
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_each_family_trains_to_a_falling_loss(data, tmp_path, name):
    from transformers import AutoModelForCausalLM
    import checkpoint
    out = tmp_path / name
    train.main(configure(train.Config, [
        "config/tiny.py", f"--family={name}", *EXAMPLES[name].split(), f"--dataset={data}",
        f"--out_dir={out}", "--max_iters=25",
        "--eval_interval=25", "--eval_iters=2", "--batch_size=2", "--block_size=64",
        "--log_interval=1", "--device=cpu", "--dtype=float32"]))
    losses = curve(out)
    assert losses[0] == pytest.approx(math.log(290), abs=0.6)
    assert np.mean(losses[-5:]) < losses[0] - 1.5, losses
    # and what it wrote is the family's own file
    ids = some_ids(2, 40)
    theirs = AutoModelForCausalLM.from_pretrained(last(out), dtype=torch.float32)
    with torch.no_grad():
        other = theirs(ids).logits
    ours = checkpoint.load_model(last(out), "cpu").logits(ids)
    assert (ours - other).norm() / other.norm() < 1e-5
    kind = {"gemma3": "gemma3_text", "minicpm": "granite"}.get(name, name)
    assert theirs.config.model_type == kind


def test_more_experts_a_token_than_there_are_is_one_sentence():
    with pytest.raises(UserError, match="num_experts_per_tok 9 of num_experts 4"):
        make(num_experts_per_tok=9)
