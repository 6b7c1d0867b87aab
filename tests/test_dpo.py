"""dpo.py as its user meets it: the losses are trl's, the reference is asked once, a run is one run.

Weights are random, of the policy and of the reference: nothing here depends on what they know.
"""
import json
import os
import random
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import checkpoint
import dpo
import tokenizer as tokenizers
import train
from config import UserError, configure
from data import chats
from training.machine import Machine
from model import ModelConfig, Transformer
from runs import (Grads, assert_same_run, close, complaint, curve, forks_of, last, log,
                  quiet_machine, ranks, said, starter, weights)

ROOT = train.Path(dpo.__file__).parent
CPU = Machine(torch.device("cpu"), torch.float32)
U, A = "user", "assistant"
assert quiet_machine                # a fixture that every test here uses by itself
RUN = ["--batch_size=3", "--gradient_accumulation_steps=2", "--max_iters=6", "--eval_interval=3",
       "--eval_iters=3", "--learning_rate=3e-3", "--warmup_iters=2", "--device=cpu",
       "--dtype=float32", "--log_interval=1"]


def pairs(n, seed):
    """Sums whose better answer begins with "it is"; some have a first exchange or a system turn,
    and some end after two answers."""
    rng, out = random.Random(seed), []
    for _ in range(n):
        a, b = rng.randrange(5), rng.randrange(5)
        before = ["system", "be brief"] if rng.random() < .2 else []
        before += [U, "hello", A, "hello, what is it?"] if rng.random() < .3 else []
        before += [U, f"{a} + {b}?"]
        worse = rng.choice((f"hello, it is {a + b}", f"{a + b}", f"is it {a + b}? it is it is"))
        good, bad = [A, f"it is {a + b}"], [A, worse]
        if rng.random() < .2:
            good, bad = good + [U, "4?", A, "it is 4"], bad + [U, "5?", A, "5"]
        out.append({"chosen": said(*before, *good), "rejected": said(*before, *bad)})
    return out


@pytest.fixture(scope="session")
def words():
    text = "hello, what is 1 + 2? it is 3. be brief. user assistant naïve 🐈 4 5 6 7 8 9\n"
    found = tokenizers.train([text * 30], 288, workers=1)
    found.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    found.template = "chatml"
    return found


@pytest.fixture(scope="session")
def base(words, tmp_path_factory):
    """base(family, seed): a checkpoint of random weights that has a chat template."""
    made = {}

    def make(name="qwen3", seed=1):
        if (name, seed) not in made:
            torch.manual_seed(seed)
            model = Transformer(
                ModelConfig.from_family(
                    name,
                    n_layer=2,
                    n_head=2,
                    n_embd=32,
                    block_size=128,
                    vocab_size=words.vocab_size,
                )
            )
            for p in model.parameters():                    # norms and biases as well
                torch.nn.init.normal_(p, 1.0 if p.ndim < 2 else 0.0, 0.1)
            made[name, seed] = checkpoint.save_model(
                tmp_path_factory.mktemp("base") / name, model, words)
        return made[name, seed]
    return make


@pytest.fixture(scope="session")
def taste(tmp_path_factory):
    """A folder of preferences."""
    folder = tmp_path_factory.mktemp("taste")
    for split, n, seed in (("train", 90, 0), ("val", 30, 1)):
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in pairs(n, seed)))
    return folder


@pytest.fixture
def go(base, taste, tmp_path):
    """go(name, *flags): train in this process into tmp_path/name; returns that folder."""
    def start(name, *flags, start_from=None):
        out = tmp_path / name
        dpo.main(configure(dpo.Config, [f"--init_from={start_from or base()}",
                                        f"--dataset={taste}", f"--out_dir={out}", *RUN, *flags]))
        return out
    return start


def go_on(out, *flags):
    return dpo.main(configure(dpo.Config, ["--init_from=resume", f"--out_dir={out}",
                                           "--device=cpu", *flags]))


