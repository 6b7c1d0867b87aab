"""A run is about the model that was meant: its folder, its base, its tokenizer, its settings.

Oracles: the bytes of what was there before, peft and transformers, and logits of the base that an
adapter was trained on. Weights are random, which changes nothing here.
"""
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import distill
import dpo
import lora
from formats import peft
from layers import lora as lora_layers
import sample
import sft
import tokenizer as tokenizers
import train
from config import UserError, configure
from formats import run_folder
from runs import curve, last, quiet_machine, trainer, weights
from training import start
from runs_folders import DATA, RUN, SCRIPTS, TEXT, files, go, made, place, resume, words     # noqa: F401

assert quiet_machine                # a fixture that every test here uses by itself
IDS = torch.arange(40)[None]

# ------------------------------------------------------------------------- a run's own files


def test_a_new_run_moves_its_own_files_and_no_other(go, tmp_path, capfd):
    """out/ holds out/demo, out/base and the user's notes; `train.py` twice leaves them alone."""
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=16"]
    out = go("train", "out", *shape)
    demo = go("train", "out/demo", *shape)
    for name in ("notes.txt", "log.txt", "step_notes.md", "base/config.json", "step_3/x", "old/y"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    first, others = files(out), files(demo)
    go("train", "out", *shape, "--seed=2")
    aside = Path(f"{out}.old1")
    assert f"moved to {aside}" in capfd.readouterr().err
    assert files(demo) == others
    own = {p for p in first if p.parts[0] in ("checkpoints.json", "log.jsonl", "step_000002")}
    assert files(aside) == {p: first[p] for p in own}
    assert {p: files(out)[p] for p in first.keys() - own} == {
        p: first[p] for p in first.keys() - own}
    new, old = weights(last(out)), weights(last(aside))
    assert any(not torch.equal(new[name], old[name]) for name in new)


def test_where_a_folder_cannot_be_renamed_the_files_move_within_it(go, tmp_path, monkeypatch):
    """The working directory, and a link to a folder: their parent or name is not the run's."""
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--max_iters=1"]
    out = go("train", "out", *shape)
    monkeypatch.chdir(out)
    train.main(configure(train.Config, [*shape, "--out_dir=.", f"--dataset={go_data(out)}", *RUN,
                                        "--block_size=16", "--gradient_accumulation_steps=1"]))
    assert last(out / ".old1").is_dir() and last(out).is_dir()
    assert run_folder.find_earlier(out) == [out / ".old1"]
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        go("train", "link", *shape)
    assert (tmp_path / "link").is_symlink() and last(tmp_path / "real.old1").is_dir()


def go_data(out):
    return trainer(last(out))["settings"]["dataset"]


@pytest.mark.parametrize("stage", DATA)
def test_a_second_round_starts_from_its_own_result(go, stage, tmp_path):
    """init_from (of distill the teacher) is in the folder whose files are moved."""
    own = "--teacher" if stage == "distill" else "--init_from"
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=16"] if stage == "distill" else []
    out = go(stage, "out", *shape)
    first = last(out).name
    go(stage, "out", f"{own}={out}", *shape)
    aside = Path(f"{out}.old1")
    settings = trainer(last(out))["settings"]
    assert settings[own[2:]] == str(aside / first) and last(aside).is_dir()
    resume({**SCRIPTS, "lora": sft}[stage], out, "--max_iters=3")
    assert last(out).name == "step_000003"
    if stage == "dpo":                  # the run before as the reference of a new one
        go(stage, "out", f"--reference={out}")
        assert trainer(last(out))["settings"]["reference"] == f"{out}.old2"
    if stage == "distill":              # and a student that goes on itself
        go(stage, "out", f"--init_from={out}")
        assert trainer(last(out))["settings"]["init_from"] == f"{out}.old2/step_000003"

# --------------------------------------------------------------------- an adapter and its base


def logits(folder):
    return checkpoint.load_model(folder, "cpu", "float32").logits(IDS)


def test_an_adapter_finds_its_base_where_it_was_moved_or_stops(go, tmp_path, capsys):
    """Another run took the base's folder; then the whole project was renamed; then it was lost."""
    go("sft", "all/sft")
    out = go("lora", "all/lora", f"--init_from={tmp_path / 'all/sft'}")
    right = logits(last(out))
    go("sft", "all/sft", "--learning_rate=0.03", "--seed=2")

    def merged(root, *flags):
        adapter = last(root / "lora") / "adapter"
        target = tmp_path / f"merged{len(list(tmp_path.iterdir()))}"
        lora.merge_files(lora.Merge(["merge", str(adapter), str(target)], *flags))
        return logits(target)
    assert (merged(tmp_path / "all") - right).abs().max() < 1e-5
    os.rename(tmp_path / "all", tmp_path / "moved")
    assert (merged(tmp_path / "moved") - right).abs().max() < 1e-5
    for _ in range(2):
        resume(sft, tmp_path / "moved/lora", "--max_iters=3")
    said_ = sample.find_model(sample.Config(model=""), {"a": last(tmp_path / "moved/lora")
                                                        / "adapter"})
    assert said_ == tmp_path / "moved/sft.old1/step_000002"
    os.rename(tmp_path / "moved/sft.old1", tmp_path / "elsewhere")
    for attempt in (lambda: merged(tmp_path / "moved"),
                    lambda: resume(sft, tmp_path / "moved/lora", "--max_iters=4")):
        with pytest.raises(UserError, match="moved aside.*--base=DIR"):
            attempt()
    with pytest.raises(UserError, match="--model=DIR"):
        sample.find_model(sample.Config(), {"a": last(tmp_path / "moved/lora") / "adapter"})
    # the user says where it is; another model is refused though it fits
    resume(sft, tmp_path / "moved/lora", "--max_iters=4", f"--base={tmp_path / 'elsewhere'}")
    for wrong in (lambda base: merged(tmp_path / "moved", base),
                  lambda base: resume(sft, tmp_path / "moved/lora", "--max_iters=5",
                                      f"--base={base}"),
                  lambda base: sample.find_model(sample.Config(model=base), {
                      "a": last(tmp_path / "moved/lora") / "adapter"})):
        with pytest.raises(UserError, match="is not the model that .* was trained on"):
            wrong(str(tmp_path / "moved/sft"))


def test_a_base_grown_by_new_tokens_belongs_to_its_run(go, place, words, tmp_path):
    """lora.py twice: the first adapter stays with the base that it was made on. A folder called
    base that is the user's is never replaced."""
    plain = tokenizers.train([TEXT * 30], 280, workers=1)
    checkpoint.save_model(tmp_path / "plain", made(plain), plain)
    flags = [f"--init_from={tmp_path / 'plain'}", "--template=chatml", "--learning_rate=0.1"]
    out = go("lora", "lora", *flags)
    right = logits(last(out))
    checkpoint.save_model(tmp_path / "plain2", made(plain, seed=4), plain)
    go("lora", "lora", f"--init_from={tmp_path / 'plain2'}", *flags[1:])
    aside = Path(f"{out}.old1")
    assert peft.find_base([last(aside) / "adapter"]) == aside / "base"
    lora.merge_files(lora.Merge(["merge", str(last(aside) / "adapter"), str(tmp_path / "m")]))
    assert (logits(tmp_path / "m") - right).abs().max() < 1e-5
    checkpoint.save_model(tmp_path / "out/base", made(words, seed=5), words)
    before = files(tmp_path / "out/base")
    with pytest.raises(UserError, match="which no run has made: choose another --out_dir"):
        go("lora", "out", *flags)
    assert files(tmp_path / "out") == {Path("base") / p: data for p, data in before.items()}


def test_two_adapters_of_different_bases_are_not_added_up(place, words, tmp_path):
    folders = []
    for name in ("base", "other"):
        model = checkpoint.load_model(place / name, "cpu")
        lora_layers.add_lora(model, rank=2)
        folders.append(peft.save_adapter(tmp_path / name, model, base=str(place / name)))
    assert peft.find_base(folders[:1]) == place / "base"
    with pytest.raises(UserError, match="trained on different models"):
        peft.find_base(folders)


@pytest.mark.parametrize("change", ["a byte in the middle", "config.json", "a shard"])
def test_a_fingerprint_sees_any_change_and_no_move(place, tmp_path, change, monkeypatch):
    monkeypatch.setattr(run_folder, "BLOCK", 1000)          # many blocks
    shutil.copytree(place / "base", tmp_path / "copy")
    before = run_folder.fingerprint(place / "base")
    assert run_folder.fingerprint(tmp_path / "copy") == before
    (tmp_path / "copy" / "README.md").write_text("notes")
    assert run_folder.fingerprint(tmp_path / "copy") == before
    if change == "config.json":
        file = tmp_path / "copy" / "config.json"
        file.write_text(file.read_text().replace("10000", "20000"))
    elif change == "a shard":
        (tmp_path / "copy" / "model-00002-of-00002.safetensors").write_bytes(b"x")
    else:
        file = tmp_path / "copy" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert run_folder.fingerprint(tmp_path / "copy") != before


def test_cached_references_and_teachers_are_looked_for_by_fingerprint(go, place, tmp_path):
    """dpo.py: the reference's run was repeated and the cache lost; distill.py: the teacher's."""
    go("sft", "sft")
    out = go("dpo", "dpo", f"--init_from={tmp_path / 'sft'}")
    student = go("distill", "student", f"--teacher={tmp_path / 'sft'}", "--n_layer=1",
                 "--n_head=2", "--n_embd=16")
    kept = {p.name: np.load(p) for p in out.glob("reference_*.npy")}
    go("sft", "sft", "--seed=2", "--learning_rate=0.03")
    for file in out.glob("reference_*.npy"):
        file.unlink()
    resume(dpo, out, "--max_iters=3")
    assert {p.name: np.load(p) for p in out.glob("reference_*.npy")}.keys() == kept.keys()
    assert all(np.array_equal(np.load(out / name), values) for name, values in kept.items())
    resume(distill, student, "--max_iters=3")
    assert trainer(last(student))["settings"]["teacher"] == str(
        tmp_path / "sft.old1" / "step_000002")
    shutil.rmtree(tmp_path / "sft.old1")
    with pytest.raises(UserError, match="teacher of .* is gone or has changed.*--teacher=DIR"):
        resume(distill, student, "--max_iters=4")
    resume(distill, student, "--max_iters=4", f"--teacher={place / 'base'}")

# ------------------------------------------------------------------- peft's adapters on lm_head


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_pefts_adapters_on_the_output_matrix_open_here(words, tmp_path, tied, targets):
    """PEFT saves the frozen matrix with them: equal to the model's, or refused. Tied: it changes
    what is read out alone, here and when the merged model is saved."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM
    base = checkpoint.save_model(tmp_path / "base", made(words, tie_word_embeddings=tied), words)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base),
                            LoraConfig(target_modules=targets, r=4))
    torch.manual_seed(3)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    wanted = theirs(IDS).logits.detach()
    model = checkpoint.load_model(base, "cpu")
    peft.load_adapter(tmp_path / "adapter", model)
    assert (model.logits(IDS) - wanted).norm() < 1e-5 * wanted.norm()
    peft.load_adapter(tmp_path / "adapter", model, "again")    # beside the one that is there
    lora_layers.activate(model, "again")
    assert (model.logits(IDS) - wanted).norm() < 1e-5 * wanted.norm()
    lora_layers.activate(model, "default")
    # ours, saved again, opens in peft; merged, it is a plain checkpoint of transformers
    peft.save_adapter(tmp_path / "ours", model, base=str(base))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours")
    assert (again(IDS).logits - wanted).norm() < 1e-5 * wanted.norm()
    checkpoint.save_model(tmp_path / "merged", lora_layers.merge(model), words)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (merged(IDS).logits - wanted).norm() < 1e-5 * wanted.norm()
    other = made(words, seed=9, tie_word_embeddings=tied)
    with pytest.raises(UserError, match="lm_head has other weights"):
        peft.load_adapter(tmp_path / "adapter", other)
    assert other.config.tie_word_embeddings == tied and not lora_layers.find_lora_layers(other)


def test_a_base_is_not_replaced_by_the_model_that_is_merged_from_it(go, place, tmp_path):
    base = shutil.copytree(place / "base", tmp_path / "base")
    out, before = go("lora", "out", f"--init_from={base}"), files(base)
    with pytest.raises(UserError, match="is the base of .*choose another folder"):
        lora.merge_files(lora.Merge(["merge", str(out), f"{tmp_path}/x/../base"]))
    assert files(base) == before
    lora.merge_files(lora.Merge(["merge", str(out), str(tmp_path / "new")]))


def test_an_embedding_that_peft_saved_beside_an_adapter_is_compared(words, tmp_path):
    """save_embedding_layers=True, which peft chooses itself after the vocabulary was resized."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    base = checkpoint.save_model(tmp_path / "base", made(words), words)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base),
                            LoraConfig(target_modules=["q_proj"], r=4))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(UserError, match="is an adapter, not a model.*lora.py merge"):
        checkpoint.resolve(tmp_path / "adapter")
    peft.load_adapter(tmp_path / "adapter", checkpoint.load_model(base, "cpu"))
    with pytest.raises(UserError, match="(embed_tokens|lm_head) has other weights"):
        peft.load_adapter(tmp_path / "adapter", made(words, seed=9))


