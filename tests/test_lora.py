"""lora.py: adapters train beside frozen weights as peft's do, lie on disk as peft's do, and a model
without them is what it was."""
import copy
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
import kernels
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
from inference import quantize
from layers.packed import Int8
from checkpoint import load_model, save_model
from config import UserError
from conftest import ROOT
from model import ModelConfig, Linear, Transformer
from training.optim import Optimizer

peft = pytest.importorskip("peft")
T.logging.set_verbosity_error()
T.logging.disable_progress_bar()

V = 48
SHAPE = dict(vocab_size=V, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
             intermediate_size=48, moe_intermediate_size=24)
MORE = {"gpt2": dict(n_kv_head=4), "gemma2": dict(sliding_window=6),
        "glm4_moe": dict(num_experts=4), "qwen3_moe": dict(num_experts=4)}
OPTIONS = {"plain": {}, "rslora": dict(rslora=True), "dora": dict(dora=True),
           "both": dict(rslora=True, dora=True)}
LINEARS = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(name="llama", **changes) -> Transformer:
    """A tiny model, the same at every call, every weight random, norms and biases included."""
    model = Transformer(ModelConfig.from_family(name, **{**SHAPE, **MORE.get(name, {}), **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            centre = 1.0 - model.config.norm_offset if "norm" in key and p.ndim == 1 else 0.0
            p.normal_(centre if key.endswith("weight") else 0.0, 0.15, generator=generator)
    return model.eval()


def stir(model, name="default", size=0.1, seed=2):
    """As if trained: B is no longer zero, nor a magnitude what it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora_layers.parameters(model, name).values():
            p += torch.empty_like(p).normal_(0.0, size, generator=generator)


def ids_of(rows=2, length=11):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(3))


def away(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def our_loss(model, ids):
    return model(ids[:, :-1], head=lambda h, w: kernels.linear_cross_entropy(
        h, w, ids[:, 1:].contiguous())) / ids[:, 1:].numel()


def saved(tmp_path, name="llama", **changes):
    """(model, the same in transformers)."""
    model = build(name, **changes)
    save_model(tmp_path / "base", model)
    return model, T.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()

# ------------------------------------------------------------------- the layers themselves


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "glm4_moe"])
def test_new_adapter_changes_nothing_and_merged_is_unmerged(name, options):
    """B = 0 starts from the model that was there; merging gives what the adapter gave."""
    model, ids = build(name), ids_of()
    before = model.logits(ids)
    adapted = lora_layers.add_lora(model, rank=3, alpha=6, **options)
    assert all(isinstance(layer, lora_layers.LoraLinear) for layer in adapted.values())
    assert away(model.logits(ids), before) < 1e-5
    stir(model)
    after = model.logits(ids)
    assert away(after, before) > 1e-2
    # training takes another road through q, k and v than sampling
    assert away(model(ids), after) < 1e-5
    cached = model(ids, cache=model.new_cache(2, 16))
    assert away(cached, after) < 1e-5
    names = [n for n, _ in build(name).named_parameters()]
    plain = lora_layers.merge(model)
    assert away(plain.logits(ids), after) < 1e-5
    assert [n for n, _ in plain.named_parameters()] == names
    assert all(type(m) is Linear for m in plain.modules() if isinstance(m, Linear))


def test_only_the_adapters_train():
    """The base is frozen bit for bit, its optimizer holds no state for it, all of A and B move."""
    model, ids = build(), ids_of()
    base = copy.deepcopy(model.state_dict())
    adapted = lora_layers.add_lora(model, rank=2)
    assert len(adapted) == 2 * 7
    own = lora_layers.parameters(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted(own) and len(own) == 2 * len(adapted)
    start = {n: p.detach().clone() for n, p in own.items()}
    optimizer = Optimizer(model.named_parameters(), learning_rate=1e-2, weight_decay=0.0)
    assert sorted(optimizer.state) == sorted(own)
    model.train()
    losses = []
    for _ in range(20):
        loss = our_loss(model, ids)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.2
    assert all(not torch.equal(p, start[n]) for n, p in own.items())
    now = model.state_dict()
    assert all(torch.equal(now[n], p) for n, p in base.items())
    share = sum(p.numel() for p in own.values())
    assert f"{share:,} of" in lora_layers.describe(model)
    assert "2 x q_proj" in lora_layers.describe(model) and "14 linears" in lora_layers.describe(
        model
    )


def test_recomputed_blocks_give_the_same_gradients():
    """Checkpointing runs every layer twice: the sum in place must not be added twice."""
    ids, grads = ids_of(), []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        model = build().train()
        lora_layers.add_lora(model, rank=2, dropout=0.2)
        stir(model)
        model.checkpointing = checkpointing
        torch.manual_seed(6)
        our_loss(model, ids).backward()
        grads.append({n: p.grad for n, p in lora_layers.parameters(model).items()})
    assert all(torch.equal(g, grads[1][n]) for n, g in grads[0].items())


def test_dropout_only_in_training_and_only_beside_the_base():
    model, ids = build(), ids_of()
    base = model.logits(ids)
    lora_layers.add_lora(model, dropout=0.5)
    model.train()
    assert away(model.logits(ids), base) < 1e-6            # B = 0: there is nothing to drop yet
    stir(model)
    assert not torch.equal(model.logits(ids), model.logits(ids))
    model.eval()
    assert torch.equal(model.logits(ids), model.logits(ids))
    # half of the inputs of A are gone and the others doubled: on average nothing changes
    layer = next(iter(lora_layers.layers(model).values())).train()
    x = torch.randn(1, layer.base.shape[1])
    with torch.no_grad():
        many = layer(x.expand(20000, -1)).mean(0)
        assert away(many, layer.eval()(x)[0]) < 0.03


def test_several_adapters_are_chosen_by_name():
    """Each alone, both (the sum of their changes), none, and none for a while, whatever happens."""
    model, ids = build(), ids_of()
    base = model.logits(ids)
    seen = {}
    for seed, name in enumerate(("poet", "coder")):
        lora_layers.add_lora(
            model, rank=2 + seed, name=name, targets="q_proj,down_proj", dora=seed == 1
        )
        stir(model, name, seed=seed)
        seen[name] = model.logits(ids)  # the newest is the active one
    assert (
        lora_layers.names(model) == ["poet", "coder"] and away(seen["poet"], seen["coder"]) > 1e-2
    )
    lora_layers.activate(model, "poet")
    assert torch.equal(model.logits(ids), seen["poet"])
    # what is off does not train, or DDP would wait for its gradients
    assert all(p.requires_grad for p in lora_layers.parameters(model, "poet").values())
    assert not any(p.requires_grad for p in lora_layers.parameters(model, "coder").values())
    with pytest.raises(RuntimeError):
        with lora_layers.disabled(model):
            assert torch.equal(model.logits(ids), base)
            raise RuntimeError
    assert torch.equal(model.logits(ids), seen["poet"])
    lora_layers.activate(model)
    assert torch.equal(model.logits(ids), base)
    lora_layers.activate(model, "poet", "coder")
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    W = layer.base
    changes = [a.change(W) for a in layer.chosen()]
    x = torch.randn(3, W.shape[1])
    assert away(layer(x), x @ (W + changes[0] + changes[1]).T) < 1e-5
    both = model.logits(ids)
    assert away(lora_layers.merge(model).logits(ids), both) < 1e-5
    with pytest.raises(UserError, match="no adapter 'poet'.*none"):
        lora_layers.activate(model, "poet")


def test_reference_of_dpo_gets_no_gradient():
    """disabled() inside a step: the reference is the base, and the policy still trains."""
    model, ids = build(), ids_of()
    base = model.logits(ids)
    lora_layers.add_lora(model)
    stir(model)
    with lora_layers.disabled(model), torch.no_grad():
        reference = model(ids)
    (model(ids) - reference).square().sum().backward()
    assert torch.equal(reference, base)
    assert all(p.grad is not None for p in lora_layers.parameters(model).values())


def test_targets_by_name():
    model = build()
    first = "layers.0.self_attn.q_proj"
    assert list(lora_layers.add_lora(model, targets=f"{first}, o_proj")) == [
        f"model.{first}", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    assert type(model.get_submodule("model.layers.1.self_attn.q_proj")) is Linear


@pytest.mark.parametrize("wrong, listed", [
    (dict(targets="q_proj,c_attn"), f"'c_attn'.*choose from {LINEARS}$"),
    (dict(targets="proj"), f"choose from {LINEARS}$"),
    (dict(targets="embed_tokens"), "choose from"),
    (dict(targets="q_proj:x"), "the rank of q_proj is no number above 0"),
    (dict(targets="q_proj,v_proj:0"), "the rank of v_proj is no number above 0"),
    (dict(rank=0), "rank is at least 1"), (dict(alpha=0.0), "alpha above 0"),
    (dict(alpha=float("nan")), "alpha above 0"), (dict(dropout=1.0), "dropout from 0 up to 1"),
    (dict(name="a.b"), "cannot be an adapter's name"),
    (dict(name="train"), "cannot be an adapter's name"),
], ids=str)
def test_wrong_settings_are_one_sentence_and_change_nothing(wrong, listed):
    model = build(tie_word_embeddings=False)
    with pytest.raises(UserError, match=listed):
        lora_layers.add_lora(model, **wrong)
    assert all(p.requires_grad for p in model.parameters()) and not lora_layers.layers(model)


def test_a_name_is_taken_once_and_a_packed_model_takes_none():
    model = build()
    lora_layers.add_lora(model)
    with pytest.raises(UserError, match="has an adapter 'default' already"):
        lora_layers.add_lora(model)
    packed = build()
    quantize.pack(packed)
    with pytest.raises(UserError, match="not packed"):
        lora_layers.add_lora(packed)

# ----------------------------------------------------------------------- other forms of W


@pytest.mark.parametrize("dora", [False, True])
def test_int8_base_is_rounded_as_for_serving_and_gradients_pass_it(dora):
    model, ids = build(qkv_bias=True), ids_of()
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    packed = Int8(layer.weight.detach(), None)
    rounded = packed.weight.float() * packed.scale.float().unsqueeze(1)
    layer = lora_layers.add_lora(model, rank=2, int8=True, dora=dora)[
        "model.layers.0.self_attn.q_proj"]
    stir(model)
    assert layer._parameters["weight"].dtype == torch.int8 and torch.equal(layer.base, rounded)
    # the oracle: a plain layer with the rounded weights, and the same adapter
    plain = Linear(*rounded.T.shape, bias=True)
    with torch.no_grad():
        plain.weight.copy_(rounded)
        plain.bias.copy_(layer.bias)
    plain = lora_layers.LoraLinear(plain)
    plain.adapters.add_module("default", layer.adapters.default)
    plain.active = ("default",)
    results = []
    for one in (layer, plain):
        x = torch.randn(2, 5, rounded.shape[1], generator=torch.Generator().manual_seed(4))
        y = one(x.requires_grad_())
        results.append((y, *torch.autograd.grad(y.square().sum(),
                                                [x, *layer.adapters.default.parameters()])))
    assert all(away(a, b) < 1e-5 for a, b in zip(*results))
    # in bfloat16 activations too, and merged it is a plain model that can be saved
    after = model.logits(ids)
    assert away(lora_layers.merge(model).logits(ids), after) < 1e-5
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_int8_keeps_no_unpacked_weight_for_the_backward():
    """QLoRA's point: what autograd holds between forward and backward has no float W in it."""
    model, ids = build(vocab_size=V + 2), ids_of()
    lora_layers.add_lora(model, rank=2, int8=True)
    shapes = {tuple(la.base.shape) for la in lora_layers.layers(model).values()}
    held = []

    def pack(t):
        held.append((tuple(t.shape), t.dtype))
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        our_loss(model, ids).backward()
    assert any(dtype == torch.int8 for _, dtype in held)
    assert not any(dtype == torch.float32 and (shape in shapes or shape[::-1] in shapes)
                   for shape, dtype in held)


def test_bfloat16_base_has_float32_adapters():
    """Small steps are not lost, in the activations' type nothing else changes, merge keeps it."""
    model, ids = build().bfloat16(), ids_of()
    lora_layers.add_lora(model, rank=2)
    stir(model)
    assert {p.dtype for p in lora_layers.parameters(model).values()} == {torch.float32}
    our_loss(model, ids).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any()
               for p in lora_layers.parameters(model).values())
    after = model.logits(ids)
    assert away(lora_layers.merge(model).logits(ids), after) < 5e-2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dora", [False, True])
def test_frozen_weights_are_halved_where_no_bit_is_lost(dora):
    """A bfloat16 checkpoint, read as float32: the same logits and gradients from half the memory;
    what is merged is float32. A weight that bfloat16 would round stays as it is."""
    ids, seen = ids_of(), []
    for half in (False, True):
        torch.manual_seed(5)                                # of A
        model = build(qkv_bias=True).bfloat16().float()
        odd = model.get_submodule("model.layers.1.mlp.up_proj")
        with torch.no_grad():
            odd.weight[3, 4] = 1 + 2 ** -10
        lora_layers.add_lora(model, rank=2, dora=dora)
        stir(model)
        if half:
            lora_layers.halve(model)
        kinds = {n: la._parameters["weight"].dtype for n, la in lora_layers.layers(model).items()}
        assert {n for n, kind in kinds.items() if kind == torch.bfloat16} == (
            set(kinds) - {"model.layers.1.mlp.up_proj"} if half else set())
        our_loss(model.train(), ids).backward()
        grads = [p.grad for p in lora_layers.parameters(model).values()]
        with lora_layers.disabled(model):
            base = model.logits(ids)
        after = model.logits(ids)
        quantize.pack(copy.deepcopy(model))                 # reads weights of one type
        merged = lora_layers.merge(model)
        assert {p.dtype for p in merged.parameters()} == {torch.float32}
        seen.append([after, base, *grads, *merged.state_dict().values()])
    assert len(seen[0]) == len(seen[1])
    assert all(torch.equal(a, b) for a, b in zip(*seen))


def test_experts_without_adapters_are_told():
    model = build("qwen3_moe")
    lora_layers.add_lora(model)
    assert lora_layers.describe(model).endswith("; its routed experts get none")
    model = build()
    lora_layers.add_lora(model)
    assert "experts" not in lora_layers.describe(model)


def test_served_packed_the_adapter_counts():
    """pack() reads a layer's weight: it gets the merged one, not the base in silence."""
    model, ids = build(), ids_of()
    lora_layers.add_lora(model)
    stir(model)
    after = model.logits(ids)
    quantize.pack(model)
    assert away(model.logits(ids), after) < 1e-5

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
    own = lora_layers.parameters(model)
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
    mine, its = lora_layers.parameters(model), lora_layers.parameters(again, "other")
    assert [n.replace(".default.", ".other.") for n in mine] == list(its)
    assert all(torch.equal(a, b) for a, b in zip(mine.values(), its.values()))
    layer = next(iter(lora_layers.adapters(again, "other").values()))
    assert (layer.dropout, layer.alpha, layer.rslora) == (0.1, 6, bool(targets))


@pytest.mark.parametrize("rslora", [False, True])
def test_the_output_matrix_and_ranks_of_their_own(tmp_path, rslora):
    """lm_head has an adapter where it is named, of its own rank at everybody's scale; it gets the
    gradients that peft's gets, and its file is one that peft opens."""
    model, hf = saved(tmp_path, tie_word_embeddings=False)
    made = lora_layers.add_lora(model, rank=4, alpha=6, targets="q_proj,lm_head:2", rslora=rslora)
    assert list(made) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
                          "lm_head"]
    ranks = {n: (len(a.A), a.scale) for n, a in lora_layers.adapters(model).items()}
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
    head = lora_layers.adapters(model)["lm_head"]
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
    assert all(la._parameters["weight"].dtype == torch.bfloat16
               for la in lora_layers.layers(model).values())
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
    assert not lora_layers.layers(model) and all(p.requires_grad for p in model.parameters())


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
        assert {la.base.dtype for la in lora_layers.layers(model).values()} == {kind}
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
