"""sft.py as its user meets it: a text model becomes a chat model, and a run is one run.

Weights of the checkpoints that fine-tuning starts from are random: what is tested here does not
depend on what they know. Runs in processes of their own are forks, as in test_train.py.
"""
import json
import math
import os
import random
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import sft
import tokenizer as tokenizers
import train
from config import UserError, configure
from data import chats
from training.machine import Machine
from model import ModelConfig, Transformer
from runs import (
    Grads,
    assert_same_run,
    close,
    complaint,
    curve,
    forks_of,
    last,
    quiet_machine,
    ranks,
    said,
    same,
    starter,
    trainer,
    weights,
)

ROOT = train.Path(sft.__file__).parent
U, A = "user", "assistant"
assert quiet_machine                # a fixture that every test here uses by itself
RUN = ["--batch_size=3", "--gradient_accumulation_steps=2", "--max_iters=10", "--eval_interval=5",
       "--eval_iters=3", "--learning_rate=3e-3", "--warmup_iters=2", "--device=cpu",
       "--dtype=float32", "--log_interval=1"]


def sums(n, seed):
    """Conversations about one-digit sums, some with a second question or a system turn."""
    rng, out = random.Random(seed), []
    for _ in range(n):
        turns = ["system", "be brief"] if rng.random() < .2 else []
        for _ in range(rng.choice((1, 1, 1, 2))):
            a, b = rng.randrange(6), rng.randrange(6)
            turns += [U, f"{a} + {b}?", A, f"it is {a + b}"]
        out.append({"messages": said(*turns)})
    return out


@pytest.fixture(scope="session")
def words():
    text = "hello, what is 1 + 2? it is 3. be brief. user assistant naïve 🐈 4 5 6 7 8 9\n"
    return tokenizers.train([text * 30], 290, workers=1)


@pytest.fixture(scope="session")
def base(words, tmp_path_factory):
    """base(family): a checkpoint of random weights with a tokenizer without a chat template."""
    made = {}

    def make(name="qwen3", **shape):
        key = (name, *shape.items())
        if key not in made:
            torch.manual_seed(1)
            flags = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=words.vocab_size,
                         block_size=64, **shape)
            made[key] = checkpoint.save_model(
                tmp_path_factory.mktemp("base") / name,
                Transformer(ModelConfig.from_family(name, **flags)),
                words,
            )
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
def go(base, talk, tmp_path):
    """go(name, *flags): fine-tune in this process into tmp_path/name; returns that folder."""
    def start(name, *flags, start_from=None):
        out = tmp_path / name
        sft.main(configure(sft.Config, [f"--init_from={start_from or base()}", f"--dataset={talk}",
                                        f"--out_dir={out}", *RUN, *flags]))
        return out
    return start


def go_on(out, *flags):
    return sft.main(configure(sft.Config, ["--init_from=resume", f"--out_dir={out}",
                                           "--device=cpu", *flags]))


forks = forks_of("sft")


@pytest.fixture
def fork(forks, base, talk, tmp_path):
    """fork(*flags): start sft.py in a process; name its folder with --out_dir."""
    return starter(forks, tmp_path, lambda: [f"--init_from={base()}", f"--dataset={talk}", *RUN])


def prepared(base_dir, talk, block_size=64, batch_size=4, seed=3):
    """(model with rows for the control tokens, tokenizer, packed conversations)."""
    cfg = sft.Config(init_from=str(base_dir), block_size=block_size, device="cpu")
    tokenizer, shape = checkpoint.load_tokenizer(base_dir), checkpoint.read_config(base_dir)
    known = tokenizer.vocab_size
    sft.settle(cfg, shape, tokenizer)
    model = train.build_model(cfg, 0, Machine(torch.device("cpu"), torch.float32))
    sft.grow(model, tokenizer.vocab_size, known)
    records = chats.read_chats(talk / "train.jsonl")
    rendered = chats.render_all(tokenizer, records, None, block_size + 1)
    return model, tokenizer, chats.Packed(rendered, batch_size, block_size, seed=seed)

