"""A classifier is trained, and applied as it was trained: classify.py, sample.py and eval.py beside
transformers."""
import csv
import random
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import classify
from inference.labels import LABEL, get_label_ids, get_text_length, predict_labels
import sft
import checkpoint
import eval as evaluation
import sample
import tokenizer as tokenizers
from config import UserError, configure
from model import ModelConfig, Transformer
from runs import curve, last, log, same, weights
from test_sft import RUN, base, talk, words                   # noqa: F401

LABELS = ("ham", "spam", "a b")
TEXTS = ["hello", "what is 1 + 2? it is 3", "<|label:ham|> be brief <|endoftext|>", "naïve 🐈 " * 9,
         "it is 3. " * 40]
CLASSIFY = ["--max_iters=40", "--learning_rate=1e-2", "--eval_interval=20"]


@pytest.fixture(scope="session")
def mail(tmp_path_factory):
    """A table of 120 texts, spam or ham, which one word tells apart; every 20th validates."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("mail") / "mail.csv"
    rows = ["label,text"]
    for _ in range(120):
        label = rng.choice(("ham", "spam"))
        word = {"ham": "hello", "spam": "it is 9"}[label]
        rows.append(f'{label},"what, {rng.randrange(9)} {word} {rng.randrange(9)}"')
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def go(base, mail, tmp_path):                                                       # noqa: F811
    """go(name, *flags): train a classifier in this process into tmp_path/name, and return that."""
    def start(name, *flags):
        out = tmp_path / name
        classify.main(configure(classify.Config, [f"--init_from={base()}", f"--dataset={mail}",
                                                  f"--out_dir={out}", *RUN, *flags]))
        return out
    return start


def go_on(out, *flags):
    return classify.main(configure(classify.Config, ["--init_from=resume", f"--out_dir={out}",
                                                     "--device=cpu", *flags]))


@pytest.fixture(scope="module", params=["qwen3", "gemma2", "gpt2"])
def classifier(request, words, tmp_path_factory):                                   # noqa: F811
    """A checkpoint of random weights with three labels, as classify.py leaves one."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp(request.param)
    words.save(folder)
    tokenizer = tokenizers.load(folder)
    tokenizer.add_special_tokens([LABEL.format(name) for name in LABELS])
    tokenizer.settings["model_max_length"] = 40
    model = Transformer(
        ModelConfig.from_family(
            request.param,
            n_layer=2,
            n_head=2,
            n_embd=32,
            block_size=64,
            vocab_size=tokenizer.vocab_size,
        )
    )
    with torch.no_grad():
        for p in model.parameters():            # far from a tie, and soft-capped ones capped
            p.add_(torch.randn_like(p) * 0.3)
    return checkpoint.save_model(folder / "m", model, tokenizer)


def run(config, main, *flags):
    return main(configure(config, [*flags, "--device=cpu"]))


def label(folder, *flags):
    return run(sample.Config, sample.main, f"--model={folder}", *flags)


