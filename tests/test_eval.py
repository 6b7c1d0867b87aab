"""eval.py counts what is right, and lifecycle.py runs what it shows.

A model that knows nothing, and one whose answers are put into its mouth, are the two ends.
"""
import json
import re
import threading

import pytest
import torch

import checkpoint
import distill
import dpo
import eval as evaluation
from benchmarks import lifecycle
import sft
import tokenizer as tokenizers
from config import UserError, configure
from tasks import skills
from model import ModelConfig, Transformer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model(template): a folder with a tiny model of random weights."""
    words = tokenizers.train(["reverse t a l p? 3 4 + 5 user assistant\n" * 30], 280, workers=1)
    root = tmp_path_factory.mktemp("model")

    def make(template="chatml"):
        words.template = template
        if template:
            words.add_special_tokens([t for t in ("<|im_start|>", "<|im_end|>")
                                      if t not in words.special])
        torch.manual_seed(0)
        shape = ModelConfig.from_family(
            "qwen3", n_layer=1, n_head=2, n_embd=32, vocab_size=words.vocab_size, block_size=64
        )
        net = Transformer(shape)
        with torch.no_grad():
            for p in net.parameters():          # large, so that what is read changes what is said
                p.normal_(0, 0.5)
        return checkpoint.save_model(root / (template or "plain"), net, words)
    # the one without control tokens first: they stay once they are there
    return {"": make(""), "chatml": make("chatml")}


@pytest.fixture
def asked(tmp_path):
    """A folder with a test set: two tasks of skills, and conversations without a task."""
    def turn(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rows = [{"messages": turn("reverse t a l p", "p l a t"), "task": "reverse",
             "answer": "p l a t"},
            {"messages": turn("3 4 + 5", "3 9"), "task": "add", "answer": "3 9"},
            {"messages": turn("hi", "ho") + turn("3 4 + 5 ?", "3 9"), "task": "add",
             "answer": "3 9"},
            {"messages": turn("say t", "t a")}]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def run(folder, data, *flags):
    return evaluation.main(configure(evaluation.Config, [
        f"--model={folder}", f"--dataset={data}", "--device=cpu", *flags]))


def put_words(monkeypatch, tokenizer, words):
    """generate() says words(prompt), whatever the model; returns the prompts it was given."""
    given = []

    def generate(model, prompts, n, how, seed, vocab_size, ends, *rest):
        said = []
        for ids in prompts:
            text = tokenizer.decode(ids)
            given.append(text)
            said.append(tokenizer.encode(words(text), allowed_special="all"))
        over = [False] * len(prompts)
        for k in range(n):
            step = [None] * len(prompts)
            for r, ids in enumerate(said):
                if not over[r] and k < len(ids):
                    step[r] = ids[k]
                    over[r] = ends(r, ids[k])
            yield step
    monkeypatch.setattr(evaluation, "generate", generate)
    return given


def test_right_answers_count_and_no_others(model, asked, monkeypatch, capsys):
    """The form may vary as the checker allows; an answer that does not end is wrong, as is one
    that goes on; each conversation is asked without its last answer; tasks are told apart."""
    tokenizer = checkpoint.load_tokenizer(model["chatml"])
    end = "<|im_end|>"
    said = {"reverse": "p-l-a-t" + end, "say t": "t a b" + end, "hi": "3 9 3 9" + end}

    def words(text):
        return next((v for k, v in said.items() if f"\n{k}" in text), "39." + end)

    given = put_words(monkeypatch, tokenizer, words)
    assert run(model["chatml"], asked, "--wrong=1", "--batch_size=3") == 0.5
    out, err = capsys.readouterr()
    assert re.findall(r"^(\w+) +(\d) of +(\d) +([\d.]+)%$", out, re.M) == [
        ("reverse", "1", "1", "100.0"), ("add", "1", "2", "50.0"), ("all", "0", "1", "0.0")]
    assert out.endswith("accuracy 0.5000 (2 of 4)\n")
    assert "'3 4 + 5 ?' -> '3 9 3 9', not '3 9'" in err and "say t" not in err
    assert all(text.endswith("<|im_start|>assistant\n") for text in given) and len(given) == 4
    assert sum("ho<|im_end|>" in text for text in given) == 1, "what was said before is told"
    said.update(reverse="p l a t", hi="3 9" + end)          # never ends; now right
    assert run(model["chatml"], asked) == 0.5
    said["say t"] = " t a\n" + end
    assert run(model["chatml"], asked) == 0.75
    assert run(model["chatml"], asked, "--limit=1") == 0
    assert "accuracy 0.0000 (0 of 1)" in capsys.readouterr().out


def test_a_text_model_is_asked_in_plain_text(model, asked, monkeypatch):
    """A pretrained model has no turns: the question is a line, and so is its answer."""
    tokenizer = checkpoint.load_tokenizer(model[""])
    given = put_words(monkeypatch, tokenizer, lambda text: "3 9\nand more")
    assert run(model[""], asked) == 0.5
    assert "3 4 + 5\n" in given and "hi\nho\n3 4 + 5 ?\n" in given


def test_a_model_of_random_weights_answers_nothing_right(model, asked, capsys):
    """The whole way, from a folder on disk to a number, with nothing replaced."""
    for folder in model.values():
        assert run(folder, asked, "--max_new_tokens=5") == 0
    assert capsys.readouterr().out.count("accuracy 0.0000 (0 of 4)") == 2


def test_batches_do_not_change_answers(model, asked):
    records = evaluation.read(evaluation.Config(dataset=str(asked)))
    tokenizer = checkpoint.load_tokenizer(model["chatml"])
    net = checkpoint.load_model(model["chatml"], "cpu", "float32")
    one = evaluation.answers(net, tokenizer, records, batch_size=1, max_new_tokens=8)
    assert one == evaluation.answers(net, tokenizer, records, batch_size=4, max_new_tokens=8)
    assert len(set(one)) > 1, "or nothing was compared"


@pytest.mark.parametrize("flags, sentence", [
    (["--split=val"], "val.jsonl is missing: --split=val is no file of"),
    (["--batch_size=0"], "batch_size is 0: it must be at least 1"),
    (["--limit=-1"], "limit is -1: it must be at least 0"),
    (["--model=nowhere"], "nowhere"),
])
def test_mistakes_get_one_sentence(model, asked, flags, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        run(model["chatml"], asked, *flags)
    (asked / "test.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(UserError, match="has no conversation that ends with an answer|nowhere|"
                                        "is missing|it must be"):
        run(model["chatml"], asked, *flags)

# ---------------------------------------------------------------------------- the whole life


@pytest.fixture
def life(monkeypatch, tmp_path):
    """Commands that lifecycle.py starts, which are answered and not run."""
    started = []

    def command(line, threads=0):
        started.append(line)
        return 1.5, "add  1 of 2  50%\naccuracy 0.5000 (1 of 2)\n"
    monkeypatch.setattr(lifecycle, "command", command)
    monkeypatch.setattr(lifecycle, "parameters", lambda folder: 1000)
    monkeypatch.setattr(lifecycle, "last", lambda folder, key:
                        0.95 if (folder, key) == ("out/dpo", "val_accuracy") else
                        0.25 if key == "val_loss" else None)
    return started


def test_the_life_of_a_model_is_its_commands(life, capsys):
    """Every stage once, each in the folder that the next one starts from, every model asked;
    students in folders of their own."""
    lifecycle.main(lifecycle.Config(seeds=2, jobs=1, device="cpu"))
    scripts = [line.split()[0] for line in life]
    assert scripts == ["data/prepare.py"] * 2 + ["train.py", "eval.py", "sft.py", "eval.py",
                       "dpo.py", "eval.py", "lora.py", "eval.py"] + ["distill.py", "eval.py"] * 4
    for k, line in enumerate(life):
        if line.startswith("eval.py"):
            folder = lifecycle.out_dir(line)
            assert folder == lifecycle.out_dir(life[k - 1]) and " --device=cpu" in line
    students = [line for line in life if line.startswith("distill.py")]
    assert len({lifecycle.out_dir(line) for line in students}) == 4
    assert [re.search(r"--seed=(\d)", line)[1] for line in students] == ["0", "1", "0", "1"]
    assert all(line.count("--out_dir") == 1 for line in students)
    assert ["--alpha=1" in line for line in students] == [False, False, True, True]
    rows = capsys.readouterr().out.splitlines()
    assert "| DPO after SFT | 1,000 | 2 | 50.0% | 0.250 | 95.0% |" in rows
    assert "| student without one, seed 1 | 1,000 | 2 | 50.0% | 0.250 |  |" in rows
    assert len([row for row in rows if row.startswith("| ")]) == 1 + 4 + 4


def test_students_share_the_cores(life, monkeypatch, capsys):
    """Two at a time, and LoRA with them, for which nobody waits: one half of the cores each, all
    asked, their rows in the order of the table."""
    both, given = threading.Barrier(2, timeout=30), []
    answer = lifecycle.command

    def command(line, threads=0):
        given.append((line.split()[0], threads))
        if line.startswith("lora.py") or "--seed=0 --out_dir=out/distill_0" in line:
            both.wait()                             # passes only if the two are at it at once
        return answer(line)
    monkeypatch.setattr(lifecycle, "command", command)
    monkeypatch.setattr(lifecycle.os, "sched_getaffinity", lambda pid: range(6), raising=False)
    lifecycle.main(lifecycle.Config(first="dpo", seeds=2, jobs=2, device="cpu"))
    assert given[:2] == [("dpo.py", 0), ("eval.py", 0)]
    assert sorted(given[2:]) == [("distill.py", 3)] * 4 + [("eval.py", 3)] * 5 + [("lora.py", 3)]
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:8]] == [
        "| DPO after SFT", "| LoRA instead of SFT", "| student with a teacher, seed 0",
        "| student with a teacher, seed 1", "| student without one, seed 0",
        "| student without one, seed 1"]


def test_after_a_command_that_fails_no_other_is_begun(life, monkeypatch):
    """An hour of students would hide the one sentence that says what went wrong."""
    answer = lifecycle.command

    def command(line, threads=0):
        if line.startswith("lora.py"):
            raise UserError("the disk is full")
        return answer(line)
    monkeypatch.setattr(lifecycle, "command", command)
    with pytest.raises(UserError, match="the disk is full"):
        lifecycle.main(lifecycle.Config(first="lora", jobs=1, device="cpu"))
    assert life == []


def test_of_two_commands_the_second_is_shown_when_it_is_over(tmp_path, monkeypatch, capfd):
    """Two live lines would overwrite each other; what the hidden one said is not lost."""
    monkeypatch.setattr(lifecycle, "ROOT", tmp_path)
    (tmp_path / "say.py").write_text(
        "import os, sys, time\nprint('said', os.environ.get('OMP_NUM_THREADS'), file=sys.stderr)\n"
        "print('answer')\nsys.exit(int(sys.argv[1]))")
    assert lifecycle.command("say.py 0", threads=5)[1] == "answer\n"
    assert capfd.readouterr().err.split("$ ")[1:] == ["python say.py 0\nsaid 5\n"]
    with lifecycle.SCREEN:
        with pytest.raises(UserError, match="`python say.py 3` ended with status 3"):
            lifecycle.command("say.py 3", threads=1)
        assert capfd.readouterr().err.split("$ ")[1:] == [
            "python say.py 3\n\n", "python say.py 3\nsaid 1\n\n"]
    assert lifecycle.SCREEN.acquire(blocking=False)         # given back, whatever happened
    lifecycle.SCREEN.release()


def test_parameters_are_counted_in_the_last_checkpoint(model):
    net = checkpoint.load_model(model["chatml"], "cpu")
    assert lifecycle.parameters(str(model["chatml"])) == sum(p.numel() for p in net.parameters())


def test_every_stage_starts_from_one_before_it():
    """A stage's init_from or teacher, in its config file, is the folder of an earlier stage."""
    made, read = set(), []
    for name, (title, line) in lifecycle.STAGES.items():
        if not title:
            continue
        file = lifecycle.ROOT / next(w for w in line.split() if w.startswith("config/"))
        source = re.search(r'^(?:init_from|teacher) = "(out/.+)"', file.read_text(), re.M)
        if source:
            assert source[1] in made, f"{name} starts from {source[1]}"
            read.append(name)
        made.add(lifecycle.out_dir(line))
    assert {"sft", "lora", "dpo"} <= set(read)


