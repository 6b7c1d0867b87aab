"""Adapters on disk: what peft opens of ours, what we open of peft's, damaged files.
"""
import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers as T

import sft
from training.settings import Lora
import lora
from formats.peft import (
    check_ranks,
    save_adapter,
    load_adapter,
    read_adapter_config,
    CONFIG,
    WEIGHTS,
)
from layers import lora as lora_layers
from checkpoint import load_model, save_model
from config import UserError
from conftest import ROOT
from lora_base import OPTIONS, away, build, ids_of, our_loss, stir
T.logging.set_verbosity_error()
T.logging.disable_progress_bar()

peft = pytest.importorskip("peft")


def saved(tmp_path, name="llama", **changes):
    """(model, the same in transformers)."""
    model = build(name, **changes)
    save_model(tmp_path / "base", model)
    return model, T.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()

# ------------------------------------------------------------------------------ against peft


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradients_are_pefts(tmp_path, options):
    """The same adapter on the same Llama: loss and the gradient of every A, B and magnitude."""
    model, hf = saved(tmp_path)
    lora_layers.add_lora(model, rank=4, alpha=12, **options)
    stir(model)
    save_adapter(tmp_path / "adapter", model, base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter", is_trainable=True).train()
    ids = ids_of()
    loss, other = our_loss(model.train(), ids), theirs(ids, labels=ids).loss
    loss.backward()
    other.backward()
    assert loss.item() == pytest.approx(other.item(), rel=1e-5)
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    words = {"A": "lora_A.default.weight", "B": "lora_B.default.weight",
             "magnitude": "lora_magnitude_vector.default.weight"}
    own = lora_layers.get_parameters(model)
    assert len(own) == len(wanted)
    for name, p in own.items():
        layer, kind = name.split(".adapters.default.")
        assert away(p.grad, wanted[f"base_model.model.{layer}.{words[kind]}"]) < 1e-4, name


@pytest.mark.parametrize("name, targets", [
    *((name, targets) for name in ("llama", "gpt2", "glm4", "qwen2")
      for targets in ("", "q_proj,v_proj,down_proj", "o_proj")),
    ("glm4_moe", "q_proj,k_proj,v_proj,o_proj"), ("qwen3_moe", "")])
def test_peft_opens_ours(tmp_path, name, targets):
    """Logits in peft are ours, also where q, k, v or gate, up are one matrix there, and what is
    read back is the very adapter that was saved."""
    options = OPTIONS["both"] if targets else {}
    model, hf = saved(tmp_path, name)
    lora_layers.add_lora(model, rank=3, alpha=6, dropout=0.1, targets=targets, **options)
    stir(model)
    save_adapter(tmp_path / "adapter", model, base="elsewhere")
    ids = ids_of()
    theirs = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter")
    with torch.no_grad():
        assert away(theirs.eval()(ids).logits, model.logits(ids)) < 1e-5
    again = build(name)
    load_adapter(tmp_path / "adapter", again, "other")
    assert torch.equal(again.logits(ids), model.logits(ids))
    mine, its = lora_layers.get_parameters(model), lora_layers.get_parameters(again, "other")
    assert [n.replace(".default.", ".other.") for n in mine] == list(its)
    assert all(torch.equal(a, b) for a, b in zip(mine.values(), its.values()))
    layer = next(iter(lora_layers.get_adapter(again, "other").values()))
    assert (layer.dropout, layer.alpha, layer.rslora) == (0.1, 6, bool(targets))


@pytest.mark.parametrize("rslora", [False, True])
def test_the_output_matrix_and_ranks_of_their_own(tmp_path, rslora):
    """lm_head has an adapter where it is named, of its own rank at everybody's scale; it gets the
    gradients that peft's gets, and its file is one that peft opens."""
    model, hf = saved(tmp_path, tie_word_embeddings=False)
    made = lora_layers.add_lora(model, rank=4, alpha=6, targets="q_proj,lm_head:2", rslora=rslora)
    assert list(made) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
                          "lm_head"]
    ranks = {n: (len(a.A), a.scale) for n, a in lora_layers.get_adapter(model).items()}
    assert {r for r, _ in ranks.values()} == {2, 4} and ranks["lm_head"][0] == 2
    scale = 6 / 4 ** (0.5 if rslora else 1)
    assert all(s == pytest.approx(scale) for _, s in ranks.values())
    stir(model)
    save_adapter(tmp_path / "adapter", model, base="elsewhere")
    theirs = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter", is_trainable=True)
    ids = ids_of()
    our_loss(model, ids).backward()
    theirs(ids, labels=ids).loss.backward()
    their = {n: p.grad for n, p in theirs.named_parameters() if "lm_head.lora_" in n}
    head = lora_layers.get_adapter(model)["lm_head"]
    for ours, letter in ((head.A, "A"), (head.B, "B")):
        assert away(ours.grad, next(g for n, g in their.items() if f"lora_{letter}" in n)) < 1e-4
    with torch.no_grad():
        assert away(theirs(ids).logits, model.logits(ids)) < 1e-5
    again = build(tie_word_embeddings=False)
    load_adapter(tmp_path / "adapter", again)
    assert torch.equal(again.logits(ids), model.logits(ids))
    before = model.logits(ids)
    assert away(lora_layers.merge(model).logits(ids), before) < 1e-5
    with pytest.raises(UserError, match="names no linear layer"):       # tied: there is none
        lora_layers.add_lora(build(tie_word_embeddings=True), targets="lm_head")