def test_labels_and_probabilities_are_those_of_transformers(classifier, tmp_path, capsys):
    """One text, a file, the lines of a file; long texts cut at the length of training."""
    model = AutoModelForCausalLM.from_pretrained(classifier, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    assert tokenizer.model_max_length == 40
    ends = tokenizer.convert_tokens_to_ids([LABEL.format(name) for name in LABELS])
    expected = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        ids = [tokenizer.convert_tokens_to_ids("<|endoftext|>"), *ids][:40]
        with torch.no_grad():
            p = model(torch.tensor([ids])).logits[0, -1, ends].softmax(-1)
        order = p.argsort(descending=True).tolist()
        expected.append([LABELS[order[0]], *((LABELS[k], float(p[k])) for k in order)])
    assert len({row[0] for row in expected}) > 1, "or nothing is told apart"

    def said():
        rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        return [[row[0], *((pair[:-7], float(pair[-6:])) for pair in row[1:])] for row in rows]

    def same(got, wanted):
        assert [r[0] for r in got] == [r[0] for r in wanted]
        for g, w in zip(got, wanted):
            assert [n for n, _ in g[1:]] == [n for n, _ in w[1:]]
            assert [p for _, p in g[1:]] == pytest.approx([p for _, p in w[1:]], abs=6e-5)
    for text, row in zip(TEXTS, expected):
        label(classifier, f"--prompt={text}")
        same(said(), [row])
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    label(classifier, f"--file={file}", "--lines")
    same(said(), expected)
    file.write_text(TEXTS[1] + "\n", encoding="utf-8")
    label(classifier, f"--file={file}")
    same(said(), [expected[1]])


def test_lines_end_where_a_text_files_lines_end(classifier, tmp_path, capsys):
    """As Python's own open() reads them: U+2028, form feeds and the like stand within a text."""
    texts = ["one\x0btwo", "a\u2028b\x85c", "x\x0cy", "\x1c 3"]
    file = tmp_path / "texts.txt"
    file.write_bytes("\r\n".join(texts).encode())
    with open(file, encoding="utf-8") as lines:
        expected = [line.rstrip("\n") for line in lines]
    assert expected == texts
    out = []
    for text in expected:
        label(classifier, f"--prompt={text}")
        out.append(capsys.readouterr().out)
    label(classifier, f"--file={file}", "--lines")
    assert capsys.readouterr().out == "".join(out)


def test_what_eval_says_of_data_that_is_none(classifier, tmp_path):
    with pytest.raises(UserError, match="this is a classifier: name its labelled texts"):
        run(evaluation.Config, evaluation.main, f"--model={classifier}")
    (tmp_path / "a.csv").write_text("text,kind\na,b\n")
    for flags in ([], ["--split=val"]):
        with pytest.raises(UserError, match="needs a text and a label") as e:
            run(evaluation.Config, evaluation.main, f"--model={classifier}",
                f"--dataset={tmp_path / 'a.csv'}", *flags)
        assert "skip_bad" not in str(e.value), "a flag that eval.py has not"


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """train, val and test tables; long texts whose ends differ."""
    folder, rng = tmp_path_factory.mktemp("letters"), random.Random(0)
    for split, n in (("train", 30), ("val", 12), ("test", 17)):
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["label", "text"])
            for _ in range(n):
                size = rng.choice((3, 60))
                rows.writerow([rng.choice(("ham", "spam")), "".join(
                    rng.choice(" 123456789?") for _ in range(size))])
    return folder


def test_eval_computes_what_sft_computes(go, letters, capsys):                      # noqa: F811
    """The report of the validation set, printed by both; and each text's loss, whose cut is that
    of training (24 tokens here, of a model that reads 64)."""
    out = go("out", f"--dataset={letters}", "--max_iters=2", "--block_size=24")
    report = capsys.readouterr().out
    folder = checkpoint.resolve(out)
    right = run(evaluation.Config, evaluation.main, f"--model={out}", f"--dataset={letters}",
                "--split=val", "--batch_size=5")
    assert capsys.readouterr().out == report and f"{right:.4f}" in report
    run(evaluation.Config, evaluation.main, f"--model={out}", f"--dataset={letters}", "--limit=16")
    assert "of 16)" in capsys.readouterr().out
    run(evaluation.Config, evaluation.main, f"--model={out}", f"--dataset={letters}", "--wrong=99")
    shown = capsys.readouterr()
    assert "of 17)" in shown.out and 0 < shown.err.count("', not '") < 17
    # each text by itself, with the loss of training
    model, tokenizer = checkpoint.load_model(folder, "cpu"), checkpoint.load_tokenizer(folder)
    ids = list(get_label_ids(tokenizer).values())
    _, records = evaluation.read_split(evaluation.Config(dataset=str(letters)), "labels")
    found = predict_labels(model, tokenizer, [r["text"] for r in records],
                                   get_text_length(tokenizer, model.config), 4)
    for record, p in zip(records, found):
        (row, mask), = classify.render_texts(tokenizer, [record], 25)
        batch = {"ids": torch.tensor(row[None, :-1]).long(), "doc": None,
                 "targets": torch.where(torch.tensor(mask[1:]), torch.tensor(row[1:]), -100)[None]}
        with torch.no_grad():
            loss = float(classify.class_loss(classify.Config(), ids)(model, batch)[0])
        truth = ["ham", "spam"].index(record["label"])
        assert loss == pytest.approx(-float(p[truth].log()), abs=1e-5)