def test_without_a_flag_each_stage_starts_where_the_one_before_it_wrote():
    """`python sft.py`, `python dpo.py`, `python distill.py`, `python eval.py`: the config files'
    folders, so that they mix with the commands of the chain."""
    pretrained = lifecycle.out_dir(lifecycle.STAGES["pretrain"][1])
    assert sft.Config().init_from == pretrained
    assert dpo.Config().init_from == evaluation.Config().out_dir == sft.Config().out_dir
    assert list(distill.TEACHERS) == [dpo.Config().out_dir, sft.Config().out_dir]
    for name, config in (("sft", sft.Config()), ("dpo", dpo.Config()),
                         ("distill", distill.Config())):
        assert config.out_dir == lifecycle.out_dir(lifecycle.STAGES[name][1])
        assert config.dataset == "skills"


def test_a_life_may_begin_later_and_says_what_is_wrong(life, monkeypatch, capfd):
    lifecycle.main(lifecycle.Config(first="dpo", seeds=1, jobs=1))
    assert life[0].startswith("dpo.py config/dpo_skills.py")
    with pytest.raises(UserError, match="--first='birth'; choose from data, skills, pretrain"):
        lifecycle.main(lifecycle.Config(first="birth"))
    with pytest.raises(UserError, match="--seeds must be at least 1"):
        lifecycle.main(lifecycle.Config(seeds=0))
    with pytest.raises(UserError, match="--jobs at least 0"):
        lifecycle.main(lifecycle.Config(jobs=-1))
    monkeypatch.undo()
    with pytest.raises(UserError, match="`python config/nowhere.py` ended with status 2"):
        lifecycle.command("config/nowhere.py")


def test_tasks_of_skills_are_the_ones_that_are_checked():
    """A record's task and key go to tasks/skills.py, and only then."""
    record = {"messages": [{"content": "39"}], "task": "add", "answer": "3 9"}
    assert evaluation.right(record, "3 9") and evaluation.right(record, "39")
    assert not evaluation.right({**record, "task": "trivia"}, "3 9")
    assert set(skills.TASKS) >= {"add", "reverse"}