forks = forks_of("dpo")


@pytest.fixture
def fork(forks, base, taste, tmp_path):
    """fork(*flags): start dpo.py in a process; name its folder with --out_dir."""
    return starter(forks, tmp_path, lambda: [f"--init_from={base()}", f"--dataset={taste}", *RUN])


def packed(words, records, batch_size=4, block_size=128, seed=3):
    rendered = chats.render_pairs(words, records, None, block_size + 1)
    return dpo.Pairs(rendered, batch_size, block_size, seed=seed)


def judged(path, batches):
    """A model, with what it thinks of every conversation put beside the batches."""
    model = checkpoint.load_model(path, "cpu")
    batches.columns["reference"] = dpo.of_conversations(model, batches, 4, CPU)
    return model


def alone(model, ids, mask):
    """Sum of log p of the masked tokens of one conversation, by the definition."""
    ids = torch.from_numpy(ids).long()
    logp = model(ids[None])[0].double().log_softmax(-1)
    return sum(logp[t - 1, ids[t]] for t in np.flatnonzero(mask))

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

# ------------------------------------------------------------------------- the reference, once


def cache(out):
    found, = out.glob("reference_*.npy")
    return found


def count_calls(monkeypatch):
    calls, compute = [], dpo.of_conversations

    def counted(*args, **kwargs):
        calls.append(args[1])
        return compute(*args, **kwargs)
    monkeypatch.setattr(dpo, "of_conversations", counted)
    return calls


def test_the_reference_is_asked_once_and_no_second_model_loaded(go, monkeypatch, base):
    """A run, its resumption, its evaluation and a later run with the same data and reference."""
    loads, load = [], checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model",
                        lambda *a, **k: (loads.append(a), load(*a, **k))[1])
    calls = count_calls(monkeypatch)
    out = go("out", "--max_iters=3")
    assert len(calls) == 2 and len(loads) == 1              # train and val
    values = np.load(cache(out))
    model = load(base(), "cpu")
    where = np.cumsum([0] + [len(p.conversations) for p in calls])
    for start, p in zip(where, calls):
        for k in (0, 1, len(p.conversations) - 1):
            want = alone(model, *p.conversations[k]).item()
            assert values[start + k] == pytest.approx(want, abs=1e-4)
    go_on(out, "--max_iters=6")
    go_on(out, "--eval_only=1")
    go("out", "--beta=0.5")                                 # the earlier run is moved aside
    assert len(calls) == 2 and len(loads) == 4 and cache(out)
    go("out", "--dtype=bfloat16")
    assert len(calls) == 4
    go("out", start_from=base(seed=2))
    assert len(calls) == 6


@pytest.mark.parametrize("loss", ["simpo", "orpo", "sigmoid"])
def test_losses_without_a_reference_ask_none(go, monkeypatch, loss):
    monkeypatch.setattr(dpo, "of_conversations", None)
    # simpo and orpo have none to be free of, and refuse the flag
    out = go("out", f"--loss={loss}", *["--reference_free=1"] * (loss == "sigmoid"))
    assert not list(out.glob("reference_*")) and np.isfinite(curve(out)).all()


def damaged(file, name):
    values = np.load(file)
    if name == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif name == "gone":
        file.unlink()
    else:
        wrong = values.copy()
        wrong[5] = np.nan
        np.save(file, {"pickled": np.array([print], dtype=object), "nan": wrong,
                       "other type": values.astype(np.float64)}[name], allow_pickle=True)


def test_a_lost_cache_is_computed_from_where_the_run_began(go, tmp_path, capfd):
    """Not from the weights of the resumed run, which are no reference any more. Whatever the file
    holds instead is not believed, and no pickle is opened."""
    straight = go("straight")
    half = go("half", "--max_iters=3", "--lr_decay_iters=6")
    before = np.load(cache(half))
    for name in ("truncated", "pickled", "other type", "nan", "gone"):
        out = tmp_path / name
        shutil.copytree(half, out)
        damaged(cache(out), name)
        capfd.readouterr()
        go_on(out, "--max_iters=6")
        assert ("is damaged" in capfd.readouterr().err) == (name != "gone"), name
        assert np.array_equal(np.load(cache(out)), before), name
        assert_same_run(straight, out)


