"""distill.py as its user meets it: the loss is the one that is written down, and a run is one run.

Teachers and students have random weights, large enough that their distributions are far from
uniform: what is tested here does not depend on what they know.
"""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import distill
import sft
import tokenizer as tokenizers
import train
from config import UserError, configure
from data import chats, prepare
from inference.generate import Sampling, generate
from training.machine import Machine
from model import ModelConfig, Transformer
from test_sft import sums
from runs import (assert_same_run, close, complaint, curve, forks_of, last, log, quiet_machine,
                  ranks, starter, weights)
from distill_base import divergence
assert quiet_machine                # a fixture that every test here uses by itself

ROOT = Path(distill.__file__).parent
CPU = Machine(torch.device("cpu"), torch.float32)
RUN = ["--batch_size=3", "--gradient_accumulation_steps=2", "--max_iters=6", "--eval_interval=3",
       "--eval_iters=3", "--learning_rate=3e-3", "--warmup_iters=2", "--device=cpu",
       "--dtype=float32", "--log_interval=1"]
SHAPE = ["--n_layer=2", "--n_head=2", "--n_embd=16"]
HIDDEN = ["--hidden=0.7", "--hidden_layers=1", "--divergence=js", "--beta=0.3"]
TEXT = "hello, what is 1 + 2? it is 3. be brief. user assistant naïve 🐈 4 5 6 7 8 9\n"
CALM = "--optimizer=adamw", "--learning_rate=1e-3"


@pytest.fixture(scope="session")
def words():
    made = tokenizers.train([TEXT * 30], 290, workers=1)
    made.template = "chatml"
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return made


@pytest.fixture(scope="session")
def model(words, tmp_path_factory):
    """model(family): the checkpoint of a chat model of random weights."""
    made = {}

    def make(name="qwen3", tokenizer=words, seed=1, **shape):
        key = (name, id(tokenizer), seed, *shape.items())
        if key not in made:
            torch.manual_seed(seed)
            flags = dict(dict(n_layer=3, n_head=2, n_embd=32, vocab_size=tokenizer.vocab_size,
                              block_size=64, init_std=0.15), **shape)
            one = Transformer(ModelConfig.from_family(name, **flags))
            for p in one.parameters():              # norms and biases as well
                p.data += 0.1 * torch.randn_like(p)
            if tokenizer is words and not one.config.tie_word_embeddings:
                # a random model seldom ends what it says: this one is drawn to
                h, z = one(torch.randint(290, (8, 60)), head=lambda h, w: (h, h @ w.T))
                mean = h.detach().mean((0, 1))
                row = mean / mean.square().sum() * z.detach().amax(-1).mean()
                one.lm_head.weight.data[words.special["<|im_end|>"]] = row
            made[key] = checkpoint.save_model(tmp_path_factory.mktemp("model") / name, one,
                                              tokenizer)
        return made[key]
    return make


@pytest.fixture(scope="session")
def talk(tmp_path_factory):
    """A folder of conversations, as data/prepare.py leaves one."""
    folder = tmp_path_factory.mktemp("talk")
    for split, n, seed in (("train", 120, 0), ("val", 30, 1)):
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in sums(n, seed)))
    return folder


@pytest.fixture
def go(model, talk, tmp_path):
    """go(name, *flags): distil in this process into tmp_path/name; returns that folder."""
    def start(name, *flags, teacher=None, script=distill):
        out = tmp_path / name
        first = [f"--teacher={teacher or model()}"] if script is distill else []
        # a checkpoint, and the teacher's layers, have a shape of their own
        own = any(flag.startswith(("--init_from", "--layers_from")) for flag in flags)
        shape = [] if own or script is not distill else SHAPE
        script.main(configure(script.Config, [*first, f"--dataset={talk}", f"--out_dir={out}",
                                              *RUN, *shape, *flags]))
        return out
    return start


def go_on(out, *flags):
    return distill.main(configure(distill.Config, ["--init_from=resume", f"--out_dir={out}",
                                                   "--device=cpu", *flags]))


