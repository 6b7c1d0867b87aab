"""A step of full fine-tuning and of LoRA is trl's and peft's: the same loss and gradients from the
same weights on the same packed rows.

The trainer is trl's own, with its collator, its loss and its Trainer's step; what it gets are our
rows, as trl keeps packed ones: tokens, labels and the length of each conversation. Both hold
conversations apart, each in its way: ours by `doc` in padded rows, trl's by positions in one long
row without padding.
"""
import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import stages
import checkpoint
from formats.peft import save_adapter
from layers import lora as lora_layers
import tokenizer as tokenizers
import train
from config import UserError
from data import chats
from model import ModelConfig, Transformer

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")    # of the libraries' own names
ROW, ROWS = 64, 3                       # tokens of a row, rows of the step


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """One thread, and none of what the libraries like to say."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder of a tiny Llama, every weight random, norms too; its tokenizer, with a template)."""
    text = "what is 1 + 2? it is 3. be brief. user assistant system hello 4 5 6 7 8 9\n"
    words = tokenizers.train([text * 30], 280, workers=1)
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    words.template = "chatml"
    model = Transformer(
        ModelConfig.from_family(
            "llama",
            vocab_size=words.vocab_size,
            block_size=ROW,
            n_layer=2,
            n_head=4,
            n_kv_head=2,
            n_embd=32,
            intermediate_size=48,
        )
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return checkpoint.save_model(tmp_path_factory.mktemp("peer") / "base", model, words), words


@pytest.fixture(scope="module")
def packed(base):
    """Conversations of one and of two answers, several in most rows, one cut at a row's end."""
    records = []
    for i in range(9):
        turns = [("user", f"{i} + 2?"), ("assistant", f"it is {i + 2}. " * (1 + i % 3))]
        turns += [("user", "be brief"), ("assistant", f"{i + 2}")] * (i % 2)
        records.append({"messages": [{"role": r, "content": c} for r, c in turns]})
    records.append({"messages": [{"role": "user", "content": "hello"},
                                 {"role": "assistant", "content": "hello " * 99}]})
    rows = chats.Packed(chats.render_all(base[1], records, None, ROW + 1), ROWS, ROW)
    # what is compared must have something to go wrong
    assert rows.conversations.cut == 1 and max(map(len, rows.rows)) > 1 and len(rows) >= ROWS
    return rows


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """A file of enough short conversations for benchmarks/stages.py."""
    file = tmp_path_factory.mktemp("talk") / "train.jsonl"
    file.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"what is {i} + 2?"},
        {"role": "assistant", "content": f"it is {i % 3}. "}]}) + "\n" for i in range(99)))
    return file


def their_step(model, packed, folder, tmp_path):
    """(loss, {name: gradient}) of one step of trl's SFTTrainer on the first ROWS rows."""
    rows = []
    for row in packed.rows[:ROWS]:
        parts = [packed.conversations[i] for i in row]
        ids = [t for tokens, _ in parts for t in tokens.tolist()]
        live = [m for _, mask in parts for m in mask.tolist()]
        rows.append({"input_ids": ids, "seq_lengths": [len(tokens) for tokens, _ in parts],
                     "labels": [t if m else -100 for t, m in zip(ids, live)]})
    found = {}

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            found["grads"] = {n: p.grad.clone() for n, p in model.named_parameters()
                              if p.grad is not None}
    args = trl.SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=ROWS,
        max_grad_norm=0.0, report_to="none", save_strategy="no", disable_tqdm=True,
        # rows come packed as they are: trl's collator takes them from here
        padding_free=True, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = trl.SFTTrainer(
        model, args=args, train_dataset=datasets.Dataset.from_list(rows), callbacks=[Watch()],
        processing_class=transformers.AutoTokenizer.from_pretrained(folder))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer.train().training_loss, found["grads"]


def our_step(model, packed):
    """(mean loss, {name: gradient}) of the loss that sft.py hands to fit()."""
    loss = train.next_token_loss(train.Config(), masked=True)
    total, count, _ = loss(model.train(), packed.gather(range(ROWS)))
    (total / count).backward()
    return total.item() / count.item(), {n: p.grad for n, p in model.named_parameters()
                                         if p.grad is not None}


def assert_same(mine, theirs, names):
    """Losses to 1e-5, and every gradient to 1e-4 of its largest entry; names: ours -> theirs."""
    assert math.isfinite(mine[0]) and mine[0] == pytest.approx(theirs[0], rel=1e-5)
    assert sorted(map(names, mine[1])) == sorted(theirs[1])
    for name, grad in mine[1].items():
        other = theirs[1][names(name)]
        assert (grad - other).abs().max() <= 1e-4 * other.abs().max(), name