# ----------------------------------------------------------- packed rows are conversations alone


@pytest.mark.parametrize("name, shape", [
    ("qwen3", {}), ("llama", {"n_kv_head": 1}), ("gemma3", {"sliding_window": 8}),
    ("glm4_moe", {"num_experts": 4}), ("olmo2", {}), ("gpt2", {})])
def test_packed_logits_are_those_of_each_conversation_alone(base, talk, name, shape):
    """Attention, windows, positions and experts: nothing crosses from one to its neighbour."""
    model, _, packed = prepared(base(name, **shape), talk)
    batch = packed.gather(range(min(6, len(packed))))
    together = model.logits(batch["ids"], doc=batch["doc"])
    several = 0
    for b in range(len(together)):
        for k, i in enumerate(packed.rows[b]):
            ids = torch.from_numpy(packed.conversations[i][0]).long()[None]
            place = (batch["doc"][b] == k).nonzero()[:, 0]
            alone = model.logits(ids)[0, :len(place)]
            assert (together[b, place] - alone).abs().max() < 2e-5
            several += k > 0
    assert several


def oracle(base_dir, model, tokenizer, tmp_path):
    """The same weights in transformers."""
    from transformers import AutoModelForCausalLM
    path = checkpoint.save_model(tmp_path / "hf", model, tokenizer)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32,
                                                attn_implementation="eager")


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
def test_loss_and_gradients_of_a_packed_batch_are_those_of_transformers(base, talk, tmp_path,
                                                                        name):
    """transformers reads each conversation alone, with labels; sum over all / tokens of all."""
    model, tokenizer, packed = prepared(base(name), talk)
    batch = packed(0)
    loss = train.next_token_loss(sft.Config(), masked=True)
    value, count, _ = loss(model, batch)
    (value / count).backward()
    theirs = oracle(base(name), model, tokenizer, tmp_path)
    total, tokens = 0.0, 0
    for row in packed.epoch(0)[:4]:
        for i in packed.rows[row]:
            ids, mask = packed.conversations[i]
            ids = torch.from_numpy(ids).long()
            labels = ids.masked_fill(~torch.from_numpy(mask), -100)
            logits = theirs(ids[None]).logits[0]
            total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
            tokens += int(mask.sum())
    assert tokens == count
    (total / tokens).backward()
    assert abs((total / tokens).item() - (value / count).item()) < 1e-5
    mine, other = model.model.embed_tokens.weight.grad, theirs.get_input_embeddings().weight.grad
    assert (mine - other).norm() / other.norm() < 1e-4
    one, two = (torch.stack([p.grad.norm() for p in m.parameters()]).norm()
                for m in (model, theirs))
    assert abs(one - two) / two < 1e-4