forks = forks_of("distill")


@pytest.fixture
def fork(forks, model, talk, tmp_path):
    """fork(*flags): start distill.py in a process; name its folder with --out_dir."""
    return starter(forks, tmp_path, lambda: [f"--teacher={model()}", f"--dataset={talk}", *RUN,
                                             *SHAPE])

# ---------------------------------------------------------- the loss of a batch, by brute force


def prepared(cfg, teacher_dir, student_dir):
    """(student, loss, batch, packed): what main() hands to fit(), without the run."""
    cfg.teacher, cfg.init_from, cfg.block_size = str(teacher_dir), str(student_dir), 64
    shape, tokenizer = distill.start_student(cfg)
    run = sft.Run(CPU, shape, tokenizer, tokenizer.vocab_size, 4)
    data = distill.load_data(cfg, run)
    student = train.build_model(cfg, 0, CPU)
    loss = distill.make_loss(cfg, run, student, data)
    return student, loss, data.batches(0), data.batches


def by_hand(cfg, student, teacher, packed):
    """The loss as it is written in distill.py's docstring, a conversation at a time."""
    total, tokens = 0.0, 0
    seen = {}
    marks = [(m, f"{who}{k}", m.model.layers.get_submodule(str(k)))
             for m, who, layers in ((student, "s", [0]), (teacher, "t", [1])) for k in layers]
    hooks = [layer.register_forward_hook(lambda _, __, out, name=name: seen.update(
        {name: out[0]})) for _, name, layer in marks]
    share = packed.trained / packed.tokens
    for row in packed.epoch(0)[:4]:
        for i in packed.rows[row]:
            ids, mask = (torch.from_numpy(a) for a in packed.conversations[i])
            ids, (z, h), (zt, ht) = ids.long()[None], *(
                m(ids.long()[None][:, :64], head=lambda h, w, m=m: (m.to_logits(h, w), h))
                for m in (student, teacher))
            live, right = mask[1:], ids[0, 1:]
            cut = min(z.shape[-1], zt.shape[-1])
            n = len(right)
            z, zt, h, ht = z[0, :n], zt[0, :n].detach(), h[0], ht[0].detach()
            total = total + cfg.alpha * F.cross_entropy(z[live], right[live], reduction="sum")
            total = total + (1 - cfg.alpha) * divergence(
                z[live][:, :cut], zt[live][:, :cut], cfg.divergence, cfg.beta, cfg.temperature
            ).sum()
            if cfg.hidden:
                P = list(student.matching.parameters()) or [torch.eye(32)] * 2
                pairs = ((seen["s0"][0], seen["t1"][0].detach()), (h, ht))
                for k, (a, b) in enumerate(pairs[2 - len(P) if cfg.hidden_layers else 1:]):
                    far = 1 - F.cosine_similarity(a @ P[k].T, b, dim=-1)
                    total = total + cfg.hidden * share * far.sum() / (cfg.hidden_layers + 1)
            tokens += int(live.sum())
    for hook in hooks:
        hook.remove()
    return total, tokens


