"""configure() and run(): types, precedence, hints, --help, and the one sentence of an error.

What is protected: nanoGPT's way of giving settings, and that no mistake of a user's ends in a
traceback. The settings a file or a flag gives are typed here, so no script checks them again.
"""
import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pytest

import config
from training.machine import PEAK_TFLOPS
from config import UserError, configure, show

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    ranges = {"batch_size": "[-1e30, 1e30]", "learning_rate": "[-1, 1]"}    # of this class alone
    dataset: str = "stdlib"             # a name, a path or a URL
    batch_size: int = 12                # rows of a micro-batch; more
                                        # of this comment is on the next line
    learning_rate: float = 6e-4         # the highest
    compile: bool = False               # torch.compile the model
    start: str = "\n"                   # the prompt
    seed: int | None = 1337             # None: another one every time
    stop: list[str] = field(default_factory=list)   # strings that end a sample
    # --- more settings
    top_p: float | None = None          # nucleus sampling
    grad_clip: float = 1.0


@dataclass
class Words:
    command: str = "show"               # train, encode or show
    files: list[str] = field(default_factory=list)
    vocab_size: int = 256


def given(*argv, cls=Config, **kw):
    return configure(cls, list(argv), **kw)


def config_file(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


# -------------------------------------------------------------------- the command line

def test_without_arguments_the_defaults_hold():
    assert asdict(given()) == asdict(Config())
    assert given().given == frozenset()


@pytest.mark.parametrize("argv, name, value", [
    (["--batch_size=4"], "batch_size", 4),
    (["--batch_size", "4"], "batch_size", 4),
    (["--batch-size=4"], "batch_size", 4),              # either spelling of a name
    (["--batch_size=5e3"], "batch_size", 5000),
    (["--batch_size=-3"], "batch_size", -3),
    (["--batch_size", "-3"], "batch_size", -3),         # a negative number is no flag
    (["--learning_rate=1"], "learning_rate", 1.0),      # an int for a float
    (["--learning_rate", "-2.5e-3"], "learning_rate", -2.5e-3),
    (["--compile"], "compile", True), (["--compile=1"], "compile", True),
    (["--compile", "true"], "compile", True), (["--compile=Yes"], "compile", True),
    (["--compile=0"], "compile", False), (["--compile", "False"], "compile", False),
    (["--compile=no"], "compile", False), (["--compile", "0"], "compile", False),
    (["--start=a=b"], "start", "a=b"), (["--start=--x"], "start", "--x"),
    (["--start="], "start", ""), (["--start", "two words"], "start", "two words"),
    (["--start=None"], "start", "None"), (["--start=12"], "start", "12"),
    (["--seed=None"], "seed", None), (["--seed=none"], "seed", None), (["--seed=7"], "seed", 7),
    (["--top_p=0.9"], "top_p", 0.9), (["--top_p", "None"], "top_p", None),
    (["--stop=a,b"], "stop", ["a", "b"]),
    (["--batch_size=1", "--batch_size=2"], "batch_size", 2),    # the later one wins
    (["--batch_size=123456789012345678901"], "batch_size", 123456789012345678901),
])
def test_a_value_is_read_as_its_fields_type(argv, name, value):
    got = getattr(given(*argv), name)
    assert got == value and type(got) is type(value)
    others = {k: v for k, v in asdict(given(*argv)).items() if k != name}
    assert others == {k: v for k, v in asdict(Config()).items() if k != name}


def test_a_bare_flag_swallows_no_neighbour(tmp_path):
    cfg = given("--compile", "--batch_size", "3")
    assert (cfg.compile, cfg.batch_size) == (True, 3)
    path = config_file(tmp_path, "batch_size = 5")
    cfg = given("--compile", path)
    assert (cfg.compile, cfg.batch_size) == (True, 5)


@pytest.mark.parametrize("argv, words", [
    (["--batch_size=x"], ["batch_size", "int", "'x'"]),
    (["--batch_size=0.5"], ["batch_size", "int", "0.5"]),       # never rounded in silence
    (["--batch_size=inf"], ["batch_size", "int"]), (["--batch_size=nan"], ["batch_size", "int"]),
    (["--batch_size=None"], ["batch_size", "int", "None"]),
    (["--batch_size="], ["batch_size", "int"]),
    (["--learning_rate=fast"], ["learning_rate", "float", "fast"]),
    (["--compile=maybe"], ["compile", "bool", "maybe"]),
    (["--seed=x"], ["seed", "int or None"]),
    (["--batch_size"], ["--batch_size", "needs a value"]),
    (["--batch_size", "--compile"], ["--batch_size", "needs a value"]),
    (["--batchsize=4"], ["batchsize", "did you mean batch_size"]),
    (["--learning_rat=1"], ["did you mean learning_rate"]),
    (["--zzz=4"], ["'zzz'", "--help"]),
    (["--given=4"], ["given"]),
    (["shakespeare"], ["'shakespeare'", "does not exist", "--name=value"]),
    (["batch_size=4"], ["batch_size=4", "--name=value"]),       # the dashes forgotten
])
def test_a_mistake_is_one_sentence_that_names_it(argv, words):
    with pytest.raises(UserError) as e:
        given(*argv)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


# ---------------------------------------------------------------------- positional fields

def test_positional_words_fill_their_fields_in_order():
    kw = dict(cls=Words, positional=("command", "files"))
    assert given(**kw).files == []
    cfg = given("train", "a.txt", "--vocab_size=300", "b.py", **kw)     # a list takes the rest
    assert (cfg.command, cfg.files, cfg.vocab_size) == ("train", ["a.txt", "b.py"], 300)
    assert cfg.given == {"command", "files", "vocab_size"}
    assert given("train", **kw).files == []             # nothing is left over from a call before
    assert Words().files == []


def test_one_word_too_many():
    with pytest.raises(UserError, match="unexpected argument 'b'"):
        given("a", "b", cls=Words, positional=("command",))
    with pytest.raises(UserError, match="vocab_size.*int.*'b'"):
        given("b", cls=Words, positional=("vocab_size",))


# --------------------------------------------------------------------------- config files

def test_order_is_default_then_files_then_command_line(tmp_path):
    one = config_file(tmp_path, "batch_size = 1\nseed = 1\nlearning_rate = 1", "one.py")
    two = config_file(tmp_path, "batch_size = 2\nseed = 2", "two.py")
    for argv in ([one, two, "--seed=3"], ["--seed=3", one, two], [one, "--seed", "3", two]):
        cfg = given(*argv)
        assert (cfg.learning_rate, cfg.batch_size, cfg.seed) == (1.0, 2, 3)
        assert cfg.dataset == "stdlib" and type(cfg.learning_rate) is float
        assert cfg.given == {"batch_size", "seed", "learning_rate"}
    assert given(two, one).batch_size == 1


def test_given_tells_a_choice_from_a_default(tmp_path):
    """A later stage inherits what the user did not choose, even where the choice is the default."""
    cfg = given(config_file(tmp_path, "batch_size = 12"), "--compile=0")
    assert cfg.given == {"batch_size", "compile"}
    assert "given" not in asdict(cfg) and "given" not in show(cfg)
    marked = [line for line in show(cfg).splitlines() if line.startswith("*")]
    assert len(marked) == 2 and "* batch_size = 12" in marked
    assert len(show(cfg).splitlines()) == len(fields(Config))


def test_config_file_is_python(tmp_path):
    cfg = given(config_file(tmp_path, """
        # comments, imports, expressions, helpers and private names are all fine
        import time, math
        from pathlib import Path
        _half = 3
        def twice(n): return 2 * n
        batch_size = 5 * 8
        learning_rate = twice(_half) * 1e-4
        start = 'ft-' + str(time.time())
        dataset = Path('some') / 'where'
        compile = not True
        seed = None
        stop = ('a', 'b')
    """))
    assert cfg.batch_size == 40 and cfg.learning_rate == pytest.approx(6e-4)
    assert cfg.start.startswith("ft-") and cfg.dataset == os.path.join("some", "where")
    assert (cfg.compile, cfg.seed, cfg.stop) == (False, None, ["a", "b"])


@pytest.mark.parametrize("text, words", [
    ("batch_size = = 3", ["SyntaxError", "line 1"]),
    ("batch_size = 1 / 0", ["ZeroDivisionError"]),
    ("import no_such_module_at_all", ["no_such_module_at_all"]),
    ("batch_sise = 3", ["'batch_sise'", "did you mean batch_size"]),
    ("batch_size = 0.5", ["batch_size is int", "0.5"]),
    ("batch_size = '3x'", ["batch_size is int", "3x"]),
    ("batch_size = True", ["batch_size is int", "True"]),
    ("batch_size = None", ["batch_size is int", "None"]),
    ("learning_rate = False", ["learning_rate is float"]),
    ("dataset = 3", ["dataset is str"]),
    ("compile = 'maybe'", ["compile is bool"]),
    ("stop = 3", ["stop is list"]),
])
def test_a_faulty_config_file_names_itself(text, words, tmp_path):
    path = config_file(tmp_path, text)
    with pytest.raises(UserError) as e:
        given(path)
    message = str(e.value)
    assert path in message and "\n" not in message
    for word in words:
        assert word in message


def test_a_config_file_with_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "bad.py"
    path.write_bytes(b"batch_size = 3\n\xff\xfe\x00")
    with pytest.raises(UserError, match="bad.py does not run"):
        given(str(path))


def test_a_missing_config_file_and_a_folder(tmp_path):
    for path in (tmp_path / "nowhere.py", tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            given(str(path))


# ----------------------------------------------------------------------------------- help

@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_field_with_its_comment_and_default(flag, capsys):
    with pytest.raises(SystemExit) as e:
        given("--nonsense", flag)                       # help comes before any complaint
    assert e.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    for f in fields(Config):
        assert sum(line.strip().startswith(f"--{f.name}=") for line in lines) == 1, f.name
    assert "--dataset='stdlib'  (str)  a name, a path or a URL" in out
    assert ("--batch_size=12  (int)  rows of a micro-batch; more of this comment is on the "
            "next line") in out
    assert "--seed=1337  (int or None)  None: another one every time" in out
    assert "--stop=[]  (list)" in out and "--grad_clip=1.0  (float)" in out
    assert "\nmore settings:\n" in out                  # the heading above top_p
    assert "configure() and run()" in out               # the script's own docstring leads
    assert "config/FILE.py" in out


def test_help_of_positional_words(capsys):
    with pytest.raises(SystemExit):
        given("--help", cls=Words, positional=("command", "files"))
    assert "[command] [files]" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ run

def finish(monkeypatch, capsys, act, argv=(), cls=Config):
    """(status, stdout, stderr) of run() around a main that does `act`."""
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    monkeypatch.delenv("RANK", raising=False)
    status = 0
    try:
        config.run(act, cls)
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err


def raiser(error):
    def act(cfg):
        raise error
    return act


def test_run_hands_the_settings_to_main(monkeypatch, capsys):
    seen = []
    assert finish(monkeypatch, capsys, seen.append, ["--batch_size=3"]) == (0, "", "")
    assert seen[0].batch_size == 3


@pytest.mark.parametrize("act, argv", [
    (raiser(UserError("no such thing: try another")), []),
    (print, ["--batchsize=3"]), (print, ["nowhere.py"]), (print, ["--batch_size=x"]),
])
def test_a_users_mistake_is_one_line_and_status_2(act, argv, monkeypatch, capsys):
    status, out, err = finish(monkeypatch, capsys, act, argv)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def test_under_torchrun_the_other_ranks_say_who_they_are(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    config.complain("it hurts")
    assert capsys.readouterr().err == "error [rank 3]: it hurts\n"


@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, ["interrupted"]),
    (OSError(errno.ENOSPC, "No space left", "out/x.npy"), 2, ["disk is full", "out/x.npy"]),
    (OSError(errno.ENOSPC, "No space left on device"), 2, ["disk is full", "No space left"]),
    (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, ["permission", "/root/x"]),
    (OSError(errno.EROFS, "Read-only file system", "/usr/x"), 2, ["permission", "/usr/x"]),
    (MemoryError(), 2, ["out of memory", "--batch_size"]),
])
def test_what_the_machine_refuses_is_a_sentence_too(error, status, words, monkeypatch, capsys):
    got, out, err = finish(monkeypatch, capsys, raiser(error))
    assert (got, out) == (status, "")
    assert err.count("\n") == 1 and "Traceback" not in err and "None" not in err
    for word in words:
        assert word in err


