"""The config files that come with the project, and nanoGPT's, set nothing that has no effect."""
import importlib

import pytest

import train
from config import configure, refuse_idle
from model import ModelConfig
from conftest import ROOT
from training.start import from_settings
from test_config import NANOGPT, SHIPPED, STAGES, config_file
from training import start
from training.settings import is_pretrained


@pytest.mark.parametrize("name", SHIPPED)
def test_nothing_in_a_shipped_config_file_is_without_effect(name):
    cfg = configure(train.Config, [str(ROOT / "config" / name)])
    shape = from_settings(cfg, 16384)
    refuse_idle(cfg, shape, start.get_in_force(cfg, shape, False))


@pytest.mark.parametrize("name, more", [*((name, "") for name in STAGES), (
    "distill_skills", "--alpha=1 --hidden=0 --hidden_layers=0 --out_dir=out/student --seed=1")])
def test_nor_in_that_of_a_stage_on_the_demo(name, more):
    """Also where lifecycle.py overrules the teacher's part."""
    script = name.removesuffix("_skills")
    module = importlib.import_module("sft" if script == "lora" else script)
    shape = from_settings(configure(train.Config, [str(ROOT / "config" / "demo.py")]), 16384)
    cfg = configure(module.Config, [str(ROOT / "config" / f"{name}.py"), *more.split()])
    if not is_pretrained(cfg):
        shape = from_settings(train.replace(cfg, block_size=256), 16384)
    refuse_idle(cfg, shape, start.get_in_force(cfg, shape, is_pretrained(cfg)))


@pytest.mark.parametrize("name", NANOGPT)
def test_nothing_in_nanogpts_config_files_is_without_effect(name, tmp_path):
    """On OpenAI's checkpoints, where they start from these, as on a new model."""
    cfg = configure(train.Config, [config_file(tmp_path, NANOGPT[name], name + ".py")])
    pretrained = is_pretrained(cfg)
    shape = ModelConfig.from_preset(cfg.init_from) if pretrained else from_settings(cfg, 50257)
    refuse_idle(cfg, shape, start.get_in_force(cfg, shape, pretrained))