def test_a_single_file_is_split_as_in_training(go, mail, capsys):                   # noqa: F811
    out = go("out", f"--dataset={mail}", "--max_iters=2")
    report = capsys.readouterr().out
    flags = [f"--model={out}", f"--dataset={mail}"]
    run(evaluation.Config, evaluation.main, *flags, "--split=val")
    assert capsys.readouterr().out == report
    for split, count in (("--split=train", 114), ("--limit=0", 120)):
        run(evaluation.Config, evaluation.main, *flags, split)
        assert f"of {count})" in capsys.readouterr().out
    with pytest.raises(UserError, match="one file, without a split 'test'"):
        run(evaluation.Config, evaluation.main, *flags, "--split=test")


@pytest.mark.parametrize("flags, says", [
    (["--chat"], "is a classifier, which labels a text and cannot chat"),
    (["--prompt=a", "--num_samples=2"], "--num_samples has no effect on a classifier"),
    (["--prompt=a", "--temperature=0"], "--temperature has no effect on a classifier"),
    ([], "there is no text to label"),
    (["--prompt= "], "there is no text to label")])
def test_what_a_classifier_cannot_do_is_one_sentence(classifier, flags, says, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match=says):
        label(classifier, *flags)


def test_eval_of_a_classifier_refuses_other_data(classifier, talk, tmp_path):       # noqa: F811
    def ask(*flags):
        return run(evaluation.Config, evaluation.main, f"--model={classifier}", *flags)
    file = tmp_path / "a.csv"
    file.write_text("text,label\nhello,ham\nhi,eggs\n", encoding="utf-8")
    with pytest.raises(UserError, match="the label 'eggs', the classifier only ham, spam, a b"):
        ask(f"--dataset={file}")
    with pytest.raises(UserError, match="--think has no effect on a classifier"):
        ask(f"--dataset={file}", "--think=0")
    with pytest.raises(UserError, match="text and a label"):
        ask(f"--dataset={talk / 'train.jsonl'}")

# ------------------------------------------------------------------------------- training


