"""dpo.py as its user meets it: the losses are trl's, the reference is asked once, a run is one run.

Weights are random, of the policy and of the reference: nothing here depends on what they know.
"""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import checkpoint
import dpo
import train
from config import UserError
from data import chats
from training.machine import Machine
from runs import (Grads, assert_same_run, close, curve, last, quiet_machine, ranks, weights)
from dpo_base import forks    # noqa: F401
from dpo_base import alone, base, fork, go, go_on, pairs, words     # noqa: F401
from dpo_base import taste    # noqa: F401
assert quiet_machine                # a fixture that every test here uses by itself
CPU = Machine(torch.device("cpu"), torch.float32)


def packed(words, records, batch_size=4, block_size=128, seed=3):
    rendered = chats.render_pairs(words, records, None, block_size + 1)
    return dpo.Pairs(rendered, batch_size, block_size, seed=seed)


def judged(path, batches):
    """A model, with what it thinks of every conversation put beside the batches."""
    model = checkpoint.load_model(path, "cpu")
    batches.columns["reference"] = dpo.of_conversations(model, batches, 4, CPU)
    return model

# --------------------------------------------------------- packed rows are conversations alone


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt2", "gemma2"])
def test_log_probabilities_of_packed_pairs_are_those_of_each_answer_alone(base, words, name):
    """Document by document, against a loop over tokens; of the batch as of the whole data."""
    batches = packed(words, pairs(30, 5))
    model = judged(base(name), batches)
    assert len(batches) < 20                                # several in a row
    batch = batches.gather(range(6))
    with torch.no_grad():
        sums, sizes, _ = dpo.log_probs(model, batch, batches.documents)
        for b in range(6):
            for k in range(batches.documents):
                if k >= len(batches.rows[b]):
                    assert sums[b, k] == sizes[b, k] == 0
                    continue
                i = batches.rows[b][k]
                ids, mask = batches.conversations[i]
                assert sums[b, k] == pytest.approx(alone(model, ids, mask).item(), abs=1e-4)
                assert sizes[b, k] == mask.sum()
                assert batches.columns["reference"][i] == pytest.approx(sums[b, k].item(), abs=1e-4)
                assert batch["reference"][b, k] == batches.columns["reference"][i]