def test_a_resumed_run_that_has_lost_its_reference_says_so(go, base, tmp_path):
    """Without the file and without the folder, or with other weights in it, there is no going
    on; with the file there is; adapters have their base."""
    start = tmp_path / "start"
    shutil.copytree(base(), start)
    out = go("out", "--max_iters=3", start_from=start)
    thin = go("thin", "--max_iters=3", "--lora_rank=2", start_from=start)
    shutil.rmtree(start)
    shutil.copytree(base(seed=2), start)
    go_on(out, "--max_iters=4")
    cache(out).unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="start is gone or has changed.*--reference=DIR"):
            go_on(out, "--max_iters=6")
        shutil.rmtree(start, ignore_errors=True)
    assert last(out).name == "step_000004"
    go_on(out, "--max_iters=6", f"--reference={base()}")
    shutil.copytree(base(), start)
    before = np.load(cache(thin))
    cache(thin).unlink()
    go_on(thin, "--max_iters=4")
    assert np.array_equal(np.load(cache(thin)), before)


def test_another_model_as_the_reference(go, base, words, taste):
    """--reference=DIR is asked instead, and a resumed run remembers what it said."""
    out = go("out", f"--reference={base('llama', 2)}", "--max_iters=3")
    model = checkpoint.load_model(base("llama", 2), "cpu")
    rendered = chats.render_pairs(words, chats.read_chats(taste / "train.jsonl", "preference"),
                                  None, 129)
    values = np.load(cache(out))
    for k in (0, 1, 77):
        assert values[k] == pytest.approx(alone(model, *rendered[k]).item(), abs=1e-4)
    assert abs(curve(out)[0] - np.log(2)) > 1e-3            # the policy is not the reference
    go_on(out, "--max_iters=6")
    assert np.array_equal(np.load(cache(out)), values)


def test_a_reference_with_another_tokenizer_is_refused(go, base, tmp_path):
    other = tokenizers.train(["it is what it is, and that is what is said: 1 + 1 = 2." * 30], 270,
                             workers=1)
    theirs = checkpoint.save_model(tmp_path / "theirs", Transformer(ModelConfig.from_family(
        "llama", n_layer=1, n_head=2, n_embd=32, block_size=128, vocab_size=270)), other)
    with pytest.raises(UserError, match="has another tokenizer"):
        go("out", f"--reference={theirs}")


def test_adapters_have_their_base_as_the_reference(go, base, monkeypatch):
    """The margin is 0 at the start, base and embeddings stay, and the merged model has the
    margins of the run."""
    out = go("out", "--lora_rank=2", "--max_iters=4")
    assert curve(out)[0] == pytest.approx(np.log(2), abs=1e-5)
    assert curve(out)[-1] < curve(out)[0]
    assert (last(out) / "adapter").is_dir()
    before, after = (checkpoint.load_model(p, "cpu") for p in (base(), last(out)))
    assert torch.equal(before.output_weight, after.output_weight)

# ------------------------------------------------------------------------- stopped and killed


def wait_for(condition):
    deadline = train.time.monotonic() + 60
    while not condition():
        assert train.time.monotonic() < deadline
        train.time.sleep(0.005)