def test_a_base_in_halves_is_saved_in_full(tmp_path):
    """A frozen base whose weights are bfloat16 is held as such (halve()); what is saved of it with
    its adapter is float32 all the same: bfloat16 would round the adapter's share away."""
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    lora_layers.add_lora(model, rank=3)
    lora_layers.halve(model)
    assert all(la.weight.dtype == torch.bfloat16
               for la in lora_layers.find_lora_layers(model).values())
    stir(model)
    ids = ids_of()
    before = model.logits(ids)
    save_model(tmp_path / "merged", model)
    for again in (lora.load_model(tmp_path / "merged", "cpu"),
                  T.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()):
        with torch.no_grad():
            logits = again.logits(ids) if hasattr(again, "logits") else again(ids).logits
        assert away(logits, before) < 1e-5
    stored = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}


def test_what_is_one_matrix_on_disk_has_one_rank():
    """GPT-2's q, k and v are c_attn in its files, and so is their adapter: told before training."""
    model = build("gpt2")
    lora_layers.add_lora(model, targets="q_proj:2,v_proj")
    with pytest.raises(UserError, match="c_attn is one matrix on disk"):
        check_ranks(model)
    model = build("gpt2")
    lora_layers.add_lora(model, targets="q_proj:2,v_proj:2,o_proj:3")
    check_ranks(model)


def same_files(folder):
    """What we wrote of peft's adapter is, tensor for tensor, what peft wrote."""
    files = [safetensors.torch.load_file(folder / who / WEIGHTS) for who in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(t, files[1][n]) for n, t in files[0].items())