def test_of_a_mixture_the_routers_losses_are_added_for_each_pair(base, words):
    """As in trl, loss + coefficient x balance; without them experts may fall idle in DPO."""
    batches = packed(words, pairs(12, 5))
    model = judged(base("qwen3_moe"), batches)
    batch = batches.gather(range(len(batches)))

    def total(**settings):
        return dpo.pair_loss(dpo.Config(**settings))(model, batch)
    bare, count, _ = total(router_aux_loss_coef=0.0)
    whole, _, metrics = total(router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    routes = model(batch["ids"], doc=batch["doc"], router=True, head=lambda h, w: h.sum())[1]
    logits = [seen["logits"].detach().flatten(0, 1) for seen in routes]
    valid, k = torch.zeros_like(batch["ids"], dtype=torch.bool), model.config.num_experts_per_tok
    for row, numbers in zip(valid, batches.rows):           # what follows the pairs is padding
        row[:sum(len(batches.conversations[i][0]) for i in numbers)] = True
    assert not valid.all()
    balance = sum(load_balancing_loss_func((x,), x.shape[1], k, valid.long()).item()
                  for x in logits) / len(logits)
    z = sum(torch.logsumexp(x, -1)[valid.flatten()].square().mean().item()
            for x in logits) / len(logits)
    assert balance > 1 and z > 0 and count == 12
    assert (whole - bare).item() == pytest.approx(12 * (0.5 * balance + 0.25 * z), rel=1e-4)
    assert metrics["balance"].item() == pytest.approx(12 * balance, rel=1e-5)
    assert metrics["load"].sum() == len(logits) * k * valid.sum()
    with torch.no_grad():                                   # a validation loss has none of it
        value, _, metrics = total(router_aux_loss_coef=0.5)
    assert value.item() == pytest.approx(bare.item(), rel=1e-5) and "load" not in metrics

# ------------------------------------------------------------------------ the same as trl

@pytest.fixture(scope="module")
def trl_side(base, words, tmp_path_factory):
    """trl's trainers, and models of our weights in transformers."""
    pytest.importorskip("trl")
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    def load(seed):
        return AutoModelForCausalLM.from_pretrained(base("llama", seed), dtype=torch.float32)
    theirs = AutoTokenizer.from_pretrained(base("llama"))
    theirs.pad_token = theirs.eos_token
    how = dict(output_dir=str(tmp_path_factory.mktemp("trl")), report_to=[], use_cpu=True,
               bf16=False, per_device_train_batch_size=4, gradient_checkpointing=False,
               save_strategy="no")
    few = [{"prompt": r["chosen"][:1], "chosen": r["chosen"][-1:], "rejected": r["rejected"][-1:]}
           for r in pairs(6, 2)]
    dpo_trainer = DPOTrainer(load(2), load(1), DPOConfig(**how), processing_class=theirs,
                             train_dataset=datasets.Dataset.from_list(few))
    few = [{"prompt": r["prompt"], "completion": r["chosen"], "label": bool(k % 2)}
           for k, r in enumerate(few)]
    kto_trainer = KTOTrainer(load(2), load(1), KTOConfig(**how,
                             train_sampling_strategy="sequential"), processing_class=theirs,
                             train_dataset=datasets.Dataset.from_list(few))
    return SimpleNamespace(dpo=dpo_trainer, kto=kto_trainer)


@pytest.fixture(scope="module")
def ours(base, words):
    """(our policy, packed pairs with the reference's opinion of them)."""
    # trl trains on all that follows the prompt, the questions in between as well: last answers
    few = [r for r in pairs(40, 7) if r["chosen"][:-1] == r["rejected"][:-1]][:12]
    batches = packed(words, few)
    judged(base("llama", 1), batches)
    return checkpoint.load_model(base("llama", 2), "cpu"), batches


def splits(conversation):
    """(prompt, answers) as trl cuts them; our mask ends with the answer."""
    ids, mask = conversation
    start, end = int(mask.argmax()), int(np.flatnonzero(mask)[-1]) + 1
    return ids[:start].tolist(), ids[start:end].tolist()


def step_of_ours(ours, z=None, **settings):
    """Mean loss, metrics and gradients of one step on all pairs."""
    model, batches = ours
    model.requires_grad_(True).zero_grad()
    batch = batches.gather(range(len(batches)))
    if z is not None:
        batch["z"] = torch.full((len(batches),), z)
    value, count, metrics = dpo.pair_loss(dpo.Config(**settings))(model, batch)
    (value / count).backward()
    assert count == 12
    return (value / count).item(), {k: (v / count).item() for k, v in metrics.items()}, {
        n: p.grad.clone() for n, p in model.named_parameters()}


def assert_gradients(mine, theirs):
    found = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert mine.keys() == found.keys()
    for name, grad in found.items():
        assert (mine[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


CASES = [("sigmoid", "sigmoid", {}), ("sigmoid_norm", "sigmoid", {"average": True}),
         ("hinge", "hinge", {}), ("ipo", "ipo", {}), ("robust", "robust", {"label_smoothing": 0.2}),
         ("robust", "robust", {})]


@pytest.mark.parametrize("name, loss, more", CASES, ids=lambda c: str(c)[:20])
def test_loss_rewards_and_gradients_are_those_of_trl(trl_side, ours, name, loss, more):
    trainer, beta = trl_side.dpo, 0.3
    trainer.loss_types, trainer.beta = [name], beta
    trainer.label_smoothing = more.get("label_smoothing", 0.0)
    conversations = ours[1].conversations
    examples = [{"prompt_ids": splits(c)[0], "chosen_ids": splits(c)[1],
                 "rejected_ids": splits(r)[1]}
                for c, r in zip(conversations[::2], conversations[1::2])]
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    theirs = trainer._compute_loss(trainer.model, trainer.data_collator(examples), False)
    theirs.backward()
    value, metrics, gradients = step_of_ours(ours, loss=loss, beta=beta, **more)
    assert value == pytest.approx(theirs.item(), rel=1e-4)
    logged = {k: v[0] for k, v in trainer._metrics["train"].items()}
    for mine, key in (("rewards/chosen", "rewards/chosen"), ("margin", "rewards/margins"),
                      ("rewards/rejected", "rewards/rejected"),
                      ("accuracy", "rewards/accuracies")):
        assert metrics[mine] == pytest.approx(logged[key], rel=1e-4, abs=1e-5), mine
    assert_gradients(gradients, trainer.model)


def test_kto_with_its_divergence_is_trls(trl_side, ours, base):
    """z from each prompt with another's answer, and losses with it: pairs are two examples each,
    of which trl takes the mean."""
    trainer, (model, batches) = trl_side.kto, ours
    trainer.beta, trainer.desirable_weight, trainer.undesirable_weight = 0.3, 1.3, 0.7
    conversations = batches.conversations
    examples = []
    for i, c in enumerate(conversations):
        prompt, answer = splits(c)
        other = splits(conversations[i - 2])[1]
        examples.append({"prompt_ids": prompt, "completion_ids": answer, "label": i % 2 == 0,
                         "KL_completion_ids": other})
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    theirs = trainer._compute_loss(trainer.model, trainer.data_collator(examples), False)
    theirs.backward()
    cfg = dpo.Config(loss="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    batches.strangers = dpo.strangers_of(batches)
    judged(base("llama", 1), batches.strangers)
    kl = trainer._metrics["train"]["kl"][0]
    z = dpo.divergence(cfg, model, batches, CPU)(list(range(len(conversations))))
    assert z == pytest.approx(kl, rel=1e-4) and z > 0
    batches.strangers.columns["reference"] += 1e4           # below 0 it is 0
    assert dpo.divergence(cfg, model, batches, CPU)(list(range(len(conversations)))) == 0
    value, metrics, gradients = step_of_ours(ours, z, **vars(cfg))
    assert value == pytest.approx(theirs.item(), rel=1e-4)
    logged = {k: v[0] for k, v in trainer._metrics["train"].items()}
    for mine, key in (("rewards/chosen", "rewards/chosen"), ("kl", "kl"),
                      ("rewards/rejected", "rewards/rejected"), ("margin", "rewards/margins")):
        assert metrics[mine] == pytest.approx(logged[key], rel=1e-4, abs=1e-5), mine
    assert_gradients(gradients, trainer.model)


def unpaired(n, seed):
    """Records in trl's layout: one answer each, with a label; some prompts are turns."""
    out = []
    for k, pair in enumerate(pairs(n, seed)):
        side = ("chosen", "rejected")[k % 3 % 2]
        *prompt, answer = pair[side]
        out.append({"prompt": prompt, "completion": [answer], "label": side == "chosen"})
        if len(prompt) == 1 and k % 2:
            out[-1] |= {"prompt": prompt[0]["content"], "completion": answer["content"]}
    return out


def test_kto_of_answers_without_a_partner_is_trls(trl_side, base, words):
    """Loss, divergence and gradients of labelled answers, of which there are more good ones."""
    records = [dpo.chats.preference(r) for r in unpaired(9, 4)]
    labels = [r["label"] for r in records]
    assert labels == [r["label"] for r in unpaired(9, 4)] and 0 < sum(labels) < 9
    batches = dpo.Pairs(chats.render_all(words, records, None, 129), 4, 128, seed=3, labels=labels)
    judged(base("llama", 1), batches)
    model = checkpoint.load_model(base("llama", 2), "cpu")
    trainer = trl_side.kto
    trainer.beta, trainer.desirable_weight, trainer.undesirable_weight = 0.3, 1.3, 0.7
    cuts = [splits(c) for c in batches.conversations]
    examples = [{"prompt_ids": prompt, "completion_ids": answer, "label": label,
                 "KL_completion_ids": cuts[i - 1][1]}
                for i, ((prompt, answer), label) in enumerate(zip(cuts, labels))]
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    theirs = trainer._compute_loss(trainer.model, trainer.data_collator(examples), False)
    theirs.backward()
    cfg = dpo.Config(loss="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    batches.strangers = dpo.strangers_of(batches)
    judged(base("llama", 1), batches.strangers)
    batches.baseline = dpo.divergence(cfg, model, batches, CPU)
    model.requires_grad_(True).zero_grad()
    total, count, metrics = dpo.unpaired_loss(cfg)(model, batches.gather(range(len(batches))))
    (total / count).backward()
    logged = {k: v[0] for k, v in trainer._metrics["train"].items()}
    assert count == 9 and logged["kl"] > 0
    assert (metrics["kl"] / count).item() == pytest.approx(logged["kl"], rel=1e-4)
    assert (total / count).item() == pytest.approx(theirs.item(), rel=1e-4)
    good = sum(labels)
    margin = (good * logged["rewards/chosen"] - (9 - good) * logged["rewards/rejected"]
              - 0.3 * logged["kl"] * (2 * good - 9)) / 9
    assert (metrics["margin"] / count).item() == pytest.approx(margin, rel=1e-4, abs=1e-5)
    assert_gradients({n: p.grad for n, p in model.named_parameters()}, trainer.model)


def test_a_file_of_labelled_answers_trains_with_kto_alone(go, tmp_path, capsys):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in unpaired(60, 1)))
    out = go("kto", "--loss=kto", f"--dataset={path}", "--max_iters=2", "--learning_rate=1e-3")
    assert "desirable and" in capsys.readouterr().err and len(curve(out, "kl")) >= 2
    go("shown", "--loss=kto", "--show=2", f"--dataset={path}")
    assert re.search(r"conversation \d, (un)?desirable: .*trained on", capsys.readouterr().out)
    for flags, says in ((["--loss=sigmoid"], "it needs pairs, --loss=kto does not"),
                        (["--loss=kto"], "pairs as well")):
        with pytest.raises(UserError, match=says):
            go("no", *flags, f"--dataset={path}")
        path.write_text(path.read_text() + json.dumps(pairs(1, 0)[0]) + "\n")


@pytest.mark.parametrize("average", [False, True])
def test_simpo_and_orpo_are_trls(ours, average):
    """The methods of trl's experimental trainers, on log-probabilities by its own function from
    whole logits; ORPO's first term is the paper's mean -log p of the chosen answer (trl's is over
    the prompt as well). Gradients by autograd through that."""
    pytest.importorskip("trl")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    model, batches = ours
    me = SimpleNamespace(alpha=0.0, beta=2.0, simpo_gamma=0.9, label_smoothing=0.1,
                         loss_type="simpo", accelerator=SimpleNamespace(device="cpu"))
    for loss in ("simpo", "orpo"):
        got = step_of_ours(ours, loss=loss, beta=2.0, gamma=0.9, average=None if average else False,
                           label_smoothing=0.1 if loss == "simpo" else 0.0)
        model.zero_grad()
        logps = []
        for ids, mask in batches.conversations:
            labels = torch.from_numpy(np.where(mask, ids, -100)).long()[None]
            logps.append(CPOTrainer.get_batch_logps(model(torch.from_numpy(ids).long()[None]),
                                                    labels, average_log_prob=average)[0])
        better, worse = torch.stack(logps).view(-1, 2).unbind(-1)
        if loss == "simpo":
            found, chosen, rejected = CPOTrainer.cpo_loss(me, better, worse)
        else:
            found, chosen, rejected = ORPOTrainer.odds_ratio_loss(me, better, worse)[:3]
            found = -better - found
        found.mean().backward()
        assert got[0] == pytest.approx(found.mean().item(), rel=1e-4)
        assert got[1]["rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-4)
        assert got[1]["rewards/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-4)
        assert_gradients(got[2], model)


def test_the_formulas_of_what_trl_has_not():
    """cDPO's noise, RPO's added term, no reference, averages: spelt out in float64."""
    g = torch.Generator().manual_seed(0)
    policy, reference = (-torch.rand(5, 2, generator=g, dtype=torch.float64) * 9 for _ in "ab")
    sizes = torch.randint(1, 9, (5, 2), generator=g).double()

    def got(**settings):
        return dpo.preference_loss(dpo.Config(**settings), policy, reference, sizes)[0]
    s = torch.sigmoid
    x = 0.1 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    torch.testing.assert_close(got(label_smoothing=.2), -.8 * s(x).log() - .2 * s(-x).log())
    torch.testing.assert_close(got(sft_weight=.3), -s(x).log() - .3 * policy[:, 0] / sizes[:, 0])
    free = 0.1 * (policy[:, 0] - policy[:, 1])
    torch.testing.assert_close(got(reference_free=True), -s(free).log())
    mean = policy / sizes - reference / sizes
    torch.testing.assert_close(got(average=True, beta=2.0),
                               -s(2 * (mean[:, 0] - mean[:, 1])).log())
    torch.testing.assert_close(got(loss="ipo", average=False, beta=.5), (10 * x - 1) ** 2)
    # far from the reference, and at certainty: finite values and gradients
    for far in (-1e4, -1e-9, 0.0):
        for loss in dpo.LOSSES:
            p = torch.tensor([[far, -5.0], [-5.0, far]], requires_grad=True)
            value = dpo.preference_loss(dpo.Config(loss=loss), p, torch.zeros(2, 2),
                                        torch.ones(2, 2))[0].sum()
            value.backward()
            assert torch.isfinite(value) and torch.isfinite(p.grad).all(), (loss, far)

# ------------------------------------------------------------------------- one run is one run


@pytest.mark.parametrize("flags", [
    ["--dropout=0.1"], ["--optimizer=muon", "--dtype=bfloat16", "--loss=ipo"],
    ["--lora_rank=2", "--loss=kto"]], ids=["sigmoid", "bf16", "lora"])
def test_6_steps_are_3_and_3_more_bit_for_bit(go, flags, monkeypatch):
    """The second half takes the reference from out_dir: its own weights are not it any more."""
    straight = go("straight", *flags)
    halves = go("halves", *flags, "--max_iters=3", "--lr_decay_iters=6")
    if "--loss=kto" not in flags:           # which goes on asking for its z
        monkeypatch.setattr(dpo, "of_conversations", None)
    go_on(halves, "--max_iters=6")
    assert_same_run(straight, halves)
    assert len(set(curve(straight))) == 6


CALM = ["--learning_rate=1e-3"]


def test_a_batch_of_8_is_4_times_2(go):
    """KTO's z as well is that of the whole batch, not of a micro-batch (to evaluate, it is that of
    batch_size rows)."""
    more = [*CALM, "--loss=kto"]
    whole = go("whole", *more, "--batch_size=8", "--gradient_accumulation_steps=1")
    parts = go("parts", *more, "--batch_size=2", "--gradient_accumulation_steps=4",
               "--eval_iters=12")
    for key in ("loss", "grad_norm", "margin", "rewards/chosen", "accuracy", "val_margin"):
        assert curve(whole, key) == pytest.approx(curve(parts, key), abs=1e-5)
    a, b = weights(last(whole)), weights(last(parts))
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


def test_one_rank_is_two_ranks(go, fork, tmp_path):
    """9 rows for 2 ranks, which have unequal numbers of pairs; each computes a part of the
    reference's log-probabilities, and they agree in the end. To evaluate, in batches of one row,
    rank 0 has nothing to do."""
    rows = [*CALM, "--loss=kto", "--lora_rank=2", "--batch_size=1",
            "--gradient_accumulation_steps=9"]
    one, two = go("one", *rows), tmp_path / "two"
    outcomes = [r.wait() for r in ranks(fork, 2, *rows, f"--out_dir={two}")]
    assert [o[0] for o in outcomes] == [0, 0], outcomes
    close(one, two)
    for key in ("margin", "val_accuracy", "val_margin"):
        assert curve(one, key) == pytest.approx(curve(two, key), abs=1e-5)
    (a,), (b,) = (list(out.glob("reference_*.npy")) for out in (one, two))
    assert a.name == b.name and np.array_equal(np.load(a), np.load(b))
    assert len(curve(one, "val_margin")) == 2


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_pair_weighs_the_same(base, words, batch_size):
    """Also where rows have unequal numbers of pairs, one of them none."""
    batches = packed(words, pairs(30, 5))
    judged(base("qwen3", 2), batches)
    model, batch = checkpoint.load_model(base(), "cpu"), batches(0)
    batch["targets"][2] = -100
    batch["targets"][1, 40:] = -100
    cfg = dpo.Config(batch_size=batch_size, block_size=128, grad_clip=0.0)
    optimizer = Grads(model)
    done = train.take_step(cfg, model, batch, dpo.pair_loss(cfg), CPU, optimizer, train.State(),
                           False)
    losses = []
    for b, row in enumerate(batches.epoch(0)[:4]):
        for k in range(0, len(batches.rows[row]), 2):
            at = [batch["targets"][b].masked_fill(batch["doc"][b] != k + side, -100)
                  for side in (0, 1)]
            if any((t >= 0).sum() == 0 for t in at):
                continue
            logits = model(batch["ids"][b:b + 1], doc=batch["doc"][b:b + 1])[0]
            p = [-torch.nn.functional.cross_entropy(logits, t, reduction="sum") for t in at]
            r = batch["reference"][b, k:k + 2]
            losses.append(-torch.log(torch.sigmoid(0.1 * (p[0] - r[0] - p[1] + r[1]))))
    mean = sum(losses) / len(losses)
    assert done.metrics["loss"] == pytest.approx(mean.item(), abs=1e-6)
    want = torch.autograd.grad(mean, [p for _, p in model.named_parameters()])
    for got, grad in zip(optimizer.last.values(), want):
        assert (got - grad).norm() <= 1e-4 * grad.norm() + 1e-7