@pytest.mark.parametrize("how, taught, learns", [
    (dict(), {}, {}),
    (dict(divergence="reverse", alpha=0.2, temperature=2.0), dict(tie_word_embeddings=True), {}),
    (dict(divergence="js", beta=0.2, hidden=0.5, hidden_layers=1), {}, {}),
    (dict(hidden=0.5, hidden_layers=1), {}, dict(n_embd=32)),           # one width: no projection
    (dict(), dict(name="qwen3_moe", num_experts=4, num_experts_per_tok=2,
                  moe_intermediate_size=16), dict(name="llama")),
    (dict(hidden=1.0), dict(name="gpt2"), {}),                          # learned positions
    (dict(divergence="js"), dict(name="gemma2"), dict(name="gemma2")),  # capped logits
], ids=["forward", "reverse", "js hidden", "width", "mixture", "gpt2", "softcap"])
def test_loss_and_gradients_of_a_batch_are_those_by_hand(model, talk, how, taught, learns):
    """Packed, masked and fused, against each conversation alone with all its logits."""
    teacher_dir = model(**taught)
    student_dir = model(**{**dict(name="qwen3", n_layer=2, n_embd=16, seed=2), **learns})
    cfg = distill.Config(dataset=str(talk), device="cpu", **how)
    student, loss, batch, packed = prepared(cfg, teacher_dir, student_dir)
    value, count, metrics = loss(student, batch)
    names, params = zip(*student.named_parameters())
    got = torch.autograd.grad(value, params)
    teacher = checkpoint.load_model(teacher_dir, "cpu", "float32")
    want, tokens = by_hand(cfg, student, teacher, packed)
    assert count == tokens
    assert abs(value - want) < 2e-5 * abs(want)
    assert set(metrics) == {"ce", "kl"} | ({"hidden"} if cfg.hidden else set())
    parts = cfg.alpha * metrics["ce"] + (1 - cfg.alpha) * metrics["kl"]
    assert abs(parts + cfg.hidden * metrics.get("hidden", 0) - value) < 1e-4 * value
    for name, a, b in zip(names, got, torch.autograd.grad(want, params)):
        assert (a - b).norm() < 2e-4 * b.norm() + 1e-4, name
    with torch.no_grad():                               # scored, it is the student's plain CE
        plain = train.next_token_loss(cfg, masked=True)(student, batch)[0]
        assert loss(student, batch)[0] == plain
    assert abs(plain - metrics["ce"]) < 1e-4 * plain

# ------------------------------------------------------------------------- one run is one run


def assert_same_files(a, b):
    """The same run, and the same projections beside its weights."""
    assert_same_run(a, b)
    one, two = (last(out) / distill.PROJECTIONS for out in (a, b))
    assert one.is_file() == two.is_file()
    assert not one.is_file() or one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("flags", [["--dropout=0.1", *HIDDEN],
                                   ["--generate=40", "--generate_temperature=1",
                                    "--generate_tokens=40", "--batch_size=1"]],
                         ids=["hidden", "generate"])
def test_6_steps_are_3_and_3_more_bit_for_bit(go, flags):
    """The command that resumes names neither teacher nor settings: they are the saved run's."""
    straight = go("straight", *flags)
    halves = go("halves", *flags, "--max_iters=3", "--lr_decay_iters=6")
    go_on(halves, "--max_iters=6")
    assert_same_files(straight, halves)
    assert ("hidden" in log(straight)[0]) == ("--hidden=0.7" in flags)


def test_stopped_or_killed_it_goes_on_to_the_same_weights(go, fork, tmp_path):
    flags = [*HIDDEN, "--max_iters=20", "--eval_interval=10", "--eval_iters=1"]
    straight = go("straight", *flags)
    for number in (signal.SIGTERM, signal.SIGKILL):
        out = tmp_path / f"out{number}"
        run = fork(*flags, f"--out_dir={out}")
        while not (out / "checkpoints.json").exists():
            train.time.sleep(0.005)
        os.kill(run.pid, number)
        status, stdout, stderr = run.wait()
        assert (status, stdout) == (128 + number if number == signal.SIGTERM else -number, "")
        go_on(out)
        assert_same_files(straight, out)
        if number == signal.SIGTERM:
            assert "go on with: python distill.py --init_from=resume" in stderr


@pytest.mark.parametrize("flags", [HIDDEN, ["--generate=40", "--generate_temperature=1",
                                            "--generate_tokens=40"]],
                         ids=["hidden", "asked once"])