@pytest.mark.parametrize("options", [
    dict(r=4, lora_alpha=10, target_modules="all-linear"),
    dict(r=4, lora_alpha=10, use_dora=True, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    dict(r=2, target_modules=["q_proj", "v_proj", "gate_proj"], layers_to_transform=[1],
         rank_pattern={"v_proj": 5, "model.layers.1.mlp.gate_proj": 3},
         alpha_pattern={"q_proj": 7}),
    dict(r=2, target_modules=r".*layers\.0\.(self_attn\.[kv]_proj|mlp\.down_proj)")])
def test_pefts_open_here(tmp_path, options):
    """What peft trained and saved gives its logits here, and saved again is the same file."""
    model, hf = saved(tmp_path)
    theirs = peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = ids_of()
    load_adapter(tmp_path / "theirs", model)
    with torch.no_grad():
        assert away(model.logits(ids), theirs(ids).logits) < 1e-5
    save_adapter(tmp_path / "ours", model)
    same_files(tmp_path)
    back = peft.PeftModel.from_pretrained(
        T.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    with torch.no_grad():
        assert away(back(ids).logits, theirs(ids).logits) < 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_pefts_of_gpt2_open_here(tmp_path, dora):
    """c_attn has one A for q, k and v, and Conv1D keeps its weight transposed; the file we write
    of it has the same A again, and not three."""
    model, hf = saved(tmp_path, "gpt2")
    theirs = peft.get_peft_model(hf, peft.LoraConfig(
        r=4, task_type="CAUSAL_LM", fan_in_fan_out=True, use_dora=dora,
        target_modules=["c_attn", "mlp.c_proj"])).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = ids_of()
    assert len(load_adapter(tmp_path / "theirs", model)) == 2 * 4
    with torch.no_grad():
        assert away(model.logits(ids), theirs(ids).logits) < 1e-5
    save_adapter(tmp_path / "ours", model)
    same_files(tmp_path)
    settings = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert settings["target_modules"] == ["c_attn", "mlp.c_proj"]

# ------------------------------------------------------------------------- files, and faults


@pytest.fixture
def adapter(tmp_path):
    """A good adapter of a tiny Llama: (its folder, its tensors, its settings)."""
    model = build()
    lora_layers.add_lora(model, rank=2, targets="q_proj,down_proj")
    stir(model)
    folder = save_adapter(tmp_path / "adapter", model)
    return (folder, safetensors.torch.load_file(folder / WEIGHTS),
            json.loads((folder / CONFIG).read_text()))


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
DAMAGE = {
    "missing tensor": (lambda t, s: t.pop(f"{KEY}B.weight"), "lacks tensor '.*q_proj.lora_B"),
    "missing layer": (lambda t, s: (t.pop(f"{KEY}A.weight"), t.pop(f"{KEY}B.weight")),
                      "lacks tensor '.*q_proj.lora_A"),
    "no tensors": (lambda t, s: t.clear(), "no adapter in it"),
    "wrong width": (lambda t, s: t.update({f"{KEY}A.weight": torch.zeros(2, 31)}),
                    r"lora_A.weight of model.layers.1.* \(2, 31\).*\(2, 32\)"),
    "wrong dimensions": (lambda t, s: t.update({f"{KEY}A.weight": torch.zeros(64)}), r"\(64,\)"),
    "integers": (lambda t, s: t.update({f"{KEY}A.weight": torch.zeros(2, 32).int()}), "I32"),
    "wrong rank": (lambda t, s: s.update(r=3), "rank 3"),
    "wrong rank of one": (lambda t, s: s.update(rank_pattern={"q_proj": 5}), "rank 5"),
    "unknown module": (lambda t, s: t.update({KEY.replace("q_proj", "w_proj") + "A.weight":
                                              torch.zeros(2, 32)}), "w_proj.* belongs to another"),
    "a layer too many": (lambda t, s: t.update({KEY.replace("layers.1", "layers.7") + "A.weight":
                                                torch.zeros(2, 32)}), "belongs to another model"),
    "not an adapter": (lambda t, s: t.update({"model.norm.weight": torch.zeros(2)}),
                       "another method"),
    "a stray magnitude": (lambda t, s: t.update({f"{KEY}magnitude_vector": torch.zeros(32)}),
                          "magnitude"),
    "dora without magnitudes": (lambda t, s: s.update(use_dora=True), "magnitude_vector"),
    "other method": (lambda t, s: s.update(peft_type="IA3"), "peft_type = 'IA3'"),
    "no method": (lambda t, s: s.pop("peft_type"), "peft_type = None"),
    "moved base": (lambda t, s: s.update(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    "more modules": (lambda t, s: s.update(modules_to_save=["lm_head"]), "modules_to_save"),
    "rank as text": (lambda t, s: s.update(r="2"), "'2' cannot be an adapter's r"),
    "rank true": (lambda t, s: s.update(r=True), "True cannot be"),
    "huge rank": (lambda t, s: s.update(r=10 ** 12), "cannot be an adapter's r"),
    "alpha nan": (lambda t, s: s.update(lora_alpha=float("nan")), "nan cannot be"),
    "dropout one": (lambda t, s: s.update(lora_dropout=1), "cannot be an adapter's lora_dropout"),
    "pattern that never ends": (lambda t, s: s.update(rank_pattern={"(a+)+$": 2}),
                                "cannot be an adapter's rank_pattern"),
    "settings of no object": (lambda t, s: s.update(alpha_pattern=[1]), "alpha_pattern"),
}


@pytest.mark.parametrize("damage, sentence", DAMAGE.values(), ids=DAMAGE)
def test_hostile_adapters_are_one_sentence_and_change_nothing(adapter, damage, sentence):
    folder, tensors, settings = adapter
    damage(tensors, settings)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(settings))
    model = build()
    with pytest.raises(UserError, match=sentence) as error:
        load_adapter(folder, model)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not lora_layers.find_lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_files_that_are_no_files(adapter):
    folder, _, _ = adapter
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-10])
    with pytest.raises(UserError, match="truncated"):
        load_adapter(folder, build())
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="has no adapter_model.safetensors"):
        load_adapter(folder, build())
    (folder / CONFIG).write_text("{")
    (folder / WEIGHTS).write_bytes(whole)
    with pytest.raises(UserError, match="is not JSON"):
        load_adapter(folder, build())
    with pytest.raises(UserError, match="no adapter at .*nowhere"):
        load_adapter(folder / "nowhere", build())
    with pytest.raises(UserError, match="no adapter 'other' to save"):
        save_adapter(folder, build(), "other")