def test_an_adapter_of_an_moe_model_with_a_router_bias_opens_right_in_peft(go, words, tmp_path):
    """The correction bias has no place in an adapter: it stays, so base + adapter is the
    checkpoint beside it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base = checkpoint.save_model(tmp_path / "base", made(words, "glm4_moe", n_layer=2), words)
    out = go("lora", "out", f"--init_from={base}", "--targets=q_proj,o_proj", "--max_iters=8",
             "--learning_rate=0.01", "--router_bias_rate=0.001")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base),
                                       last(out) / "adapter")
    wanted = theirs(IDS).logits.detach()
    assert (logits(last(out)) - wanted).norm() < 1e-5 * wanted.norm()
    assert (logits(base) - wanted).norm() > 1e-3 * wanted.norm()

# ------------------------------------------------------------------------- data and tokenizers


def test_data_of_another_tokenizer_is_refused_and_equal_vocabularies_pass(go, place, words,
                                                                          tmp_path):
    """Two vocabularies of one size; one of them with more tokens behind; and a resumed run whose
    data was prepared anew."""
    more = tokenizers.load(place / "words")
    more.add_special_tokens(["<|tool|>"])
    checkpoint.save_model(tmp_path / "more", made(more), more)
    out = go("train", "out", f"--init_from={tmp_path / 'more'}")
    assert curve(out) and checkpoint.read_config(out).vocab_size == more.vocab_size
    text = "quite another text, of words that differ: 0 1 2 3 4 5\n"
    other = tokenizers.train([text * 30], 280, workers=1)
    other.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    assert other.vocab_size == words.vocab_size
    checkpoint.save_model(tmp_path / "other", made(other), other)
    with pytest.raises(UserError, match="another tokenizer than the model of .*--tokenizer="):
        go("train", "no", f"--init_from={tmp_path / 'other'}")
    assert not (tmp_path / "no").exists()
    data = shutil.copytree(place / "ready", tmp_path / "ready")
    out = go("train", "again", f"--dataset={data}", "--n_layer=1", "--n_head=2", "--n_embd=16")
    other.save(data)
    with pytest.raises(UserError, match="another tokenizer than the model of"):
        resume(train, out, "--max_iters=3")


def test_a_run_is_resumed_by_the_script_that_made_it(go, place):
    """Data of one kind would do for both: a student would go on without its teacher."""
    student = ["--n_layer=1", "--n_head=2", "--n_embd=16"]
    made = {"sft": go("sft", "sft"), "distill": go("distill", "distill", *student),
            "train": go("train", "train", *student)}
    for name, other in (("distill", sft), ("sft", distill), ("sft", train), ("train", sft)):
        before = files(made[name])
        with pytest.raises(UserError, match=f"is one of {name}.py, .*resume it with that"):
            resume(other, made[name], "--max_iters=3")
        assert files(made[name]) == before
    text = go("distill", "text", *student, f"--dataset={place / 'ready'}", "--block_size=16")
    with pytest.raises(UserError, match="is one of distill.py"):
        resume(train, text, "--max_iters=3")


@pytest.mark.parametrize("stage", ["sft", "dpo", "distill"])
def test_to_evaluate_on_nothing_is_refused_and_no_loss_of_zero(go, place, tmp_path, stage, capsys):
    """A file of few records holds none out; a folder with a file to validate on does."""
    flags = ["--eval_only=1"]
    flags += {"dpo": [f"--reference={place / 'other'}"],
              "distill": ["--n_layer=1", "--n_head=2", "--n_embd=16"]}.get(stage, [])
    with pytest.raises(UserError, match="holds nothing out .*nothing to evaluate"):
        go(stage, "out", *flags)
    assert not capsys.readouterr().out
    for name in ("train", "val"):
        (tmp_path / "both").mkdir(exist_ok=True)
        shutil.copy(place / f"{DATA[stage]}.jsonl", tmp_path / "both" / f"{name}.jsonl")
    go(stage, "out", *flags, f"--dataset={tmp_path / 'both'}")
    value = float(capsys.readouterr().out.split("val_loss ")[1].split()[0])
    assert value > 0.01


def test_a_classifier_is_no_base_of_a_chat_model(go, place):
    """Its label tokens would stay, by which sample.py and eval.py know one."""
    mail = [f"--dataset={place / 'mail.jsonl'}"]
    out = go("classify", "out", *mail)
    for stage in ("sft", "dpo"):
        with pytest.raises(UserError, match="is a classifier, .*start from the model"):
            go(stage, "no", f"--init_from={out}")
    assert curve(go("classify", "again", *mail, f"--init_from={out}"))


@pytest.mark.parametrize("stage", ["train", "sft", "dpo", "distill"])
def test_a_resumed_run_notices_that_its_data_changed(go, place, tmp_path, stage):
    """The same tokenizer, one more record: refused, unless the data is named once more. A copy of
    the data under another name is the same."""
    name = {"train": "ready"}.get(stage, f"{DATA.get(stage)}.jsonl")
    source, data = place / name, tmp_path / name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, data)
    flags = [f"--dataset={data}"]
    flags += {"train": ["--n_layer=1", "--n_head=2", "--n_embd=16"],
              "distill": [f"--teacher={place / 'base'}", "--init_from=scratch", "--n_layer=1",
                          "--n_head=2", "--n_embd=16"]}.get(stage, [])
    out = go(stage, "out", *flags)
    resume(SCRIPTS[stage], out, "--max_iters=3")
    if stage == "train":
        shard = np.load(data / "train_00000.npy")
        np.save(data / "train_00000.npy", shard[::-1].copy())       # of the same length
    else:
        line = data.read_text().splitlines()[0]
        data.write_text(data.read_text() + line + "\n")
    before = files(out)
    with pytest.raises(UserError, match=f"dataset {data} has changed .*--dataset={data}"):
        resume(SCRIPTS[stage], out, "--max_iters=4")
    assert files(out) == before
    resume(SCRIPTS[stage], out, "--max_iters=4", f"--dataset={data}")
    resume(SCRIPTS[stage], out, "--max_iters=5")            # which is what the run has now


def test_of_large_data_its_length_and_pages_count(tmp_path):
    data = bytearray(b"abcdefgh" * (1 << 22))               # 32 MB: a page every half
    file, seen = tmp_path / "a.jsonl", set()
    for change in (lambda: None, lambda: data.insert(5 << 20, 65), lambda: data.pop(),
                   lambda: data.append(66)):
        change()
        file.write_bytes(data)
        seen.add(run_folder.fingerprint_data(file))
    assert len(seen) == 4


def test_gpt2s_vocabulary_is_one_in_any_file(words):
    """Token by token: what another file calls the same is the same."""
    again = tokenizers.from_json(words._json())
    assert start.find_difference(words, again) is start.find_difference(again, words) is None
    again.add_special_tokens(["<|more|>"])
    assert start.find_difference(words, again) is None
    assert start.find_difference(again, words) == words.vocab_size

# ------------------------------------------------------------------------ published models


LAYOUTS = {"name": "{name}", "organisation": "openai-community/{name}",
           "cache": "models--openai-community--{name}/snapshots/5f91d94",
           "old cache": "models--{name}/snapshots/5f91d94"}


@pytest.mark.parametrize("name", start.PRETRAINED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpt2_means_openais_weights(place, tmp_path, layout, name, monkeypatch):
    folder = tmp_path / LAYOUTS[layout].format(name=name)
    shutil.copytree(place / "base", folder)
    if layout == "cache":               # refs/main names the current one of several snapshots
        shutil.copytree(place / "other", folder.with_name("0000000"))
        (folder.parents[1] / "refs").mkdir()
        (folder.parents[1] / "refs" / "main").write_text("5f91d94\n")
    assert start.find_pretrained(name, str(tmp_path)) == str(folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert start.find_pretrained(name) == str(folder)
    with pytest.raises(UserError, match=f"hf download openai-community/{name}.*--hub_dir=DIR.*"
                                        f"--preset={name}"):
        start.find_pretrained(name, str(tmp_path / "none"))
    if layout in ("name", "organisation"):      # the model's own folder is taken too
        assert start.find_pretrained(name, str(folder)) == str(folder)
    if layout == "name":                # a folder of that name here is what is meant
        monkeypatch.chdir(tmp_path)
        assert start.find_pretrained(name) == name


def test_training_goes_on_from_gpt2_in_a_hub_folder(go, place, words, tmp_path):
    """Its weights, not random ones of its shape; and --preset is the shape alone."""
    torch.manual_seed(7)
    checkpoint.save_model(tmp_path / "gpt2", made(words, "gpt2", block_size=32), words)
    out = go("train", "out", "--init_from=gpt2", f"--hub_dir={tmp_path}", "--learning_rate=0",
             "--weight_decay=0")
    before, after = weights(tmp_path / "gpt2"), weights(last(out))
    assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(UserError, match="--init_from=qwen3-0.6b is no folder.*--preset=qwen3-0.6b"):
        go("train", "no", "--init_from=qwen3-0.6b")
    with pytest.raises(UserError, match="--hub_dir=.* has no effect"):
        go("train", "no", f"--init_from={place / 'base'}", f"--hub_dir={tmp_path}")


def test_gpt2_without_its_tokenizer_wants_data_of_gpt2s(go, words, tmp_path):
    """Its weights alone, as save_pretrained leaves them, say nothing of the tokens."""
    folder = checkpoint.save_model(tmp_path / "gpt2", made(words, "gpt2", block_size=32), words)
    for name in start.VOCABULARIES:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="another tokenizer than gpt2: .*--tokenizer=gpt2"):
        go("train", "out", "--init_from=gpt2", f"--hub_dir={tmp_path}")
    # the ids of "Hello world" and others, as OpenAI's published examples have them
    made_up = types.SimpleNamespace(tokens={15496: b"Hello", 995: b" world", 262: b" the", 0: b"!",
                                            220: b" ", 50256: b"<|endoftext|>"})
    start.check_gpt2_tokens("x", made_up, "gpt2")
