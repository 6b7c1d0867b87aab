"""lora.py: adapters train beside frozen weights as peft's do, lie on disk as peft's do, and a model
without them is what it was."""
import copy

import pytest
import torch
import transformers as T

from layers import lora as lora_layers
from inference import quantize
from layers.packed import Int8
from config import UserError
from model import Linear
from training.optim import Optimizer
from lora_base import OPTIONS, V, away, build, ids_of, our_loss, stir
T.logging.set_verbosity_error()
T.logging.disable_progress_bar()
LINEARS = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

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
    own = lora_layers.get_parameters(model)
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
        grads.append({n: p.grad for n, p in lora_layers.get_parameters(model).items()})
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
    layer = next(iter(lora_layers.find_lora_layers(model).values())).train()
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
        lora_layers.list_adapters(model) == ["poet", "coder"]
        and away(seen["poet"], seen["coder"]) > 1e-2
    )
    lora_layers.activate(model, "poet")
    assert torch.equal(model.logits(ids), seen["poet"])
    # what is off does not train, or DDP would wait for its gradients
    assert all(p.requires_grad for p in lora_layers.get_parameters(model, "poet").values())
    assert not any(p.requires_grad for p in lora_layers.get_parameters(model, "coder").values())
    with pytest.raises(RuntimeError):
        with lora_layers.disable_adapters(model):
            assert torch.equal(model.logits(ids), base)
            raise RuntimeError
    assert torch.equal(model.logits(ids), seen["poet"])
    lora_layers.activate(model)
    assert torch.equal(model.logits(ids), base)
    lora_layers.activate(model, "poet", "coder")
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    W = layer.base
    changes = [a.change(W) for a in layer.list_active()]
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
    with lora_layers.disable_adapters(model), torch.no_grad():
        reference = model(ids)
    (model(ids) - reference).square().sum().backward()
    assert torch.equal(reference, base)
    assert all(p.grad is not None for p in lora_layers.get_parameters(model).values())


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
    (dict(targets="q_proj:x"), "the rank of q_proj must be a positive integer"),
    (dict(targets="q_proj,v_proj:0"), "the rank of v_proj must be a positive integer"),
    (dict(rank=0), "rank is at least 1"), (dict(alpha=0.0), "alpha above 0"),
    (dict(alpha=float("nan")), "alpha above 0"), (dict(dropout=1.0), "dropout from 0 up to 1"),
    (dict(name="a.b"), "cannot be an adapter's name"),
    (dict(name="train"), "cannot be an adapter's name"),
], ids=str)
def test_wrong_settings_are_one_sentence_and_change_nothing(wrong, listed):
    model = build(tie_word_embeddings=False)
    with pytest.raises(UserError, match=listed):
        lora_layers.add_lora(model, **wrong)
    assert all(p.requires_grad for p in model.parameters())
    assert not lora_layers.find_lora_layers(model)


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
    assert layer.weight.dtype == torch.int8 and torch.equal(layer.base, rounded)
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
    shapes = {tuple(la.base.shape) for la in lora_layers.find_lora_layers(model).values()}
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
    assert {p.dtype for p in lora_layers.get_parameters(model).values()} == {torch.float32}
    our_loss(model, ids).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any()
               for p in lora_layers.get_parameters(model).values())
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
        kinds = {n: la.weight.dtype for n, la in lora_layers.find_lora_layers(model).items()}
        assert {n for n, kind in kinds.items() if kind == torch.bfloat16} == (
            set(kinds) - {"model.layers.1.mlp.up_proj"} if half else set())
        our_loss(model.train(), ids).backward()
        grads = [p.grad for p in lora_layers.get_parameters(model).values()]
        with lora_layers.disable_adapters(model):
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