def test_a_failed_save_leaves_the_old_adapter(adapter, monkeypatch):
    folder, tensors, settings = adapter
    model = build()
    lora_layers.add_lora(model, rank=5)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("formats.peft.write_json", full)
    with pytest.raises(UserError, match="No space left"):
        save_adapter(folder, model)
    assert sorted(f.name for f in folder.iterdir()) == [CONFIG, WEIGHTS]
    load_adapter(folder, build())
    monkeypatch.undo()
    save_adapter(folder, model)                        # and a good one replaces it
    assert len(load_adapter(folder, build())) == 14


def test_a_stage_begins_and_goes_on(tmp_path):
    """add_adapters() on a base on disk, then as resume does it: the same adapter, on the base
    that the adapter's file names."""
    save_model(tmp_path / "base", build())
    cfg = SimpleNamespace(**vars(Lora(lora_rank=2, lora_int8=True)),
                          init_from=str(tmp_path / "base"), out_dir=str(tmp_path / "out"))
    model, ids = load_model(tmp_path / "base", "cpu"), ids_of()
    note, writer = sft.add_adapters(cfg, model, None)
    assert "14 linears" in note
    stir(model)
    step = tmp_path / "out" / "step_000001"
    save_model(step, build())
    writer(step)
    (tmp_path / "out" / "checkpoints.json").write_text('{"last": "step_000001"}')

    @lora.dataclass
    class Config(Lora):
        lora_rank: int = 2
        lora_int8: bool = True
        init_from: str = "resume"
        out_dir: str = str(tmp_path / "out")
    cfg = Config()
    assert sft.find_frozen(cfg).init_from == str(tmp_path / "base")
    again = load_model(sft.find_frozen(cfg).init_from, "cpu")
    sft.add_adapters(cfg, again, None)
    assert torch.equal(again.logits(ids), model.logits(ids))
    # on a machine that computes in bfloat16 a base that is exact in it is held in it
    for dtype, kind in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = build().bfloat16().float()
        sft.add_adapters(Config(lora_int8=False), model, None, dtype=dtype)
        assert {la.base.dtype for la in lora_layers.find_lora_layers(model).values()} == {kind}
    assert sft.find_frozen(dataclasses.replace(cfg, lora_rank=0)).init_from == "resume"


def test_grown_base_is_saved(tmp_path):
    """With rows for new tokens the model is no longer what lies at init_from: peft needs it."""
    cfg = SimpleNamespace(**vars(Lora(lora_rank=2)), init_from="gone",
                          out_dir=str(tmp_path / "out"))
    model = build()
    sft.add_adapters(cfg, model, None, grown=True)[1](tmp_path)
    base = read_adapter_config(tmp_path / "adapter" / CONFIG)["base"]
    assert base == str(tmp_path / "out" / "base")
    assert torch.equal(load_model(base, "cpu").logits(ids_of()), build().logits(ids_of()))


def test_merge_from_the_command_line(tmp_path):
    """python lora.py merge ADAPTER OUT: a plain checkpoint with its tokenizer; mistakes are one
    sentence and status 2."""
    import tokenizer
    model = build()
    save_model(tmp_path / "base", model, tokenizer.train_chars(["hello\n"]))
    lora_layers.add_lora(model)
    stir(model)
    save_adapter(tmp_path / "adapter", model, base=str(tmp_path / "base"))
    lora.merge_files(lora.Merge(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]))
    ids = ids_of()
    assert away(load_model(tmp_path / "out", "cpu").logits(ids), model.logits(ids)) < 1e-5
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    # a run, whose best checkpoint is not its last: of either the adapter beside the weights
    for name, base in (("step_1", str(tmp_path / "base")), ("step_2", "elsewhere")):
        save_model(tmp_path / "run" / name, build())
        save_adapter(tmp_path / "run" / name / "adapter", model, base=base)
    (tmp_path / "run" / "checkpoints.json").write_text('{"last": "step_2", "best": "step_1"}')
    for number, source in enumerate((tmp_path / "run", tmp_path / "run" / "step_1")):
        out = tmp_path / f"merged{number}"
        lora.merge_files(lora.Merge(["merge", str(source), str(out)]))
        assert away(load_model(out, "cpu").logits(ids), model.logits(ids)) < 1e-5
    with pytest.raises(lora.UserError, match="the base of .*step_2"):
        lora.merge_files(lora.Merge(["merge", str(tmp_path / "run"), str(out)], which="last"))
    save_adapter(tmp_path / "adapter", model, base="hub/name")
    done = subprocess.run([sys.executable, ROOT / "lora.py", "merge", tmp_path / "adapter",
                           tmp_path / "out2"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out2").exists()
    assert done.stderr.startswith("error: the base of") and "--base=DIR" in done.stderr