def test_asked_to_stop_it_says_how_to_go_on(go, fork, tmp_path):
    """The command in the sentence is dpo.py's, and ends the run as if it had never stopped."""
    flags = ["--max_iters=20", "--eval_interval=20", "--dropout=0.1"]
    out = tmp_path / "out"
    asked = fork(*flags, f"--out_dir={out}")
    wait_for(lambda: (out / "log.jsonl").exists() and (
        out / "log.jsonl").read_text().count("\n") > 2)
    os.kill(asked.pid, signal.SIGTERM)
    status, stdout, stderr = asked.wait()
    assert status == 128 + signal.SIGTERM and stdout == "", stderr
    argv = re.search(r"go on with: python dpo.py (.*)\n\Z", stderr)[1].split()
    dpo.main(configure(dpo.Config, [*argv, "--device=cpu"]))
    assert_same_run(go("straight", *flags), out)


@pytest.mark.parametrize("moment", [
    r"os.rename .*reference_.*\.tmp", r"os.rename .*step_000002.*"], ids=["reference", "step"])
def test_killed_at_a_bad_moment_it_goes_on_to_the_same_weights(go, fork, tmp_path, moment):
    """While the reference is kept, and when there is a checkpoint to go on from."""
    flags, out = ["--max_iters=5", "--eval_interval=1"], tmp_path / "out"
    status, _, stderr = fork(*flags, f"--out_dir={out}", kill_at=(moment, 1)).wait()
    assert status == -signal.SIGKILL, stderr
    if (out / "checkpoints.json").exists():
        go_on(out)
    else:
        go("out", *flags)
    assert_same_run(go("straight", *flags), out)
    assert cache(out) and not list(out.glob("*.tmp"))

# ---------------------------------------------------------------------------- what it says


def test_it_learns_what_is_preferred_and_reports_it(go, capfd):
    """Accuracy on unseen pairs rises to 1; log and evaluation have rewards, margin and accuracy,
    which a second look at the checkpoint prints on stdout."""
    out = go("out", "--max_iters=20", "--eval_interval=10", "--learning_rate=1e-2")
    rows = log(out)
    for row in rows:
        prefix = "val_" if "val_loss" in row else ""
        assert row[f"{prefix}margin"] == pytest.approx(
            row[f"{prefix}rewards/chosen"] - row[f"{prefix}rewards/rejected"], abs=1e-5)
        assert 0 <= row[f"{prefix}accuracy"] <= 1
    assert rows[0]["margin"] == rows[0]["accuracy"] == 0    # the policy is the reference
    assert curve(out, "val_accuracy")[-1] > 0.95
    assert curve(out, "val_loss")[-1] < 0.2
    assert not curve(out, "val_ppl")        # which a preference has not
    said_so = capfd.readouterr()
    assert said_so.out == ""
    assert re.search(r"90 pairs \(0 without .* cut to 129 tokens\) in \d+ rows, [89]\d\.\d% full",
                     said_so.err)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    go_on(out, "--eval_only=1")
    told = dict(zip(*[iter(capfd.readouterr().out.split())] * 2))
    assert float(told["val_accuracy"]) == pytest.approx(curve(out, "val_accuracy")[-1], abs=1e-4)
    assert float(told["val_margin"]) == pytest.approx(curve(out, "val_margin")[-1], abs=1e-4)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_validation_is_each_pair_by_itself(go, base, taste, words):
    """The numbers of the evaluation against a loop over conversations, float64."""
    out = go("out", "--max_iters=3", "--eval_iters=100")
    policy, reference = (checkpoint.load_model(p, "cpu") for p in (last(out), base()))
    rendered = chats.render_pairs(words, chats.read_chats(taste / "val.jsonl", "preference"), None,
                                  129)
    with torch.no_grad():
        r = 0.1 * torch.stack([alone(policy, *c) - alone(reference, *c) for c in rendered])
    margin = r[::2] - r[1::2]
    row = log(out)[-1]
    assert row["val_accuracy"] == pytest.approx((margin > 0).double().mean().item(), abs=1e-6)
    assert row["val_margin"] == pytest.approx(margin.mean().item(), abs=1e-5)
    assert row["val_rewards/chosen"] == pytest.approx(r[::2].mean().item(), abs=1e-5)
    assert row["val_loss"] == pytest.approx(
        -torch.sigmoid(margin).log().mean().item(), abs=1e-5)