def test_one_rank_is_two_ranks(go, fork, tmp_path, flags):
    """3 rows for 2 ranks; what is asked of the teacher once is shared out, and the same."""
    rows = [*CALM, "--batch_size=3", "--gradient_accumulation_steps=1", *flags]
    kept = [[f"--cache_dir={tmp_path / f'cache {n}'}"] if "--generate=40" in flags else []
            for n in ("one", "two")]
    one, two = go("one", *rows, *kept[0]), tmp_path / "two"
    outcomes = [r.wait() for r in ranks(fork, 2, *rows, f"--out_dir={two}", *kept[1])]
    assert [o[0] for o in outcomes] == [0, 0], outcomes
    close(one, two)
    for key in ("ce", "kl"):
        assert np.allclose(curve(one, key), curve(two, key), atol=1e-5)
    if "--generate=40" in flags:
        files = [sorted(p.relative_to(tmp_path / f"cache {n}") for p in
                        (tmp_path / f"cache {n}").rglob("*")) for n in ("one", "two")]
        # one name, from the same content: and the answers are the same, to the byte
        assert files[0] == files[1] and len(files[0]) == 3
        for file in files[0]:
            a, b = (tmp_path / f"cache {n}" / file for n in ("one", "two"))
            if a.is_file():
                assert a.read_bytes() == b.read_bytes()


def test_a_batch_of_8_is_4_times_2(go):
    whole = go("whole", *CALM, *HIDDEN, "--batch_size=8", "--gradient_accumulation_steps=1")
    parts = go("parts", *CALM, *HIDDEN, "--batch_size=2", "--gradient_accumulation_steps=4",
               "--eval_iters=12")
    close(whole, parts)
    for key in ("ce", "kl", "hidden"):
        assert np.allclose(curve(whole, key), curve(parts, key), atol=1e-5)
    a, b = weights(last(whole)), weights(last(parts))
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


def test_a_batch_without_any_target_changes_nothing(go, monkeypatch):
    gather = chats.Packed.__call__

    def masked(self, step):
        batch = gather(self, step)
        batch["targets"].fill_(-100) if step == 3 else None
        return batch
    monkeypatch.setattr(chats.Packed, "__call__", masked)
    out = go("out", *HIDDEN)
    assert curve(out)[3] == 0.0 and np.isfinite(curve(out) + curve(out, "val_loss")).all()
    assert curve(out, "skipped")[-1] == 0

# ------------------------------------------------------------------------ teacher and student


def test_without_a_teacher_it_is_sft(go, model, monkeypatch):
    """--alpha=1: the same weights, bit for bit, and nobody loads a teacher's weights."""
    student = f"--init_from={model(n_layer=2, n_embd=16, seed=2)}"
    straight = go("sft", student, "--optimizer=muon", script=sft)
    monkeypatch.setattr(distill, "load_teacher", None)
    assert_same_run(straight, go("alone", student, "--alpha=1"))


def test_validation_is_the_plain_loss_with_or_without_a_teacher(go, model, capfd):
    """Runs compare by val_loss, which is sft.py's of the same weights."""
    out = go("out")
    sft.main(configure(sft.Config, [f"--init_from={last(out)}", "--eval_only=1", "--batch_size=3",
                                    "--eval_iters=3", "--device=cpu", "--dtype=float32",
                                    f"--dataset={log_dataset(out)}"]))
    assert f"val_loss {curve(out, 'val_loss')[-1]:.4f}" in capfd.readouterr().out


def log_dataset(out):
    return checkpoint.load_trainer(last(out))["settings"]["dataset"]


def test_the_teacher_is_no_part_of_the_result(go, model):
    """Its weights stay, and the student's checkpoint has neither them nor the projections."""
    before = {p.name: p.read_bytes() for p in model().iterdir()}
    out = last(go("out", *HIDDEN, "--max_iters=2"))
    assert before == {p.name: p.read_bytes() for p in model().iterdir()}
    names = set(weights(out))
    assert names == {n for n, _ in checkpoint.load_model(out, "cpu").named_parameters()}
    assert (out / distill.PROJECTIONS).is_file()
    optimizer = checkpoint.load_trainer(out)["optimizer"]["state"]
    assert set(optimizer) - names == {"matching.P0", "matching.P1"}