def test_a_packed_row_with_positions_is_the_same_in_transformers(base, talk, tmp_path):
    """Their own way to pack: position_ids that start anew and a mask over blocks."""
    model, tokenizer, packed = prepared(base("llama"), talk)
    batch = packed.gather(range(4))
    theirs = oracle(base("llama"), model, tokenizer, tmp_path)
    doc, T = batch["doc"], packed.block_size
    positions = torch.stack([torch.cat([torch.arange(int(n)) for n in d.unique_consecutive(
        return_counts=True)[1]]) for d in doc])
    sees = (doc[:, :, None] == doc[:, None]) & torch.ones(T, T, dtype=torch.bool).tril()
    mask = torch.zeros(4, 1, T, T).masked_fill(~sees[:, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        want = theirs(batch["ids"], attention_mask=mask, position_ids=positions).logits
    assert (model.logits(batch["ids"], doc=doc) - want).abs().max() < 2e-5

# ------------------------------------------------------------------------- one run is one run


@pytest.mark.parametrize("flags", [["--dropout=0.1"], ["--optimizer=muon", "--dtype=bfloat16"]],
                         ids=["adamw", "muon"])
def test_10_steps_are_5_and_5_more_bit_for_bit(go, flags):
    straight = go("straight", *flags)
    halves = go("halves", *flags, "--max_iters=5", "--lr_decay_iters=10")
    go_on(halves, "--max_iters=10")
    assert_same_run(straight, halves)


CALM = "--learning_rate=1e-3"


def test_a_batch_of_8_is_4_times_2(go):
    whole = go("whole", CALM, "--batch_size=8", "--gradient_accumulation_steps=1")
    parts = go("parts", CALM, "--batch_size=2", "--gradient_accumulation_steps=4",
               "--eval_iters=12")
    close(whole, parts)
    a, b = weights(last(whole)), weights(last(parts))
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


def test_one_rank_is_two_ranks(go, fork, tmp_path):
    """9 rows for 2 ranks, whose shares have unequal numbers of tokens to train on."""
    rows = [CALM, "--batch_size=3", "--gradient_accumulation_steps=3"]
    one, two = go("one", *rows), tmp_path / "two"
    outcomes = [r.wait() for r in ranks(fork, 2, *rows, f"--out_dir={two}")]
    assert [o[0] for o in outcomes] == [0, 0], outcomes
    assert outcomes[0][2].count("inherited") == 1 and "inherited" not in outcomes[1][2]
    close(one, two)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_trained_token_weighs_the_same(base, talk, batch_size):
    """The gradient of a step is that of the mean over all answers' tokens of the batch."""
    model, _, packed = prepared(base(), talk)
    batch = packed(0)
    batch["targets"][1, 20:] = -100                 # unequal rows, and one without any
    batch["targets"][2] = -100
    cfg = sft.Config(batch_size=batch_size, block_size=64, grad_clip=0.0)
    optimizer = Grads(model)
    done = train.take_step(cfg, model, batch, train.next_token_loss(cfg, masked=True),
                           Machine(torch.device("cpu"), torch.float32), optimizer, train.State(),
                           False)
    logits = model(batch["ids"], doc=batch["doc"])
    mean = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    assert abs(done.metrics["loss"] - mean.item()) < 1e-5
    want = torch.autograd.grad(mean, [p for _, p in model.named_parameters()])
    for got, grad in zip(optimizer.last.values(), want):
        assert (got - grad).norm() <= 1e-4 * grad.norm() + 1e-7


def test_a_batch_without_any_target_changes_nothing(go, monkeypatch):
    """0 / 0 is nan for ever after in other projects; the loader goes on."""
    gather = chats.Packed.__call__

    def masked(self, step):
        batch = gather(self, step)
        batch["targets"].fill_(-100) if step == 3 else None
        return batch
    monkeypatch.setattr(chats.Packed, "__call__", masked)
    out = go("out")
    assert curve(out)[3] == 0.0 and np.isfinite(curve(out) + curve(out, "val_loss")).all()
    assert curve(out, "skipped")[-1] == 0


def test_conversations_longer_than_a_row_do_not_stop_it(go, tmp_path):
    path = tmp_path / "long.jsonl"
    records = [{"messages": said(U, "hello", A, "it is " * 200)}] * 30 + [
        {"messages": said(U, "what " * 200, A, "3")}] * 30 + sums(30, 2)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    out = go("out", f"--dataset={path}")
    assert np.isfinite(curve(out) + curve(out, "val_loss")).all() and min(curve(out)) > 0


def test_asked_to_stop_it_says_how_to_go_on(go, fork, tmp_path):
    """The command in the sentence is sft.py's, and ends the run as if it had never stopped."""
    flags = ["--max_iters=60", "--eval_interval=60", "--dropout=0.1"]
    out = tmp_path / "out"
    asked = fork(*flags, f"--out_dir={out}")
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < 3:
        train.time.sleep(0.005)
    os.kill(asked.pid, signal.SIGTERM)
    status, stdout, stderr = asked.wait()
    assert status == 128 + signal.SIGTERM and stdout == "", stderr
    words = re.search(r"go on with: python sft.py (.*)\n\Z", stderr)[1].split()
    sft.main(configure(sft.Config, [*words, "--device=cpu"]))
    assert_same_run(go("straight", *flags), out)


def test_killed_it_goes_on_to_the_same_weights(go, fork, tmp_path):
    flags = ["--max_iters=40", "--eval_interval=4", "--eval_iters=1"]
    out = tmp_path / "out"
    killed = fork(*flags, f"--out_dir={out}")
    while not (out / "checkpoints.json").exists():
        train.time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait()[0] == -signal.SIGKILL
    go_on(out)
    assert_same_run(go("straight", *flags), out)

# --------------------------------------------------------------------- what the checkpoint knows


def test_new_tokens_get_rows_and_the_old_ones_stay(base, talk):
    """Tied or not: old logits unchanged; new rows near the old ones, the same in every run, and
    different from each other: with a frozen matrix equal rows would be one token for ever."""
    for tied in (True, False):
        path = base("llama", tie_word_embeddings=tied)
        old = checkpoint.load_model(path, "cpu")
        model, tokenizer, _ = prepared(path, talk)
        again, _, _ = prepared(path, talk)
        assert same(dict(model.named_parameters()), dict(again.named_parameters()))
        assert (old.config.vocab_size, model.config.vocab_size) == (290, 292)
        assert tokenizer.special["<|im_start|>"] == 290
        ids = torch.arange(290).view(10, 29)
        assert (model.logits(ids)[..., :290] - old.logits(ids)).abs().max() < 1e-6
        for grown, before in ((model.model.embed_tokens.weight, old.model.embed_tokens.weight),
                              (model.output_weight, old.output_weight)):
            z = (grown[290:] - before.mean(0)) / before.std(0)
            assert 0.6 < z.std() < 1.4 and z.abs().max() < 5
            assert (grown[290] - grown[291]).norm() > before.std(0).norm() / 2


def test_rows_that_pad_the_matrix_are_used():
    """A vocabulary rounded up to a multiple has room: the matrix keeps its size."""
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig.from_family("llama", n_layer=1, n_head=2, n_embd=32, vocab_size=320)
    )
    before = model.model.embed_tokens.weight.clone()
    sft.grow(model, 292, 290)
    after = model.model.embed_tokens.weight
    assert model.config.vocab_size == 320 == len(after)
    changed = (after != before).any(1).nonzero()[:, 0].tolist()
    assert changed == [290, 291]


def test_the_result_opens_in_transformers_with_its_template(go):
    """Weights, vocabulary, template and the token that ends a turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out = last(go("out", "--max_iters=2"))
    theirs = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = said(U, "1 + 2?")
    mine = checkpoint.load_tokenizer(out)
    ids = mine.render(messages, add_generation_prompt=True)[0]
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                return_dict=False)
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits
    assert (checkpoint.load_model(out, "cpu").logits(torch.tensor([ids])) - want).abs().max() < 1e-5
    assert mine.special["<|im_end|>"] in theirs.generation_config.eos_token_id


def test_a_second_stage_inherits_what_the_first_one_left(go, capfd):
    """Block size, template and settings are told once, and the vocabulary grows once."""
    first = go("first", "--max_iters=2")
    said_first = capfd.readouterr().err
    assert "block size 64, a tokenizer of 290 ids" in said_first
    assert "template chatml, whose tokens <|im_start|> <|im_end|> are new" in said_first
    second = go("second", "--max_iters=2", start_from=first)
    said_second = capfd.readouterr().err
    assert "block size 64, a tokenizer of 292 ids, template chatml" in said_second
    assert "are new" not in said_second
    settings = trainer(last(second))["settings"]
    assert settings["block_size"] == 64 and "n_layer" not in settings
    assert checkpoint.read_config(second).vocab_size == 292
    third = go("third", "--max_iters=2", "--template=zephyr", start_from=first)
    assert checkpoint.load_tokenizer(third).template == "zephyr"
    assert "template zephyr instead of chatml" in capfd.readouterr().err


def test_a_models_own_template_is_trained_with_and_kept(go, capfd):
    """An edited copy of a known one counts as it is; --template= takes its place."""
    first = go("first", "--max_iters=2")
    folder = checkpoint.resolve(first)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    own = settings["chat_template"].replace("<|im_start|>user\\n", "<|im_start|>user: ")
    assert own != settings["chat_template"]
    file.write_text(json.dumps({**settings, "chat_template": own}))
    capfd.readouterr()
    second = go("second", "--max_iters=2", start_from=folder)
    assert "the checkpoint's own chat template" in capfd.readouterr().err
    tokenizer = checkpoint.load_tokenizer(second)
    assert (tokenizer.template, tokenizer.jinja) == (None, own)
    ids, mask = tokenizer.render([{"role": "user", "content": "1"}, {"role": "assistant",
                                                                     "content": "2"}])
    assert tokenizer.decode(ids).startswith("<|im_start|>user: 1<|im_end|>")
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "2<|im_end|>"
    third = go("third", "--max_iters=2", "--template=zephyr", start_from=second)
    assert "template zephyr instead of the checkpoint's own" in capfd.readouterr().err
    assert checkpoint.load_tokenizer(third).template == "zephyr"


def test_epochs_say_how_many_steps(go, capfd):
    """Two epochs of the rows, six at a time; on resuming, another number of them."""
    out = go("out", "--max_iters=0", "--epochs=2")
    text = capfd.readouterr().err
    rows = int(re.search(r"in (\d+) rows", text)[1])
    steps = math.ceil(2 * rows / 6)         # every row is seen, as transformers' Trainer does
    assert len(curve(out)) == steps == checkpoint.load_trainer(last(out))["settings"]["max_iters"]
    assert f"\n{steps} steps of 6 rows are {steps * 6 / rows:.4g} epochs\n" in text
    go_on(out, "--epochs=3")
    assert len(curve(out)) == math.ceil(3 * rows / 6)


def test_show_prints_what_is_trained_on_and_writes_nothing(base, talk, tmp_path, capfd):
    out = tmp_path / "out"
    sft.main(configure(sft.Config, [f"--init_from={base()}", f"--dataset={talk}", "--show=2",
                                    f"--out_dir={out}", "--device=cpu"]))
    stdout, stderr = capfd.readouterr()
    assert not out.exists() and "% full" in stderr
    answers = {f"it is {n}<|im_end|>" for n in range(11)}
    shown = re.findall("⟦(.*?)⟧", stdout)
    assert len(shown) >= 2 and set(shown) <= answers
    assert {m for m in re.findall("row (\\d)", stdout)} == {"0", "1"}


def test_a_sample_on_the_way_is_an_answer(go, capfd):
    go("out", "--sample_interval=10")
    text = re.search(r"--- sample at step 10\n(.*)\n---", capfd.readouterr().err, re.DOTALL)[1]
    assert re.search(r"<\|im_start\|>user\n\d \+ \d\?<\|im_end\|>\n<\|im_start\|>assistant\n", text)


def test_bad_records_are_counted(go, talk, tmp_path, capfd):
    path = tmp_path / "a.jsonl"
    path.write_text((talk / "train.jsonl").read_text() + '{"messages": 5}\n' * 3)
    with pytest.raises(UserError, match="line 121: messages is int"):
        go("out", f"--dataset={path}")
    go("out", f"--dataset={path}", "--skip_bad=1", "--max_iters=1")
    assert "3 bad records skipped" in capfd.readouterr().err


def test_without_validation_data_it_trains_and_saves(go, talk, tmp_path):
    folder = tmp_path / "only"
    folder.mkdir()
    few = (talk / "train.jsonl").read_text().splitlines(keepends=True)[:chats.HELD_OUT - 1]
    (folder / "train.jsonl").write_text("".join(few))
    out = go("out", f"--dataset={folder}", "--always_save_checkpoint=0")
    assert last(out).name == "step_000010" and not curve(out, "val_loss")


@pytest.mark.parametrize("flags, says", [
    ("--init_from={tmp}/none", "no checkpoint at .*none"),
    ("--init_from=resume --out_dir={tmp}/none", "no checkpoint at .*none"),
    ("--dataset=nosuch", "nosuch is not prepared: run `python data/prepare.py nosuch`"),
    ("--dataset={tmp}/empty.jsonl", "no conversation with an answer"),
    ("--dataset={tmp}/bad.jsonl", "bad.jsonl, line 1: .*--skip_bad=1"),
    ("--block_size=65", "block_size 65 is more than the 64 tokens"),
    ("--template=nosuch", "unknown chat template 'nosuch'"),
    ("--document_mask=0", "leave it out"), ("--n_layer=7", "the shape of the checkpoint"),
    ("--rope_theta=5", "the shape of the checkpoint"), ("--unfreeze=last", "classify.py"),
    ("--batch_size=0", "batch_size is 0"),
    ("--max_iters=-1", "max_iters is -1"),
    ("--schedule=step", "unknown schedule 'step'; choose from cosine"),
    ("--task=classify", "python classify.py"), ("--sample_prompt=x", "leave it out"),
    ("--eval_only=1 --lora_rank=2", "lora_rank=2 has no effect with --eval_only"),
])
def test_a_mistake_is_one_sentence_and_status_2(fork, tmp_path, flags, says):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    words = flags.format(tmp=tmp_path).split()
    if not any(w.startswith("--out_dir") for w in words):
        words.append(f"--out_dir={tmp_path / 'out'}")
    assert re.search(says, complaint(fork(*words).wait()))
    assert not (tmp_path / "out").exists()


def test_without_a_trained_model_it_says_where_one_comes_from(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="python train.py config/demo.py.*--init_from=DIR"):
        sft.main(configure(sft.Config, []))


def test_as_a_user_it_learns_to_answer(base, talk, tmp_path):
    """On the command line: sums up to 5 + 5, then a chat in which it answers and stops."""
    def python(*argv):
        done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True,
                              text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return done.stdout
    out = tmp_path / "out"
    assert python("sft.py", f"--init_from={base()}", f"--dataset={talk}", f"--out_dir={out}",
                  "--device=cpu", "--epochs=30", "--learning_rate=1e-2", "--optimizer=muon",
                  "--dtype=float32", "--eval_interval=1000") == ""
    losses = curve(out)
    assert curve(out, "val_loss")[-1] < losses[0] / 5
    answer = python("sample.py", f"--out_dir={out}", "--chat", "--prompt=2 + 3?",
                    "--temperature=0", "--device=cpu")
    assert re.fullmatch(r"it is \d+\n", answer)


def test_keys_that_nobody_reads_stop_and_the_flag_is_kept_on_resume(go, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({**r, "mask": "x", "source": "y"}) + "\n"
                            for r in sums(40, 0)))
    with pytest.raises(UserError, match=r"line 1: unknown key 'mask'.*--ignore_keys=mask"):
        go("out", f"--dataset={path}")
    out = go("out", f"--dataset={path}", "--ignore_keys=mask,other", "--max_iters=1",
             "--eval_interval=1")
    go_on(out, "--max_iters=2")
    told = capsys.readouterr().err
    assert told.count("as --ignore_keys says: mask (40), other (0)\n") == 2
    assert told.count("as they describe records: source (40)\n") == 2 and len(curve(out)) == 2


def test_the_shipped_config_resolves():
    path = ROOT / "config" / "sft_skills.py"
    cfg = configure(sft.Config, [str(path)])
    train.check(train.replace(cfg, block_size=256, max_iters=1))
    assert (cfg.dataset, cfg.init_from) == ("skills", "out/demo")
    assert "python sft.py config/sft_skills.py" in path.read_text()