def test_show_prints_what_is_trained_on_and_writes_nothing(go, tmp_path, capfd):
    out = go("out", "--show=2")
    stdout, stderr = capfd.readouterr()
    assert not out.exists() and "pairs" in stderr
    assert stdout.count("pair 0, chosen: ") == stdout.count("pair 0, rejected: ") == 2
    shown = re.findall("⟦(.*?)<\\|im_end\\|>⟧", stdout)
    assert len(shown) >= 4 and "hello, what is it?" not in shown    # an answer of the prompt
    assert any(s.startswith("it is") for s in shown) and "hello, what is it?" in stdout


def test_pairs_too_long_for_a_row_do_not_stop_it(go, tmp_path):
    """Cut, or skipped where nothing of an answer is left; the packer goes on."""
    path = tmp_path / "long.jsonl"
    q = "what " * 200
    records = [{"prompt": "hello", "chosen": "it is " * 200, "rejected": "1"},
               {"prompt": q, "chosen": "it is 1", "rejected": "1"},
               {"prompt": "hello", "chosen": "is " * 100, "rejected": "is " * 101}] * 10
    path.write_text("".join(json.dumps(r) + "\n" for r in records + pairs(30, 2)))
    out = go("out", f"--dataset={path}")
    assert np.isfinite(curve(out) + curve(out, "val_loss")).all() and min(curve(out)) > 0


def test_a_batch_without_a_pair_changes_nothing(go, monkeypatch):
    gather = dpo.Pairs.__call__

    def masked(self, step):
        batch = gather(self, step)
        batch["targets"].fill_(-100) if step == 3 else None
        return batch
    monkeypatch.setattr(dpo.Pairs, "__call__", masked)
    for loss in ("sigmoid", "orpo", "kto"):
        out = go(loss, f"--loss={loss}")
        assert curve(out)[3] == 0.0 and np.isfinite(curve(out) + curve(out, "val_loss")).all()
        assert curve(out, "skipped")[-1] == 0


@pytest.mark.parametrize("flags, says", [
    ("--init_from={tmp}/none", "no checkpoint at .*none"),
    ("--reference={tmp}/none", "no checkpoint at .*none"),
    ("--loss=ppo", "unknown loss 'ppo'; choose from sigmoid, hinge"),
    ("--beta=0", "beta must be positive, got 0.0"),
    ("--label_smoothing=0.5", "below 0.5"),
    ("--loss=ipo --label_smoothing=0.1", "only sigmoid, robust, simpo know it"),
    ("--loss=orpo --reference=x", "of no use to orpo"),
    ("--reference_free=1 --reference=x", "of no use to --reference_free"),
    ("--eval_only=1", "against itself says nothing: .*--init_from=resume"),
    ("--dataset={tmp}/chats.jsonl", "chats.jsonl, line 1: .*chosen is not there"),
    ("--block_size=8", "no pair with an answer within 9 tokens"),
])
def test_a_mistake_is_one_sentence(go, tmp_path, flags, says):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": said(U, "1", A, "2")}) + "\n")
    with pytest.raises(UserError, match=says) as found:
        go("out", *flags.format(tmp=tmp_path).split())
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out" / "checkpoints.json").exists()


def test_a_mistake_ends_the_program_with_status_2(fork, tmp_path):
    found = complaint(fork("--loss=ppo", f"--out_dir={tmp_path / 'out'}").wait())
    assert found.endswith("kto") and not (tmp_path / "out").exists()


def test_the_shipped_config_resolves():
    path = ROOT / "config" / "dpo_skills.py"
    cfg = configure(dpo.Config, [str(path)])
    dpo.check(train.replace(cfg, block_size=256))
    assert (cfg.dataset, cfg.init_from, cfg.out_dir) == ("skills", "out/sft",
                                                         "out/dpo")
    assert "python dpo.py config/dpo_skills.py" in path.read_text()