def test_the_student_comes_closer_to_its_teacher(go):
    """KL and distance fall when nothing but the teacher is learnt from."""
    out = go("out", "--alpha=0", "--hidden=1", "--max_iters=25", "--learning_rate=1e-2",
             "--eval_interval=25")
    assert curve(out, "kl")[-1] < 0.6 * curve(out, "kl")[0]
    assert curve(out, "hidden")[-1] < 0.6 * curve(out, "hidden")[0]


def test_a_student_of_the_teacher_s_layers(go, model):
    """All of them: the teacher itself. Fewer: the last one among them, evenly."""
    out = go("whole", "--layers_from_teacher=1", "--n_layer=3", "--max_iters=1")
    assert abs(log(out)[0]["kl"]) < 1e-6
    cfg = distill.Config(teacher=str(model()), n_layer=2, layers_from_teacher=True, device="cpu")
    cfg.given = {"n_layer"}
    shape, _ = distill.start_student(cfg)
    student, teacher = Transformer(shape), weights(model())
    assert "layers 1, 2 of 3" in distill.take_layers(cfg, student, CPU)
    for name, p in student.named_parameters():
        name = re.sub(r"layers\.(\d)", lambda m: f"layers.{int(m[1]) + 1}", name)
        assert torch.equal(p, teacher[name])
    with pytest.raises(UserError, match="layers cannot be made of the teacher's 3"):
        go("more", "--layers_from_teacher=1", "--n_layer=4")
    assert [distill.spread(n, 12) for n in (1, 3, 4, 12)] == [
        [11], [3, 7, 11], [2, 5, 8, 11], list(range(12))]


def test_a_student_checkpoint_gets_the_teacher_s_template(go, model, words, talk, capfd):
    """A text model's tokenizer lacks the control tokens: it gets them, and they are the same."""
    text = tokenizers.train([TEXT * 30], 290, workers=1)
    student = model(n_layer=1, n_embd=16, tokenizer=text, seed=3)
    out = go("out", f"--init_from={student}", "--max_iters=1")
    assert checkpoint.load_tokenizer(out).special == words.special
    assert "whose tokens <|im_start|> <|im_end|> are new" in capfd.readouterr().err
    # the other way round, it is the teacher who has never seen them
    with pytest.raises(UserError, match=r"the data has the token .*<\|im_end\|>.* does not know"):
        go("no", "--max_iters=1", teacher=student)


def test_another_tokenizer_is_one_sentence(go, model):
    other = tokenizers.train(["quite another text 0 1 2\n" * 30], 265, workers=1)
    with pytest.raises(UserError, match="have not the tokenizer of the teacher"):
        go("out", f"--init_from={model(n_layer=1, tokenizer=other, seed=4)}")


def test_a_student_larger_than_its_teacher_is_told(go, capfd):
    go("out", "--n_embd=64", "--n_layer=4", "--max_iters=1")
    assert "more than it, which distillation is not for" in capfd.readouterr().err


def test_adapters_learn_from_a_teacher(go, model):
    """With --lora_rank the student's weights stay, and the projections are saved beside."""
    student = model(n_layer=2, n_embd=16, seed=2)
    flags = [f"--init_from={student}", "--lora_rank=2", *HIDDEN]
    straight, halves = go("straight", *flags), go("halves", *flags, "--max_iters=3",
                                                  "--lr_decay_iters=6")
    assert (last(straight) / "adapter").is_dir()
    go_on(halves, "--max_iters=6")
    assert_same_files(straight, halves)