def test_a_step_of_sft_is_trls(base, packed, tmp_path):
    model = checkpoint.load_model(base[0], "cpu", "float32")
    hf = transformers.AutoModelForCausalLM.from_pretrained(base[0], dtype=torch.float32)
    theirs = their_step(hf, packed, base[0], tmp_path)
    mine = our_step(model, packed)
    # the embedding is the output matrix too: one gradient in both
    assert_same(mine, theirs, lambda name: name)
    # and the test can tell: without the walls between conversations the loss is another
    batch = packed.gather(range(ROWS))
    total, count, _ = train.next_token_loss(train.Config(), masked=True)(
        model, {**batch, "doc": torch.zeros_like(batch["doc"])})
    assert abs(total.item() / count.item() - theirs[0]) > 1e-3


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_step_of_lora_is_trls_with_peft(base, packed, tmp_path, dora):
    model = checkpoint.load_model(base[0], "cpu", "float32")
    lora_layers.add_lora(model, rank=4, alpha=12, dora=dora)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():                   # as if trained: B is no longer zero
        for p in lora_layers.get_parameters(model).values():
            p += torch.empty_like(p).normal_(0.0, 0.1, generator=generator)
    adapter = save_adapter(tmp_path / "adapter", model, base=str(base[0]))
    hf = transformers.AutoModelForCausalLM.from_pretrained(base[0], dtype=torch.float32)
    theirs = their_step(peft.PeftModel.from_pretrained(hf, adapter, is_trainable=True), packed,
                        base[0], tmp_path / "out")
    words = {"A": "lora_A.default.weight", "B": "lora_B.default.weight",
             "magnitude": "lora_magnitude_vector.default.weight"}

    def name_of(name):
        layer, kind = name.split(".adapters.default.")
        return f"base_model.model.{layer}.{words[kind]}"
    assert_same(our_step(model, packed), theirs, name_of)

# ------------------------------------------------------------------- bench.py stages


def test_bench_counts_tokens_between_the_ends_of_steps():
    """The first step warms up; what was spent before the steps counts for each token after."""
    clock = stages.Clock()
    clock.tokens, clock.ends = [1000, 30, 20], [(7.0, 1.0), (8.0, 3.0), (12.0, 5.0)]
    assert clock.compute_rates() == {"tokens/s": 10.0, "CPU tokens/s": 12.5}
    assert clock.compute_rates((0.1, 0.02)) == {"tokens/s": 5.0, "CPU tokens/s": 10.0}


def test_bench_data_is_the_same_conversations_for_all(talk, tmp_path):
    files = stages.write_data(str(talk), tmp_path)
    rows = {name: [json.loads(x) for x in file.read_text().splitlines()]
            for name, file in files.items()}
    assert len(rows["sft"]) == stages.CONVERSATIONS * (stages.STEPS + 2)
    assert rows["lora"] == rows["sft"]
    whole = [row["messages"] for row in rows["sft"]]
    for pair in rows["dpo"]:                # many of these answers are the same
        assert pair["prompt"] + pair["chosen"] in whole
        assert pair["rejected"] != pair["chosen"] and len(pair["rejected"]) == 1
    # and ours reads the pairs as it reads anyone's
    assert len(chats.splits(str(files["dpo"]), "preference")[0]) > len(rows["dpo"]) * 0.8


@pytest.mark.parametrize("wrong, sentence", [
    (dict(only="sft+rl"), "unknown --only=rl; choose from sft, lora, dpo, tuned"),
    (dict(model=""), "--model=DIR"), (dict(), "are needed: try --dataset=stdlib_chat")])
def test_bench_mistakes_are_one_sentence(wrong, sentence, talk, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(talk.read_text().splitlines()[:9]))
    cfg = SimpleNamespace(**{**dict(only="", model="x", dataset=str(few), repeat=1), **wrong})
    with pytest.raises(UserError, match=sentence):
        stages.run_section(cfg)


def test_bench_measures_our_stage_in_a_process(base, talk, tmp_path):
    """What it watches is still there: steps, batches, memory; a failure says what was said."""
    model = Transformer(
        ModelConfig.from_family(
            "llama",
            vocab_size=base[1].vocab_size,
            n_layer=1,
            n_head=2,
            n_embd=16,
            block_size=stages.BLOCK,
        )
    )
    folder = checkpoint.save_model(tmp_path / "long", model, base[1])
    found = stages.measure("ours", "sft", str(folder), talk)
    assert found.keys() == {"tokens/s", "CPU tokens/s", "peak GB"}
    assert found["tokens/s"] > 0 and 0.05 < found["peak GB"] < 8
    with pytest.raises(UserError, match=f"ours sft ended with status 2: .*{ROW}"):
        stages.measure("ours", "sft", str(base[0]), talk)     # rows too short
