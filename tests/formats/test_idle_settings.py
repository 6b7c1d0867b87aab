"""Settings that can have no effect are refused, in every stage, and on a run that is resumed.
"""

import pytest

import checkpoint
import distill
import sft
import train
from config import field_types, UserError, configure
from runs import last, quiet_machine, trainer
from training import start
from training.settings import is_resumed
from runs_folders import DATA, RUN, SCRIPTS, files, go, place, resume     # noqa: F401
from runs_folders import words    # noqa: F401

assert quiet_machine                # a fixture that every test here uses by itself

# ---------------------------------------------------------------- settings without effect


SHAPES = dict(n_layer=7, n_head=4, n_kv_head=1, n_embd=24, head_dim=12, intermediate_size=40,
              bias=1, qk_norm=1, tie_word_embeddings=1, rope_theta=5, activation="relu", gated=0,
              sliding_window=3, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=8,
              n_shared_experts=1, init_std=0.5, family="gemma3", preset="qwen3-0.6b")
MAKERS = ("train", "distill")           # of models from scratch: these have the settings of a shape
IDLE = [
    *((stage, f"--{name}={value}") for stage in SCRIPTS for name, value in SHAPES.items()),
    *((stage, flag) for stage in ("sft", "classify", "dpo", "distill") for flag in (
        "--dora=1", "--rslora=1", "--targets=q_proj", "--lora_alpha=32", "--lora_dropout=0.1",
        "--lora_int8=1", "--base=x", "--sample_prompt=hello", "--epochs=3", "--hub_dir=x")),
    *((stage, flag) for stage in SCRIPTS for flag in (
        "--muon_learning_rate=0.1 --optimizer=adamw", "--wsd_decay=0.5", "--min_lr=1e-5 "
        "--schedule=constant", "--lr_decay_iters=9 --decay_lr=0", "--warmup_iters=9 --decay_lr=0",
        "--router_aux_loss_coef=0.5", "--router_z_loss_coef=0.5", "--router_sequence_wise=1",
        "--router_bias_rate=0.5")),
    ("train", "--sample_prompt=hello"),
    ("classify", "--template=chatml"), ("classify", "--sample_interval=2"), ("sft", "--task=chat"),
    ("sft", "--unfreeze=last"), ("dpo", "--document_mask=0"), ("distill", "--document_mask=1"),
    ("sft", "--eval_only=1 --lora_rank=2"),
    ("dpo", "--gamma=1"), ("dpo", "--desirable_weight=2"), ("dpo", "--undesirable_weight=2"),
    ("dpo", "--loss=simpo --reference_free=1"), ("dpo", "--loss=orpo --reference_free=1"),
    ("dpo", "--loss=simpo --desirable_weight=2"), ("dpo", "--loss=kto --gamma=1"),
    ("dpo", "--origin=x"), ("distill", "--origin=x"), ("distill", "--beta=0.2"),
    ("distill", "--alpha=1 --temperature=3"), ("distill", "--alpha=1 --divergence=reverse"),
    ("distill", "--generate_tokens=9"),
    ("distill", "--generate_temperature=1"), ("distill", "--cache_dir=x"),
]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_setting_without_effect_is_refused(place, tmp_path, stage):
    """Each of them, before anything is written; and the value that is in force anyway passes."""
    script, wrong = SCRIPTS[stage], []
    first = [f"--init_from={place / 'base'}", f"--out_dir={tmp_path / 'out'}", *RUN,
             "--block_size=16"]
    first += {"distill": [f"--teacher={place / 'other'}"]}.get(stage, [])
    for flags in (flags for name, flags in IDLE if name == stage):
        data = "ready" if stage == "train" else f"{DATA[stage]}.jsonl"
        try:
            script.main(configure(script.Config, [*first, f"--dataset={place / data}",
                                                  *flags.split()]))
            wrong.append(flags)
        except UserError as e:
            if "has no effect" not in str(e) or flags.split()[0][2:].split("=")[0] not in str(e) \
                    and flags.split()[-1][2:].split("=")[0] not in str(e):
                wrong.append(f"{flags}: {e}")
    assert not wrong and not (tmp_path / "out").exists()
    shape = checkpoint.read_config(place / "base")
    if stage in MAKERS:
        cfg = configure(script.Config, [*first, "--family=llama", *(
            f"--{name}={getattr(shape, name)}" for name in SHAPES if hasattr(shape, name)),
            "--bias=0", "--dropout=0.1"])
        train.refuse_idle(cfg, shape, start.get_in_force(cfg, shape, True))