def test_text_is_learnt_from_at_every_token(model, tmp_path, capfd):
    """A prepared text dataset and a teacher without any chat template."""
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"text": f"the {a} and the {b} ran in.\n" * 9}) + "\n"
        for a in "cat dog rat".split() for b in "tree house car sun".split() * 5))
    prepare.main(configure(prepare.Config, [str(tmp_path / "a.jsonl"), "--vocab_size=280",
                                            f"--out={tmp_path / 'ready'}", "--workers=1"],
                           positional=("source",)))
    teacher = model(tokenizer=tokenizers.load(tmp_path / "ready"))
    flags = [f"--teacher={teacher}", f"--dataset={tmp_path / 'ready'}", *RUN, *SHAPE,
             "--hidden=0.5"]
    distill.main(configure(distill.Config, [*flags, f"--out_dir={tmp_path / 'out'}"]))
    assert "all of them trained on" in capfd.readouterr().err
    assert np.isfinite(curve(tmp_path / "out") + curve(tmp_path / "out", "val_bpb")).all()
    distill.main(configure(distill.Config, [*flags, f"--out_dir={tmp_path / 'half'}",
                                            "--max_iters=3", "--lr_decay_iters=6"]))
    go_on(tmp_path / "half", "--max_iters=6")
    assert_same_files(tmp_path / "out", tmp_path / "half")
    with pytest.raises(UserError, match="is text: "):
        distill.main(configure(distill.Config, [*flags[:2], *RUN, *SHAPE, "--generate=4",
                                                f"--out_dir={tmp_path / 'no'}"]))

# ---------------------------------------------------------------------- what is asked only once


def told(folder):
    return list(chats.read_chats(next(folder.glob("*/train.jsonl"))))


def test_the_teacher_s_answers_are_its_own(go, model, words, talk, tmp_path):
    """Greedy, turn by turn, each alone: every assistant's turn is what the teacher says after its
    own earlier ones. Those that do not end are left out, and the validation file stays."""
    out = go("out", "--generate=25", "--generate_tokens=40", "--max_iters=1", "--batch_size=1")
    made = told(tmp_path / "teacher_cache")
    teacher = checkpoint.load_model(model(), "cpu", "float32")
    expected = []
    for record in list(chats.read_chats(talk / "train.jsonl"))[:25]:
        said = []
        for message in record["messages"]:
            if message["role"] == "assistant":
                ids = words.render(said, None, True)[0]
                new = [row[0] for row in generate(
                    teacher, [ids], min(40, max(0, 65 - len(ids))), Sampling(temperature=0),
                    1, words.vocab_size, lambda _, token: token in words.stop_ids)]
                text = words.decode(new[:-1])
                if not new or new[-1] not in words.stop_ids or not text.strip():
                    break
                message = {"role": "assistant", "content": text}
            said.append(message)
        else:
            expected.append({"messages": said})
    assert 2 <= len(made) < 25
    # a batch has the room of its longest prompt: some that would have ended alone may be missing
    assert all(record in expected for record in made) and len(made) > len(expected) / 2
    held = next((tmp_path / "teacher_cache").glob("*/val.jsonl"))
    assert list(chats.read_chats(held)) == list(chats.read_chats(talk / "val.jsonl"))
    assert np.isfinite(curve(out, "val_loss")).all()


def test_answers_are_drawn_from_the_seed_and_go_on_after_a_kill(go, fork, tmp_path):
    """The same seed gives the same answers; killed in its second part, it keeps the first."""
    flags = ["--generate=40", "--generate_temperature=1", "--generate_tokens=30",
             "--batch_size=1", "--max_iters=1"]
    cache = tmp_path / "cache"
    run = fork(*flags, f"--out_dir={tmp_path / 'out'}", f"--cache_dir={cache}",
               kill_at=(r"os\.rename .*\.jsonl\.tmp", 2))
    assert run.wait()[0] == -signal.SIGKILL
    parts, = cache.iterdir()
    assert parts.name[0] == "." and [p.name for p in parts.glob("[0-9]*")] == ["0.jsonl"]
    (parts / "0.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "kept"}, {
        "role": "assistant", "content": "hello"}]}) + "\n")
    go("out", *flags, f"--cache_dir={cache}")
    go("other", *flags)
    go("seed", *flags, "--seed=5", f"--cache_dir={tmp_path / 'seed'}")
    whole, resumed = told(tmp_path / "teacher_cache"), told(cache)
    assert resumed[0]["messages"][0]["content"] == "kept"           # and not made again
    assert resumed[1:] == whole[-len(resumed) + 1:] and whole != told(tmp_path / "seed")
    # every conversation has noise of its own
    assert len({json.dumps(r) for r in whole}) > 0.9 * len(whole) > 9