def test_torchs_own_out_of_memory_names_the_flag(monkeypatch, capsys):
    import torch
    status, _, err = finish(monkeypatch, capsys, lambda cfg: torch.empty(2 ** 55))
    assert status == 2 and err.count("\n") == 1
    assert "out of memory" in err and "--batch_size" in err


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"),
                                   FileNotFoundError(errno.ENOENT, "gone", "x")])
def test_a_bug_keeps_its_traceback(error, monkeypatch, capsys):
    """Hiding a mistake of ours behind a friendly sentence would help nobody."""
    with pytest.raises(type(error)):
        finish(monkeypatch, capsys, raiser(error))


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from dataclasses import dataclass
from config import UserError, run

@dataclass
class Config:
    lines: int = 1      # how much to say

def main(cfg):
    if cfg.lines < 0:
        raise UserError("less than nothing: ask for more lines")
    for i in range(cfg.lines):
        print("line", i, flush=cfg.lines < 9)
    while cfg.lines == 7:
        time.sleep(0.01)

if __name__ == "__main__":
    run(main, Config)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    return [sys.executable, str(path)]


def test_a_script_as_the_shell_sees_it(script):
    done = subprocess.run([*script, "--lines=2"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "line 0\nline 1\n", "")
    done = subprocess.run([*script, "--lines=-2"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: less than nothing: ask for more lines\n"
    done = subprocess.run([*script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "how much to say" in done.stdout and done.stderr == ""


def test_a_reader_that_has_had_enough_is_no_error(script):
    """`sample.py | head -1`: quiet, and without Python's complaint at the exit."""
    child = subprocess.Popen([*script, "--lines=200000"], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "line 0\n"
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait() == 0


def test_ctrl_c_is_one_line(script):
    child = subprocess.Popen([*script, "--lines=7"], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    for i in range(7):
        assert child.stdout.readline() == f"line {i}\n"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=10)
    assert (child.returncode, err) == (130, "error: interrupted\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(script):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*script, "--lines=20000"], stdout=full, stderr=subprocess.PIPE,
                              text=True)
    assert done.returncode == 2
    assert "the disk is full" in done.stderr and "Traceback" not in done.stderr


# ----------------------------------------------------------- the files of nanoGPT, and ours

def evaluation(name):
    return f"""
        batch_size = 8
        eval_iters = 500
        eval_only = True
        wandb_log = False
        init_from = {name!r}
    """


# nanoGPT's seven config files: the same variables with the same values
NANOGPT = {
    "eval_gpt2": evaluation("gpt2"), "eval_gpt2_medium": evaluation("gpt2-medium"),
    "eval_gpt2_large": evaluation("gpt2-large"), "eval_gpt2_xl": evaluation("gpt2-xl"),
    "finetune_shakespeare": """
        import time
        dataset, init_from, out_dir = 'shakespeare', 'gpt2-xl', 'out-shakespeare'
        eval_iters, eval_interval = 40, 5
        wandb_log = False
        wandb_project = 'shakespeare'
        wandb_run_name = 'ft-' + str(time.time())
        always_save_checkpoint = False
        max_iters = 20
        batch_size = 1
        gradient_accumulation_steps = 32
        decay_lr = False
        learning_rate = 3e-5
    """,
    "train_gpt2": """
        wandb_log = True
        wandb_run_name='gpt2-124M'
        wandb_project = 'owt'
        block_size = 1024
        batch_size = 12
        gradient_accumulation_steps = 5 * 8
        lr_decay_iters = 600000
        max_iters = 600000
        log_interval, eval_iters, eval_interval = 10, 200, 1000
        weight_decay = 1e-1
    """,
    "train_shakespeare_char": """
        dataset = 'shakespeare_char'
        out_dir = 'out-shakespeare-char'
        log_interval, eval_iters, eval_interval = 10, 200, 250
        always_save_checkpoint = False
        wandb_log = False
        wandb_project = 'shakespeare-char'
        wandb_run_name = 'mini-gpt'
        batch_size = 64
        gradient_accumulation_steps = 1
        block_size = 256
        n_layer = n_head = 6
        n_embd = 384
        dropout = 0.2
        learning_rate, min_lr = 1e-3, 1e-4
        lr_decay_iters = max_iters = 5000
        beta2 = 0.99
        warmup_iters = 100
        device = 'cpu'
        compile = False
    """,
}


@pytest.mark.parametrize("name", NANOGPT)
def test_nanogpts_own_config_files_run_unchanged(name, tmp_path):
    from train import Config as TrainConfig
    path = config_file(tmp_path, NANOGPT[name], name + ".py")
    namespace = {}
    exec(textwrap.dedent(NANOGPT[name]), namespace)     # the oracle: what nanoGPT does with it
    wanted = {k: v for k, v in namespace.items()
              if not k.startswith("_") and isinstance(v, (bool, int, float, str))}
    cfg = configure(TrainConfig, [path])
    assert cfg.given == set(wanted)
    for key, value in wanted.items():
        got = getattr(cfg, key)
        # the run's name holds the second it was made in; compile may say False in its own words
        assert key == "wandb_run_name" and got[:3] == value[:3] or got == value or (
            key == "compile" and str(got) == str(value)), key


def test_nanogpts_command_line_runs_unchanged():
    """The README's own command for a laptop."""
    from train import Config as TrainConfig
    flags = dict(device="cpu", compile="False", eval_iters=20, log_interval=1, block_size=64,
                 batch_size=12, n_layer=4, n_head=4, n_embd=128, max_iters=2000,
                 lr_decay_iters=2000, dropout=0.0)
    cfg = configure(TrainConfig, [f"--{k}={v}" for k, v in flags.items()])
    assert all(str(getattr(cfg, k)) == str(v) for k, v in flags.items())


# those of pretraining, and those of the stages after it, which are named after their script
STAGES = sorted(p.stem for p in (ROOT / "config").glob("*_skills.py"))
SHIPPED = sorted(p.name for p in (ROOT / "config").glob("[a-z]*.py") if p.stem not in STAGES)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_file_resolves(name):
    from train import Config as TrainConfig
    path = ROOT / "config" / name
    cfg = configure(TrainConfig, [str(path)])
    assert cfg.given
    head = path.read_text().split("\n\n")[0]
    assert head.startswith(("#", '"""')), "its head says what the run costs"
    json.dumps(asdict(cfg))                             # what is saved beside the checkpoint


@pytest.mark.parametrize("name", STAGES)
def test_a_shipped_config_file_of_a_stage_resolves(name):
    """With its own script's settings; its head names the command that it is for."""
    script = name.removesuffix("_skills")
    module = importlib.import_module("sft" if script == "lora" else script)
    path = ROOT / "config" / f"{name}.py"
    cfg = configure(module.Config, [str(path)])
    assert cfg.dataset == "skills" and cfg.out_dir == f"out/{script}"
    assert f"python {script}.py config/{name}.py" in path.read_text().split('"""')[1]
    assert (cfg.lora_rank > 0) == (script == "lora")
    json.dumps(asdict(cfg))


def test_every_stage_has_a_config_file():
    assert STAGES == ["distill_skills", "dpo_skills", "lora_skills", "sft_skills"]


def test_the_config_files_that_the_readme_promises_are_there():
    for name in ("demo", "shakespeare_char", "gpt2_small", "llama_small", "tiny"):
        assert name + ".py" in SHIPPED


def test_reading_settings_imports_no_torch():
    """--help and a typing mistake are answered at once, not after the seconds torch takes."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import config\n"
            "print('torch' in sys.modules)")
    start = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert out.stdout == "False\n" and time.monotonic() - start < 5


VOCABULARY = {"shakespeare_char": 65, "nanogpt_shakespeare_char": 65, "demo": 16384,
              "tiny": 16384}


@pytest.mark.parametrize("path", [ROOT / "config" / name for name in SHIPPED],
                         ids=lambda p: p.stem)
def test_the_cost_at_the_head_of_a_config_is_what_it_costs(path):
    """Parameters x tokens -> TFLOPs, and the minutes on H100s, follow from the settings."""
    import torch
    import train
    head = path.read_text().split('"""')[1]
    cfg = configure(train.Config, [str(path)])
    with torch.device("meta"):
        machine = train.Machine(torch.device("meta"), torch.float32)
        model = train.build_model(cfg, VOCABULARY.get(path.stem, 50257), machine)
    tokens = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size * cfg.max_iters
    tera = model.flops_per_token(cfg.block_size) * tokens / 1e12
    said = re.search(r"cost: ([\d,]+) parameters x ([\d,]+) tokens -> ([\d,]+) TFLOPs", head)
    assert [int(x.replace(",", "")) for x in said.groups()] == [
        model.parameter_count(), tokens, round(tera)]
    if "H100" in head:
        one, eight = re.search(r"that is ([\d,]+) minutes on one, ([\d,]+) on eight", head).groups()
        minutes = tera / (0.4 * PEAK_TFLOPS["H100"]) / 60
        assert int(one.replace(",", "")) == round(minutes)
        assert int(eight.replace(",", "")) == round(minutes / 8)


@dataclass
class Child(Config):
    extra: int = 1      # only the child's


def test_help_knows_the_comments_of_inherited_fields():
    """A stage's Config builds on train.Config: its --help is that of both."""
    from config import field_comments
    mine, theirs = field_comments(Child)[0], field_comments(Config)[0]
    assert theirs and mine == theirs | {"extra": "only the child's"}