SCRATCH = ["--rope_theta=5", "--num_experts_per_tok=3", "--moe_intermediate_size=9",
           "--n_shared_experts=2", "--preset=gpt2 --n_kv_head=2 --family=llama",
           "--preset=gpt2 --n_kv_head=2 --bias=0",
           "--family=qwen2 --bias=0",
           "--family=qwen3_moe --num_experts=4 --moe_intermediate_size=8 --intermediate_size=9"]


@pytest.mark.parametrize("flags", SCRATCH)
def test_of_a_new_model_too(go, flags, tmp_path):
    with pytest.raises(UserError, match="has no effect"):
        go("train", "out", "--n_layer=1", "--n_head=2", "--n_embd=16", *flags.split())


RESUMED = ["--n_layer=7", "--family=gemma3", "--n_embd=32", "--rope_theta=5", "--lora_rank=4",
           "--lora_rank=0", "--targets=q_proj", "--dora=1", "--rslora=1", "--lora_alpha=9",
           "--lora_dropout=0.3", "--sliding_window=3"]


def test_a_resumed_run_refuses_what_it_cannot_change(go, place):
    """What it can change it does; what the run has is no change."""
    out = go("lora", "out")
    before = files(out)
    for flag in RESUMED:
        with pytest.raises(UserError, match=f"{flag.split('=')[0]}.* has no effect"):
            resume(sft, out, flag, "--max_iters=3")
        assert files(out) == before, flag
    resume(sft, out, "--max_iters=3", "--lora_rank=2", "--learning_rate=1e-3")
    assert trainer(last(out))["settings"]["learning_rate"] == 1e-3
    full = go("sft", "full")
    with pytest.raises(UserError, match="--lora_rank=2 has no effect on a run that is resumed"):
        resume(sft, full, "--lora_rank=2", "--max_iters=3")


def test_what_the_command_line_overrules_in_a_config_file_is_no_mistake(place, tmp_path):
    """A file's muon_learning_rate under --optimizer=adamw; but a file that contradicts itself is
    refused."""
    file = tmp_path / "mine.py"
    file.write_text("optimizer = 'muon'\nmuon_learning_rate = 0.1\nlora_alpha = 9.0\n"
                    "lora_rank = 2\n")
    shape = checkpoint.read_config(place / "base")

    def settle(*flags):
        cfg = configure(sft.Config, [str(file), f"--init_from={place / 'base'}", *flags])
        train.refuse_idle(cfg, shape, start.get_in_force(cfg, shape, True))
    settle()
    settle("--optimizer=adamw")
    settle("--lora_rank=0")
    with pytest.raises(UserError, match="--muon_learning_rate=0.3 has no effect"):
        settle("--optimizer=adamw", "--muon_learning_rate=0.3")
    file.write_text("optimizer = 'adamw'\nmuon_learning_rate = 0.1\n")
    with pytest.raises(UserError, match="--muon_learning_rate=0.1 has no effect"):
        settle()


def test_every_row_of_the_tables_names_settings_that_there_are():
    """The causes may be settings of a group that a script does not have."""
    groups = set(field_types(train.Config)) | set(field_types(distill.Config))
    for script in SCRIPTS.values():
        names = set(field_types(script.Config))
        for cls in script.Config.__mro__:
            for rule in vars(cls).get("IDLE", ()):
                assert {*rule.names.split()} <= names, rule
                assert {*rule.causes.split()} <= groups | names, rule
    assert is_resumed(sft.Config(init_from="resume"))
