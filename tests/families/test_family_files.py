"""One file a family: no name outside its file, and models from scratch of every family train."""
import ast
import io
import re
import tokenize

import pytest
import torch

import families
import kernels
from checkpoint import load_model, save_model
from conftest import ROOT
from families import FAMILIES, PRESETS, SCRATCH
from formats.huggingface import family_of
from model import ModelConfig, Transformer
from training.optim import Optimizer

NAMES = {row.model_type for row in families.ROWS} | set(SCRATCH) | set(families.WRAPPERS)
# a type of PyTorch's devices, which has the name of a family
OTHER_MEANINGS = {"meta"}


def words_of(path):
    """The words of a file's code: identifiers and strings, without comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    docstrings = {node.body[0].value.lineno for node in ast.walk(ast.parse(text))
                  if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                  and ast.get_docstring(node) is not None}
    words = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME or (
                token.type == tokenize.STRING and token.start[0] not in docstrings):
            words |= set(re.findall(r"\w+", token.string.lower()))
    return words


@pytest.mark.parametrize("file", ["model.py", "checkpoint.py", "train.py",
                                  "formats/huggingface.py"])
def test_no_family_is_named_outside_its_file(file):
    assert not words_of(ROOT / file) & (NAMES - OTHER_MEANINGS)
    assert "rms_norm_eps" not in words_of(ROOT / "model.py")        # the walk sees strings too


def test_the_walk_finds_a_name(tmp_path):
    (tmp_path / "x.py").write_text('"""gpt2"""\nx = "qwen3"   # llama\n')
    assert words_of(tmp_path / "x.py") & NAMES == {"qwen3"}


@pytest.mark.parametrize("name", SCRATCH)
def test_a_model_from_scratch_trains_five_steps_and_is_saved_as_its_family(name, tmp_path):
    torch.manual_seed(0)
    shape = ModelConfig.from_family(
        name, vocab_size=50, block_size=32, n_layer=4, n_head=4, n_embd=32, head_dim=8
    )
    model = Transformer(shape).train()
    optimizer = Optimizer(model.named_parameters(), learning_rate=0.01)
    ids = torch.randint(0, 50, (4, 24))
    losses = []
    for _ in range(5):
        loss = model(ids[:, :-1], head=lambda h, w: kernels.linear_cross_entropy(
            h.flatten(0, 1), w, ids[:, 1:].flatten())) / ids[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03, losses
    save_model(tmp_path / "m", model.eval())
    again = load_model(tmp_path / "m", "cpu")
    assert torch.equal(again.logits(ids), model.logits(ids))
    row = SCRATCH[name]
    if row.writable and row.saved_as:               # the new files are written as themselves
        assert family_of(again.config).model_type == row.model_type


def test_every_preset_is_a_model_of_its_family():
    for name in PRESETS:
        shape = ModelConfig.from_preset(name)
        assert family_of(shape).model_type in FAMILIES, name
