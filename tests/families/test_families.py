"""Every family against transformers: logits, gradients, names, bytes, and the cache that serves it.

Shapes are tiny and every weight is random, norms, biases and the routers' corrections too: the
defaults (ones and zeros) would hide a norm applied twice or a bias left out.
"""
import copy

import pytest
import safetensors.torch
import torch
import transformers as T

from layers import kv_cache
from checkpoint import load_model, save_model
from oracles import VARIANTS, error, opened, oracle, some_ids     # noqa: F401

T.logging.set_verbosity_error()
T.logging.disable_progress_bar()
ROUTER_BIASES = ("correction_bias", "expert_bias")      # which no gradient moves
WINDOWS = [n for n in VARIANTS if "window" in n or n.startswith(("gemma2", "gemma3"))
           or n in ("cwm", "ministral", "olmo3", "cohere2", "exaone4", "vaultgemma", "starcoder2")]


def contents(path) -> dict:
    return {file.name: file.read_bytes() for file in path.iterdir()}

# --------------------------------------------------------------------- weights in, weights out


@pytest.mark.parametrize("name", VARIANTS)
def test_the_logits_are_transformers_in_both_directions(name, oracle, tmp_path):
    """Their directory here, ours there; in one file and in shards; saved again, the same bytes."""
    theirs = oracle(name)
    ours = load_model(theirs.path, "cpu")
    logits = ours.logits(theirs.ids)
    assert error(logits, theirs.logits) <= 1e-5
    theirs.model.save_pretrained(tmp_path / "shards", max_shard_size=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(load_model(tmp_path / "shards", "cpu").logits(theirs.ids), logits)

    for shard_bytes in (20_000, 10 ** 9):
        where = tmp_path / f"ours {shard_bytes}"
        save_model(where, ours, shard_bytes=shard_bytes)
        assert (len(list(where.glob("*.safetensors"))) > 1) == (shard_bytes == 20_000)
        back = opened(where)
        assert back.config.model_type == VARIANTS[name][2]
        with torch.no_grad():
            assert error(back(theirs.ids).logits, theirs.logits) <= 1e-5
        again = load_model(where, "cpu")
        assert again.config == ours.config
        save_model(tmp_path / "again", again, shard_bytes=shard_bytes)
        assert contents(tmp_path / "again") == contents(where)


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_on_disk_stays_bfloat16_and_is_read_alike(name, oracle, tmp_path):
    theirs = copy.deepcopy(oracle(name).model).to(torch.bfloat16)
    for key, buffer in theirs.named_buffers():
        if key.endswith(ROUTER_BIASES):             # transformers keeps the correction in float32
            buffer.data = dict(oracle(name).model.named_buffers())[key].clone()
    theirs.save_pretrained(tmp_path / "m")
    ids = some_ids()
    with torch.no_grad():
        expected = opened(tmp_path / "m", dtype=torch.float32)(ids).logits
    assert error(load_model(tmp_path / "m", "cpu", "float32").logits(ids), expected) <= 1e-5
    ours = load_model(tmp_path / "m", "cpu")
    assert error(ours.logits(ids), expected) < 0.3          # and it runs in bfloat16
    save_model(tmp_path / "ours", ours)
    before, after = (safetensors.torch.load_file(tmp_path / d / "model.safetensors")
                     for d in ("m", "ours"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        kept = torch.float32 if key.endswith(ROUTER_BIASES) else torch.bfloat16
        assert after[key].dtype == tensor.dtype == kept and torch.equal(after[key], tensor), key


@pytest.mark.parametrize("name", VARIANTS)
def test_the_gradients_of_a_step_are_transformers(name, oracle, tmp_path):
    """Of every parameter. Saved as checkpoints, both have the names of the family's files."""
    theirs, ids = copy.deepcopy(oracle(name).model), some_ids(3, 20, seed=2)
    ours = load_model(oracle(name).path, "cpu")

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(),
                                                 ids[:, 1:].flatten(), reduction="sum")
    a, b = loss(ours(ids)), loss(theirs(ids).logits)
    assert abs(a.item() - b.item()) <= 1e-5 * b.item()
    a.backward()
    b.backward()
    for model in (ours, theirs):
        for p in model.parameters():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
        for key, buffer in model.named_buffers():
            buffer.zero_()
    save_model(tmp_path / "ours", ours)
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (safetensors.torch.load_file(tmp_path / d / "model.safetensors")
            for d in ("ours", "theirs"))
    assert a.keys() == b.keys()
    for key in b:
        assert error(a[key], b[key]) <= 1e-4, key
        assert bool(b[key].any()) or key.endswith(ROUTER_BIASES) or "experts" in key, key

# ----------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("name", VARIANTS)
def test_the_cache_gives_the_logits_of_the_whole_text(name, oracle, monkeypatch):
    """A prompt of one token, then every step; a prompt in pieces; past the window and its store."""
    monkeypatch.setattr(kv_cache.KeyValues, "SPARE", 2)
    model, ids = load_model(oracle(name).path, "cpu"), some_ids(2, 34)
    full = model.logits(ids)
    assert error(full[:, :30], oracle(name).model(ids[:, :30]).logits.detach()) <= 1e-5
    for pieces in ([1] * 34, [1, 12, 1, 5, 1, 1, 13], [34], [3, 31]):
        held, start, out = model.new_cache(2, 34), 0, []
        with torch.no_grad():
            for n in pieces:
                out.append(model(ids[:, start:start + n], cache=held))
                start += n
        assert error(torch.cat(out, 1), full) <= 1e-5, pieces
    if name in WINDOWS:             # or the test would not reach what it is for
        assert any(len(next(iter(s.kv.values()))[0][0, 0]) < 34 for s in held.distinct)


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_of_a_ragged_batch_are_each_alone(name, oracle, monkeypatch):
    """Prompts of 1, 11 and 4 tokens padded on the right, then 20 steps: past the window, too."""
    monkeypatch.setattr(kv_cache.KeyValues, "SPARE", 2)
    model, lengths, steps = load_model(oracle(name).path, "cpu"), [1, 11, 4], [1] * 16 + [3, 1]
    texts = [some_ids(1, n + sum(steps), seed=n) for n in lengths]
    alone = [model.logits(text)[0] for text in texts]
    padded = some_ids(3, 11, seed=9)                # what fills the rows must not matter
    for b, n in enumerate(lengths):
        padded[b, :n] = texts[b][0, :n]
    with torch.no_grad():
        held = model.new_cache(3, 11 + sum(steps))
        held.expect(lengths)
        prompt = model(padded, cache=held)
        for b, n in enumerate(lengths):
            assert error(prompt[b, :n], alone[b][:n]) <= 1e-5
        done = 0
        for step in steps:
            rows = [text[0, n + done:n + done + step] for text, n in zip(texts, lengths)]
            logits = model(torch.stack(rows), cache=held)
            for b, n in enumerate(lengths):
                assert error(logits[b], alone[b][n + done:n + done + step]) <= 1e-5
            done += step