def test_a_classifier_learns_and_prints_its_confusion_matrix(go, mail, capfd):
    """Accuracy and counts by truth and answer on stdout; labels and head in the checkpoint, where
    transformers finds them: the likeliest label token at the end of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out = go("out", f"--dataset={mail}", *CLASSIFY)
    stdout, stderr = capfd.readouterr()
    assert "2 labels: ham, spam" in stderr
    lines = stdout.splitlines()
    assert lines[0] == "accuracy 1.0000 (6 of 6)"
    counts = [line.split() for line in lines[2:]]
    assert [c[0] for c in counts] == ["ham", "spam"]
    assert sum(int(n) for c in counts for n in c[1:]) == 6
    assert log(out)[-2]["accuracy"] > 0.9
    assert list(get_label_ids(checkpoint.load_tokenizer(out))) == ["ham", "spam"]
    theirs = AutoModelForCausalLM.from_pretrained(last(out))
    words = AutoTokenizer.from_pretrained(last(out))
    for text, label in (("what, 3 hello 4", "ham"), ("what, 3 it is 9 4", "spam")):
        ids = [words.convert_tokens_to_ids("<|endoftext|>")] + words(text).input_ids
        with torch.no_grad():
            z = theirs(torch.tensor([ids])).logits[0, -1]
        names = [f"<|label:{n}|>" for n in ("ham", "spam")]
        assert names[z[words.convert_tokens_to_ids(names)].argmax()] == f"<|label:{label}|>"
    # asked again, the checkpoint gives the same answer, and learns nothing
    before = weights(last(out))
    classify.main(configure(classify.Config, [
        f"--init_from={out}", f"--dataset={mail}", "--eval_only=1", "--device=cpu",
        "--dtype=float32"]))
    assert capfd.readouterr().out.endswith("\n".join(lines) + "\n")
    assert same(before, weights(last(out)))


def test_a_classifier_resumes_bit_for_bit(go, mail):
    flags = [f"--dataset={mail}", *CLASSIFY, "--max_iters=10"]
    straight = go("straight", *flags)
    halves = go("halves", *flags, "--max_iters=5", "--lr_decay_iters=10", "--eval_interval=5")
    go_on(halves, "--max_iters=10", "--eval_interval=20")
    assert same(weights(last(straight)), weights(last(halves)))
    assert curve(straight) == curve(halves)


def test_the_last_block_alone_learns(go, mail):
    """The rest of the weights stay bit for bit, new rows of the embedding included."""
    out = go("out", f"--dataset={mail}", *CLASSIFY, "--unfreeze=last", "--eval_interval=1",
             "--max_iters=2", "--keep=5")
    one, two = (weights(out / f"step_{n:06d}") for n in (1, 2))
    changed = {k for k in one if not torch.equal(one[k], two[k])}
    assert changed == {k for k in one if k.startswith(("model.layers.1.", "model.norm", "lm_head"))}


def test_a_table_of_its_own_columns(go, tmp_path, capfd):
    """UCI's lines, label TAB text; and columns by name, which --text_key and --label_key say."""
    lines = [f"{'spam' if k % 2 else 'ham'}\twhat, {k} \"{k % 2}" for k in range(40)]
    (tmp_path / "SMSSpamCollection").write_text("\n".join(lines) + "\n")
    (tmp_path / "a.tsv").write_text("\n".join(["Category\tMessage", *lines]) + "\n")
    few = [*CLASSIFY, "--max_iters=1", "--eval_interval=1"]
    one = go("one", f"--dataset={tmp_path / 'SMSSpamCollection'}", *few)
    two = go("two", f"--dataset={tmp_path / 'a.tsv'}", *few, "--text_key=message",
             "--label_key=category")
    assert same(weights(last(one)), weights(last(two)))
    assert capfd.readouterr().err.count("2 labels: ham, spam") == 2


@pytest.mark.parametrize("table, says", [
    ("text,label\na,x\nb,x\n", "all records have the label 'x'"),
    ("text,kind\na,x\n", "line 2: a record to classify needs a text and a label"),
    ("text,label\n" + "a,x\nb,y\n" * 9 + "a,x\na,z\n",
     "unknown label 'z'; the training records or the checkpoint have x, y")],
    ids=["one", "none", "new"])
def test_labels_that_cannot_be_learnt_are_one_sentence(go, tmp_path, table, says):
    path = tmp_path / "a.csv"
    path.write_text(table)
    with pytest.raises(UserError, match=says):
        go("out", f"--dataset={path}", *CLASSIFY)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_to_be_something_else_is_told(go, mail, tmp_path):
    """Two ways to say what trains; a classifier as the base of a chat model; a run of sft.py's."""
    with pytest.raises(UserError, match="leave one out"):
        go("out", "--unfreeze=last", "--lora_rank=4")
    with pytest.raises(UserError, match="unknown unfreeze 'most'; choose from all, last"):
        go("out", "--unfreeze=most")
    with pytest.raises(UserError, match="--template=chatml has no effect on a classifier"):
        go("out", "--template=chatml")
    out = go("out", *CLASSIFY, "--max_iters=1", "--eval_interval=1")
    with pytest.raises(UserError, match="is one of classify.py"):
        sft.main(configure(sft.Config, ["--init_from=resume", f"--out_dir={out}", "--device=cpu"]))
    with pytest.raises(UserError, match="is a classifier"):
        sft.main(configure(sft.Config, [f"--init_from={out}", f"--dataset={mail}",
                                        f"--out_dir={tmp_path / 'chat'}", "--device=cpu"]))


def test_a_run_of_when_sft_was_the_script_of_both_goes_on(go):
    out = go("out", *CLASSIFY, "--max_iters=1", "--eval_interval=1")
    file = last(out) / "trainer.pt"
    saved = torch.load(file)
    saved["script"] = "sft.py"
    saved["settings"] |= {"task": "classify", "n_layer": 2}
    torch.save(saved, file)
    go_on(out, "--max_iters=2")
    assert len(curve(out)) == 2