# ---------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("flags, says", [
    ("--teacher={tmp}/none", "no checkpoint at .*none"),
    ("--init_from={tmp}/none", "no checkpoint at .*none"),
    ("--alpha=1.5", "alpha is 1.5: it must be at most 1"),
    ("--alpha=nan", "alpha is nan"),
    ("--temperature=0", "temperature is 0"),
    ("--temperature=-1", "temperature is -1"),
    ("--divergence=kl", "unknown divergence 'kl'; choose from forward, reverse, js"),
    ("--divergence=js --beta=1", "beta is 1"),
    ("--hidden=-1", "hidden is -1"),
    ("--hidden_layers=1", "give --hidden"),
    ("--hidden=1 --hidden_layers=2", "hidden_layers is 2: student or teacher has only 1"),
    ("--document_mask=1", "document_mask=True has no effect on conversations"),
    ("--generate=4 --generate_tokens=0", "generate_tokens is 0"),
    ("--generate=1 --generate_tokens=1", "ended none of its 1 answers"),
    ("--label_smoothing=0.1", "leave them out"),
    ("--lora_rank=2", "adapters need a student that is there"),
    ("--layers_from_teacher=1 --init_from={teacher}", "leave out --init_from"),
    ("--block_size=65", "block_size 65 is more than the 64 tokens that the teacher"),
    ("--dataset={tmp}/none", "is not prepared"),
    ("--batch_size=0", "batch_size is 0"),
    ("--n_layer=0", "n_layer is 0: it must be at least 1"),
])
def test_a_mistake_is_one_sentence(go, model, tmp_path, flags, says):
    words = flags.format(tmp=tmp_path, teacher=model()).split()
    with pytest.raises(UserError, match=says) as e:
        go("out", *words)
    assert "\n" not in str(e.value) and not (tmp_path / "out" / "checkpoints.json").exists()


def test_on_the_command_line_a_mistake_ends_with_status_2(fork, tmp_path):
    run = fork(f"--teacher={tmp_path}", f"--out_dir={tmp_path / 'out'}")
    assert f"no checkpoint at {tmp_path}" in complaint(run.wait())


def test_without_compilation_the_compiler_is_not_imported():
    """It is as long in coming as PyTorch itself, and the chain starts distill.py six times."""
    done = subprocess.run([sys.executable, "-c", "import sys, distill; "
                           "print('torch._dynamo' in sys.modules)"], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    assert done.stdout == "False\n"


def test_the_teacher_is_found_on_the_demo_s_chain(model, talk, monkeypatch, tmp_path):
    """out/dpo, or out/sft where that is not; or how to make one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="python sft.py config/sft_skills.py.*--teacher=DIR"):
        distill.main(configure(distill.Config, []))
    for name in reversed(distill.TEACHERS):
        Path(name).mkdir(parents=True)
        Path(name, "checkpoints.json").write_text('{"last": "step_000001"}')
        Path(name, "step_000001").symlink_to(model())
        cfg = distill.Config()
        distill.start_student(cfg)
        assert cfg.teacher == f"{name}/step_000001"        # the run may be moved aside


def test_the_shipped_config_resolves():
    """Its student has at most a third of the demo's parameters."""
    path = ROOT / "config" / "distill_skills.py"
    cfg = configure(distill.Config, [str(path)])
    demo = configure(train.Config, [str(ROOT / "config" / "demo.py")])
    sizes = []
    for one in (cfg, demo):
        with torch.device("meta"):
            shape = distill.from_settings(train.replace(one, block_size=256), 16386)
            sizes.append(Transformer(shape).parameter_count())
    assert sizes[0] <= sizes[1] / 3
    distill.check(train.replace(cfg, block_size=256))
    assert "python distill.py config/distill_skills.py" in path.read_text()
