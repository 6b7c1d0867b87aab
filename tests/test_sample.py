"""sample.py: the choice of tokens, batches and caches, stop strings, and what reaches stdout."""
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers

from text import chat
import kernels
from formats import peft
from layers import lora as lora_layers
import sample
import tokenizer as tokenizers
from checkpoint import load_model, load_tokenizer, save_model
from config import UserError
from conftest import ROOT
from inference import generate as generation
from inference.generate import Sampling, Text, generate, next_token, prefill, warp
from model import ModelConfig, Transformer
from families import SCRATCH

V = 61
SHAPE = dict(vocab_size=V, block_size=24, n_layer=2, n_head=4, n_embd=32)
KINDS = {"gpt2": dict(SCRATCH["gpt2"].flags, **SHAPE),
         "llama": dict(SCRATCH["llama"].flags, **SHAPE, n_kv_head=2),
         "qwen3": dict(SCRATCH["llama"].flags, **SHAPE, n_kv_head=2, qk_norm=True, head_dim=16),
         "no position": dict(SHAPE, position="none")}


def build(kind="gpt2", **changes) -> Transformer:
    model = Transformer(ModelConfig(**{**KINDS[kind], **changes}))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.2, generator=generator)
    return model.eval()


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, V, (length,), generator=generator).tolist()


def run_all(*args, **kwargs) -> list[list[int]]:
    """Rows of tokens instead of steps."""
    rows: list[list[int]] = []
    for step in generate(*args, **kwargs):
        rows = rows or [[] for _ in step]
        for row, token in zip(rows, step):
            if token is not None:
                row.append(token)
    return rows


GREEDY = Sampling(temperature=0)


def logits(rows=5, seed=0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3

# ------------------------------------------------------------------- choosing the next token


@pytest.mark.parametrize("settings, processor", [
    (dict(top_k=7), transformers.TopKLogitsWarper(7)),
    (dict(top_k=1000), transformers.TopKLogitsWarper(1000)),
    (dict(top_p=0.8), transformers.TopPLogitsWarper(0.8)),
    (dict(top_p=0.01), transformers.TopPLogitsWarper(0.01)),
    (dict(min_p=0.1), transformers.MinPLogitsWarper(0.1)),
    (dict(temperature=0.3), transformers.TemperatureLogitsWarper(0.3))],
    ids=lambda x: str(x) if isinstance(x, dict) else "theirs")      # one name in every process
def test_the_filters_are_those_of_transformers(settings, processor):
    x = logits()
    expected = processor(torch.zeros(5, 1, dtype=torch.int64), x.clone())
    torch.testing.assert_close(warp(x, Sampling(**settings)), expected)


def test_filters_combined_in_the_order_of_transformers():
    x, seen_ids = logits(), torch.randint(0, V, (5, 9))
    expected = x.clone()
    for processor in (transformers.RepetitionPenaltyLogitsProcessor(1.7),
                      transformers.TemperatureLogitsWarper(0.7), transformers.TopKLogitsWarper(20),
                      transformers.TopPLogitsWarper(0.9), transformers.MinPLogitsWarper(0.05)):
        expected = processor(seen_ids, expected)
    seen = torch.zeros(5, V, dtype=torch.bool).scatter(1, seen_ids, True)
    torch.testing.assert_close(warp(x, Sampling(0.7, 20, 0.9, 0.05, 1.7), seen), expected)


def test_top_p_and_min_p_against_their_definitions():
    """The smallest set of likeliest tokens whose sum reaches p; all within a share of the best."""
    for row in logits(20):
        p = row.softmax(-1)
        order = sorted(range(V), key=lambda i: -float(p[i]))
        for top_p in (0.3, 0.75, 0.99):
            total, keep = 0.0, set()
            for i in order:
                keep.add(i)
                total += float(p[i])
                if total >= top_p:
                    break
            kept = warp(row.unsqueeze(0), Sampling(top_p=top_p))[0].isfinite().nonzero()
            assert {int(i) for i in kept} == keep
        kept = warp(row.unsqueeze(0), Sampling(min_p=0.2))[0].isfinite().nonzero()
        assert {int(i) for i in kept} == {i for i in range(V) if p[i] >= 0.2 * p.max()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_at_each_temperature(temperature):
    x, n = torch.tensor([2.0, 1.0, 0.0, -1.0, -math.inf]), 40_000
    settings = Sampling(temperature=temperature)
    generators = [torch.Generator().manual_seed(5)] * n             # one stream, n draws
    counts = next_token(x.expand(n, -1), settings, generators).bincount(minlength=5)
    p = (x / temperature).softmax(-1)
    assert counts[4] == 0
    # five standard deviations of a binomial
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_top_k_of_one_is_greedy_and_temperature_zero_is_the_maximum():
    x, generators = logits(), [torch.Generator().manual_seed(i) for i in range(5)]
    assert torch.equal(next_token(x, Sampling(top_k=1), generators), x.argmax(-1))
    assert torch.equal(next_token(x, GREEDY, generators), x.argmax(-1))
    model = build()
    assert run_all(model, [prompt(5)], 12, Sampling(top_k=1)) == run_all(
        model, [prompt(5)], 12, GREEDY)


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(top_k=-1), dict(top_p=0),
                                 dict(top_p=1.5), dict(min_p=2), dict(repetition_penalty=0),
                                 dict(temperature=math.nan)], ids=str)
def test_settings_out_of_range_are_one_sentence(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)

# --------------------------------------------------------------------- batches and the cache


@pytest.mark.parametrize("settings", [GREEDY, Sampling(0.9, 40, 0.95, 0.01, 1.2)],
                         ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_ragged_batch_equal_each_alone(kind, settings):
    """Prompts of 1 token and more, past the context; row r alone has seed + r (nanoGPT #613)."""
    model = build(kind)
    prompts = [prompt(n, n) for n in (1, 11, 23, 24, 30)]
    together = run_all(model, prompts, 40, settings, seed=7)
    for r, row in enumerate(together):
        assert len(row) == 40
        assert run_all(model, [prompts[r]], 40, settings, seed=7 + r) == [row]


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_equals_computing_everything_again(kind):
    """… through the re-encoding of the last half whenever the context is full."""
    model, start, made = build(kind), prompt(3), 60
    context, expected = list(start), []
    limit = model.config.block_size
    for _ in range(made):
        token = int(model.logits(torch.tensor([context]))[0, -1].argmax())
        expected.append(token)
        context.append(token)
        if len(context) > limit:                        # as documented: keep the last half
            context = context[-(limit // 2):]
    assert run_all(model, [start], made, GREEDY) == [expected]


def test_prefill_makes_logits_of_the_last_position_only(monkeypatch):
    model, heads = build(), []
    real = kernels.linear

    def watched(x, weight, bias=None):
        if weight is model.output_weight:
            heads.append(tuple(x.shape))
        return real(x, weight, bias)
    monkeypatch.setattr(kernels, "linear", watched)
    prompts = [prompt(4), prompt(20)]
    last, cache = prefill(model, prompts, 24)
    assert heads == [(2, 32)] and cache.lengths == [4, 20]
    monkeypatch.undo()
    for row, p in zip(last, prompts):
        torch.testing.assert_close(row, model.logits(torch.tensor([p]))[0, -1])


def test_a_seed_gives_the_same_text_and_another_seed_another():
    model, settings = build(), Sampling(temperature=2.0)
    first = run_all(model, [prompt(4)] * 3, 20, settings, seed=1)
    assert first == run_all(model, [prompt(4)] * 3, 20, settings, seed=1)
    assert first != run_all(model, [prompt(4)] * 3, 20, settings, seed=4)
    assert first[0] != first[1]
    assert first[1:] == run_all(model, [prompt(4)] * 2, 20, settings, seed=2)   # seed + row


def test_each_row_ends_on_its_own():
    model, prompts = build(), [prompt(4, 1), prompt(6, 2), prompt(3, 3)]
    full = run_all(model, prompts, 30, GREEDY)
    length = {0: 3, 1: 30, 2: 28}
    counts = [0] * 3

    def ends(row, token):
        counts[row] += 1
        return counts[row] == length[row]
    assert run_all(model, prompts, 30, GREEDY, ends=ends) == [
        row[:length[r]] for r, row in enumerate(full)]
    steps = list(generate(model, prompts[:2], 30, GREEDY, ends=lambda row, token: True))
    assert len(steps) == 1                              # and stops when the last row has ended


def test_a_context_of_one_token_and_a_prompt_of_one_token():
    assert len(run_all(build(block_size=1), [[3], [4]], 5, GREEDY)[1]) == 5
    assert len(run_all(build(), [[3]], 1, GREEDY)[0]) == 1


def test_padding_rows_of_the_matrix_are_never_drawn():
    model = build()
    rows = run_all(model, [prompt(4)], 200, Sampling(temperature=5.0), vocab_size=10)
    assert max(rows[0]) < 10


def test_the_repetition_penalty_counts_prompt_and_text():
    """Large enough, it forbids every token that occurred, while others have positive logits."""
    model = build()
    start = prompt(4)
    row = run_all(model, [start], 15, Sampling(0, repetition_penalty=1e9))[0]
    assert len(set(start) | set(row)) == len(set(start)) + len(row)


def test_ids_the_model_does_not_know_and_empty_prompts():
    model = build()
    for bad in ([[V]], [[1], [V + 5]], [[-1]], [[]], []):
        with pytest.raises(UserError):
            list(generate(model, bad, 5))


def test_generation_leaves_the_model_ready_for_training():
    """Its mode, and its cached tables: tensors of inference mode would break the next backward."""
    model = build("llama", dropout=0.5).train()
    assert run_all(model, [prompt(4)], 9, GREEDY) == run_all(model, [prompt(4)], 9, GREEDY)
    assert model.training
    model(torch.tensor([prompt(8)])).sum().backward()

# ------------------------------------------------------------------------ text and stop strings


class Letters:
    """A tokenizer whose tokens are given strings, for exact control over where they are cut."""

    def __init__(self, pieces):
        self.pieces = pieces

    def stream(self, after=()):
        pieces = self.pieces

        class Stream:
            def put(self, i):
                return pieces[i]

            def flush(self):
                return ""
        return Stream()


def feed(pieces, stops, ends=frozenset()) -> tuple[str, list[str], bool]:
    text, out = Text(Letters(pieces), stops, set(ends)), []
    for i in range(len(pieces)):
        out.append(text.put(i))
        if text.over:
            break
    out.append(text.flush())
    return "".join(out), out, text.over


@pytest.mark.parametrize("pieces, stops, expected", [
    (["Hello ", "wor", "ld"], ["wo"], "Hello "),
    (["a", "b", "\n", "\n", "c"], ["\n\n"], "ab"),
    (["a\n", "b\n", "\nc"], ["\n\n"], "a\nb"),
    (["x", "ab", "ab", "abc"], ["abc"], "xabab"),               # a false start, twice
    (["aaa", "ab"], ["aab"], "aa"),
    (["one END two"], ["END", "one"], ""),                      # the first in the text counts
    (["Us", "er", ":"], ["User:"], ""),
    (["Us", "er"], ["User:"], "User"),                          # held back, then released
    (["abc"], [], "abc"), (["abc"], [""], "abc")])
def test_text_is_cut_before_a_stop_string_wherever_tokens_end(pieces, stops, expected):
    got, out, over = feed(pieces, stops)
    assert got == expected
    assert over == any(s and s in "".join(pieces) for s in stops)


def test_streaming_never_shows_a_part_of_a_stop_string():
    """Random texts and stops: every prefix that was printed is a prefix of the final text."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        letters = ["ab"[i] for i in torch.randint(0, 2, (20,), generator=generator)]
        stop = "".join("ab"[i] for i in torch.randint(0, 2, (4,), generator=generator))
        size = int(torch.randint(1, 5, (1,), generator=generator))
        pieces = ["".join(letters[i:i + size]) for i in range(0, 20, size)]
        got, out, over = feed(pieces, [stop])
        assert got == "".join(letters).split(stop)[0]


def test_the_end_token_ends_a_sample_and_is_not_printed():
    assert feed(["a", "<end>", "b"], ["zz"], {1}) == ("a", ["a", "", ""], True)
    assert feed(["a", "z", "<end>"], ["zz"], {2})[0] == "az"

# --------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model with a byte-level tokenizer."""
    tok = tokenizers.train(["hello world, the quick brown fox " * 20], 280)
    model = Transformer(ModelConfig(**dict(KINDS["gpt2"], vocab_size=tok.vocab_size)))
    path = tmp_path_factory.mktemp("sample") / "m"
    save_model(path, model, tok)
    return path


def script(*args, stdin="", **kwargs):
    return subprocess.run([sys.executable, str(ROOT / "sample.py"), *map(str, args)],
                          input=stdin, capture_output=True, text=True, encoding="utf-8", **kwargs)


def test_only_the_text_is_on_stdout_streamed_or_not(saved, capsys):
    streamed = script(f"--model={saved}", "--max_new_tokens=30", "--prompt=hello", "--ignore_eot",
                      "--device=cpu")
    whole = run_main(capsys, saved, max_new_tokens=30, prompt="hello", ignore_eot=True,
                     stream=False)
    assert streamed.returncode == 0 and streamed.stdout == whole
    assert streamed.stdout.startswith("hello") and len(streamed.stdout) > 20
    assert "tokens/s" in streamed.stderr and "parameters" in streamed.stderr


@pytest.fixture
def stdin(tmp_path, monkeypatch):
    """stdin(text): what a pipe or a file says to a script that runs in this process."""
    with contextlib.ExitStack() as stack:
        def say(text):
            (tmp_path / "stdin").write_text(text, encoding="utf-8")
            file = stack.enter_context(open(tmp_path / "stdin", encoding="utf-8"))
            monkeypatch.setattr(sys, "stdin", file)
        yield say


def run_main(capsys, saved, **settings) -> str:
    settings = {"max_new_tokens": 20, "device": "cpu", **settings}
    sample.main(sample.Config(model=str(saved), **settings))
    return capsys.readouterr().out


def test_several_samples_are_separated_and_reproducible(saved, capsys):
    out = run_main(capsys, saved, prompt="fox", num_samples=3, ignore_eot=True)
    parts = out[:-1].split("\n---------------\n")
    assert len(parts) == 3 and all(p.startswith("fox") for p in parts)
    alone = run_main(capsys, saved, prompt="fox", seed=1338, ignore_eot=True)
    assert alone == parts[1] + "\n"


def test_prompt_from_a_file_from_nanogpts_start_and_from_lines(saved, capsys, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("the quick\nbrown", encoding="utf-8")
    expected = run_main(capsys, saved, prompt="the quick\nbrown")
    assert run_main(capsys, saved, file=str(file)) == expected
    assert run_main(capsys, saved, start=f"FILE:{file}") == expected
    assert run_main(capsys, saved, start="the quick\nbrown") == expected
    ragged = run_main(capsys, saved, file=str(file), lines=True, temperature=0)
    single = [run_main(capsys, saved, prompt=p, temperature=0) for p in ("the quick", "brown")]
    assert ragged == "---------------\n".join(single)


def test_prompt_from_a_pipe(saved, capsys, stdin):
    said = run_main(capsys, saved, prompt="hello wor")
    stdin("hello wor")
    assert run_main(capsys, saved) == said
    stdin("hello wor")
    assert run_main(capsys, saved, prompt="-") == said


def test_no_prompt_starts_where_documents_do(saved, capsys, tmp_path):
    first = run_main(capsys, saved, temperature=0)
    assert first == run_main(capsys, saved, prompt="<|endoftext|>", temperature=0, echo=False)
    for text in ("ab\n", "ab"):                         # characters: a newline, or the first
        chars = tokenizers.train_chars([text])
        save_model(tmp_path / "c", build(vocab_size=chars.vocab_size), chars)
        assert len(run_main(capsys, tmp_path / "c")) >= 20


def test_echo_can_be_left_out_and_stop_strings_end_the_text(saved, capsys):
    whole = run_main(capsys, saved, prompt="hello", temperature=0, max_new_tokens=40)
    bare = run_main(capsys, saved, prompt="hello", temperature=0, max_new_tokens=40, echo=False)
    assert whole == "hello" + bare
    stop = bare[3:5]
    for stream in (True, False):
        cut = run_main(capsys, saved, prompt="hello", temperature=0, max_new_tokens=40,
                       echo=False, stop=[stop], stream=stream)
        assert cut == bare[:bare.index(stop)] + "\n"


@pytest.mark.parametrize("settings, message", [
    (dict(file="missing.txt"), "missing.txt"), (dict(start="FILE:missing.txt"), "missing.txt"),
    (dict(prompt="a", start="b"), "both"), (dict(num_samples=0), "num_samples"),
    (dict(max_new_tokens=0), "max_new_tokens"), (dict(dtype="int4"), "int4"),
    (dict(device="gpu"), "gpu"), (dict(backend="fast"), "fast"), (dict(lines=True), "no line")],
    ids=str)
def test_mistakes_are_one_sentence(saved, settings, message):
    with pytest.raises(UserError, match=message):
        sample.main(sample.Config(model=str(saved), **settings))


def test_a_tokenizer_of_another_model_and_unknown_characters(tmp_path, capsys):
    chars = tokenizers.train_chars(["abcdefgh\n"])
    save_model(tmp_path / "m", build(vocab_size=4), chars)
    with pytest.raises(UserError, match="belongs to another model"):
        sample.main(sample.Config(model=str(tmp_path / "m"), prompt="hg"))
    with pytest.raises(UserError, match="'é'"):
        sample.main(sample.Config(model=str(tmp_path / "m"), prompt="é"))
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="byte 2"):
        sample.main(sample.Config(model=str(tmp_path / "m"), file=str(tmp_path / "bytes")))


def test_a_missing_model_is_status_2_and_a_reader_that_leaves_is_no_error(saved, tmp_path):
    lost = script(f"--out_dir={tmp_path / 'none'}", "--prompt=a")
    assert lost.returncode == 2 and lost.stdout == "" and lost.stderr.count("\n") == 1
    read, write = os.pipe()
    os.close(read)                                      # `python sample.py | head -0`
    gone = subprocess.run([sys.executable, str(ROOT / "sample.py"), f"--model={saved}",
                           "--prompt=a"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert gone.returncode == 0 and "Traceback" not in gone.stderr

# ----------------------------------------------------------------------- what a chat remembers

WINDOWS = dict(KINDS["llama"], sliding_window=4, block_size=200)


@pytest.mark.parametrize("kind", ["gpt2", "windows"])
def test_a_conversation_is_encoded_once_and_says_the_same(kind, monkeypatch):
    """Prompts that go on where the last answer ended, differ within it, or start anew."""
    model = build("llama", **WINDOWS) if kind == "windows" else build("gpt2", block_size=200)
    memory, ids, run = sample.Memory(), prompt(7), []
    real = Transformer.forward
    monkeypatch.setattr(Transformer, "forward",
                        lambda self, x, **k: run.append(x.shape[1]) or real(self, x, **k))
    for turn in (prompt(3, 1), prompt(2, 2), prompt(5, 3)):
        ids = ids + turn
        run.clear()
        row = run_all(model, [ids], 6, GREEDY, memory=memory)[0]
        first = run[0]
        assert row == run_all(model, [ids], 6, GREEDY)[0]
        ids = ids + row
    assert first == 5 + 1                               # the turn, and the last token not yet run
    for other in (ids[:20] + prompt(4, 5), prompt(9, 6), prompt(1, 7), ids[:3]):
        assert run_all(model, [other], 6, GREEDY, memory=memory) == run_all(
            model, [other], 6, GREEDY)
    long = prompt(190, 8)                               # more than the cache has room for
    assert run_all(model, [long], 30, GREEDY, memory=memory) == run_all(model, [long], 30, GREEDY)


def test_a_memory_is_of_one_row():
    with pytest.raises(UserError, match="a memory is of one text"):
        run_all(build(), [prompt(3), prompt(3)], 5, GREEDY, memory=sample.Memory())

# ------------------------------------------------------------------------------------- to talk


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A tiny Llama with a chat template and a context of 256."""
    tok = tokenizers.train(["hello world, the quick brown fox system user assistant " * 20], 300)
    tok.template = "chatml"
    tok.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    model = build("llama", vocab_size=tok.vocab_size, block_size=256)
    path = tmp_path_factory.mktemp("chat") / "m"
    save_model(path, model, tok)
    return path


def test_a_chat_is_what_transformers_generates_from_the_same_messages(talker, capsys):
    """The whole way, ten conversations: template, ids, greedy answer, the end of the turn."""
    tok = transformers.AutoTokenizer.from_pretrained(talker)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(talker, dtype=torch.float32).eval()
    for i in range(10):
        said = [{"role": "system", "content": "be quick"}] * (i % 2)
        said += [{"role": "user", "content": f"hello fox {'quick ' * i}é 世{i}"}]
        out = run_main(capsys, talker, chat=True, prompt=said[-1]["content"], temperature=0,
                       system="be quick" if i % 2 else "")
        ids = tok.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt",
                                      return_dict=True)["input_ids"]
        end = tok.convert_tokens_to_ids("<|im_end|>")
        answer = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20,
                                 do_sample=False, pad_token_id=0,
                                 eos_token_id=[end, tok.eos_token_id])[0, ids.shape[1]:]
        assert out == tok.decode(answer, skip_special_tokens=True) + "\n"


def test_lines_of_a_pipe_are_turns_that_know_those_before(talker, capsys, stdin):
    base = dict(chat=True, max_new_tokens=12, temperature=0)
    both = script(f"--model={talker}", "--chat", "--max_new_tokens=12", "--temperature=0",
                  stdin="hello\n\nthe fox\n")
    assert both.returncode == 0 and both.stderr.count("tokens/s") >= 2
    alone = [run_main(capsys, talker, prompt=p, **base) for p in ("hello", "the fox")]
    assert both.stdout.startswith(alone[0]) and not both.stdout.endswith(alone[1])
    stdin("hello\n/new\nthe fox\n")
    assert run_main(capsys, talker, **base) == alone[0] + alone[1]
    stdin("hello\nthe fox\n")
    assert run_main(capsys, talker, quantize="int8", **base).count("\n") >= 2


def test_a_long_conversation_forgets_its_oldest_exchanges():
    """… as whole turns: a template cut in the middle is a language the model never saw."""
    said = [{"role": "system", "content": "s"}] + [
        {"role": role, "content": str(i)} for i in range(5) for role in ("user", "assistant")]
    said.append({"role": "user", "content": "last"})
    render = lambda messages: [0] * (10 * len(messages))            # noqa: E731
    assert len(chat.fit(render, said, 75)) == 60      # 70 would begin with half an exchange
    assert [m["content"] for m in said] == ["s", "3", "3", "4", "4", "last"]
    assert len(chat.fit(render, said, 1)) == 20
    assert [m["content"] for m in said] == ["s", "last"]


def test_a_chat_by_a_models_own_template(talker, tmp_path, capsys):
    """One that no row is: it is rendered as it stands, and its turns end where it says."""
    said = run_main(capsys, talker, chat=True, prompt="hello", temperature=0, max_new_tokens=30)
    folder = shutil.copytree(talker, tmp_path / "own")
    (folder / "chat_template.jinja").write_text(
        "{%- for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
        "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    assert run_main(capsys, folder, chat=True, prompt="hello", temperature=0,
                    max_new_tokens=30) == said
    with pytest.raises(UserError, match="no place for enable_thinking"):
        run_main(capsys, folder, chat=True, prompt="hello", think=False)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('Not today') }}")
    with pytest.raises(UserError, match="refuses the conversation: Not today"):
        run_main(capsys, folder, chat=True, prompt="hello")
    assert run_main(capsys, folder, prompt="hello")         # text alone needs no template


def test_a_chat_longer_than_the_context_goes_on(talker, capsys, stdin):
    stdin("the quick brown fox é\n" * 12)
    out = run_main(capsys, talker, chat=True, max_new_tokens=40, temperature=0)
    assert len(out.splitlines()) >= 12


def test_ctrl_c_ends_an_answer_and_not_the_conversation(talker, capsys, monkeypatch):
    """At a terminal; what was said until then stays, and the half-done step is forgotten."""
    lines, calls, real = iter(["hello", "the fox", ""]), [], generation.decode

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(generation, "decode", interrupted)
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    out = run_main(capsys, talker, chat=True, temperature=0, max_new_tokens=9, ignore_eot=True)
    tok, said, model = load_tokenizer(talker), [], load_model(talker, "cpu")
    for line, count in (("hello", 4), ("the fox", 9)):      # the first token is of the prefill
        said.append({"role": "user", "content": line})
        ids = tok.render(said, add_generation_prompt=True)[0]
        text = Text(tok, [], set(), ids)
        row = run_all(model, [ids], count, GREEDY, vocab_size=tok.vocab_size)[0]
        said.append({"role": "assistant", "content": "".join(map(text.put, row)) + text.flush()})
    assert out == "".join(m["content"] + "\n" for m in said[1::2])


def test_mistakes_in_a_chat_are_one_sentence(saved, talker):
    for model, settings, message in (
            (saved, {}, "--template=chatml"), (talker, dict(template="klingon"), "--template="),
            (talker, dict(num_samples=2), "one conversation"),
            (talker, dict(lines=True), "one conversation"),
            (talker, dict(quantize="int3"), "choose from int8, int4"),
            (talker, dict(template="llama3"), "lacks")):
        with pytest.raises(UserError, match=message):
            sample.main(sample.Config(model=str(model), chat=True, prompt="a", device="cpu",
                                      **settings))


# -------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def tuned(talker, tmp_path_factory):
    """{name: (the folder of an adapter, a checkpoint with it merged)} of the talker, as lora.py
    leaves them, and "both": their sum."""
    top, out = tmp_path_factory.mktemp("lora"), {}
    torch.manual_seed(1)
    for name in ("sums", "brief"):
        model = load_model(talker, "cpu")
        lora_layers.add_lora(
            model, rank=3, alpha=9, targets="" if name == "sums" else "q_proj,up_proj"
        )
        for parameter in lora_layers.parameters(model).values():
            parameter.data.normal_(0, 0.3)              # B as well, which starts at zero
        folder = peft.save_adapter(top / name, model, base=str(talker))
        out[name] = folder, save_model(top / f"{name}-merged", lora_layers.merge(model),
                                       load_tokenizer(talker))
    model = load_model(talker, "cpu")
    for name, (folder, _) in list(out.items()):
        peft.load_adapter(folder, model, name)
    lora_layers.activate(model, "sums", "brief")
    out["both"] = (
        None,
        save_model(top / "both-merged", lora_layers.merge(model), load_tokenizer(talker)),
    )
    return out


def greedy(capsys, model, **settings):
    return run_main(capsys, model, prompt="hello fox", temperature=0, ignore_eot=True, **settings)


@pytest.mark.parametrize("options", [{}, dict(quantize="int8"), dict(backend="reference")], ids=str)
def test_an_adapter_says_what_its_merged_checkpoint_says(talker, tuned, capsys, options):
    """… one of them, another, and their sum, in every form in which weights are served."""
    says = {name: greedy(capsys, merged, **options) for name, (_, merged) in tuned.items()}
    says["none"] = greedy(capsys, talker, **options)
    assert len(set(says.values())) == 4                 # and they differ
    sums, brief = (str(tuned[name][0]) for name in ("sums", "brief"))
    assert greedy(capsys, talker, adapter=[sums], **options) == says["sums"]
    assert greedy(capsys, talker, adapter=[f"x={brief}"], **options) == says["brief"]
    assert greedy(capsys, talker, adapter=[sums, f"x={brief}"], **options) == says["both"]


def test_an_adapter_brings_its_base_and_lies_in_a_run(talker, tuned, capsys, tmp_path):
    """The folder of a run, or its checkpoint, whose weights are merged: their base is taken."""
    (folder, merged), run_dir = tuned["sums"], tmp_path / "a=run"
    shutil.copytree(merged, run_dir / "step_5")
    shutil.copytree(folder, run_dir / "step_5" / "adapter")
    (run_dir / "checkpoints.json").write_text('{"last": "step_5", "best": "step_5"}')
    expected = greedy(capsys, merged)
    for where in (folder, run_dir, run_dir / "step_5", run_dir / "step_5" / "adapter"):
        assert greedy(capsys, "", adapter=[str(where)]) == expected, where
    assert greedy(capsys, talker, adapter=[f"n={run_dir}"]) == expected
    with pytest.raises(UserError, match="merged into its weights"):     # it would count twice
        greedy(capsys, os.path.relpath(run_dir), adapter=[str(run_dir)])


def test_a_chat_switches_between_adapters(talker, tuned, capsys, stdin, monkeypatch):
    """Each answer is that of the merged checkpoint to all that was said, computed anew."""
    script = [("both", ""), ("both", "hello"), ("sums", "/adapter sums"), ("sums", "the fox"),
              ("sums", "quick"), ("none", "/adapter"), ("none", "world"),
              ("both", "/adapter sums brief"), ("both", "hello")]
    stdin("\n".join(line for _, line in script))
    loaded, real = [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward",
                        lambda self, x, **k: loaded.append(x.shape[1]) or real(self, x, **k))
    out = run_main(capsys, talker, chat=True, temperature=0, max_new_tokens=6,
                   adapter=[f"{name}={tuned[name][0]}" for name in ("sums", "brief")])
    lengths, said, expected = [n for n in loaded if n > 1], [], []
    tok = load_tokenizer(talker)
    for name, line in script:
        if not line or line.startswith("/"):
            continue
        model = load_model(talker if name == "none" else tuned[name][1], "cpu")
        said.append({"role": "user", "content": line})
        ids = tok.render(said, add_generation_prompt=True)[0]
        expected.append(len(ids))
        text = Text(tok, [], set(tok.stop_ids), ids)
        step = run_all(model, [ids], 6, GREEDY, vocab_size=tok.vocab_size,
                       ends=lambda _, token: token in tok.stop_ids)[0]
        said.append({"role": "assistant", "content": "".join(map(text.put, step)) + text.flush()})
    assert out == "".join(m["content"] + "\n" for m in said[1::2])
    # after a switch all of the conversation is encoded, and otherwise only what is new
    assert [a == b for a, b in zip(lengths, expected)] == [True, True, False, True, True]


def test_mistakes_with_adapters_are_one_sentence(saved, talker, tuned, tmp_path, monkeypatch):
    folder = str(tuned["sums"][0])
    homeless = shutil.copytree(folder, tmp_path / "homeless")
    config = json.loads((homeless / peft.CONFIG).read_text())
    config["base_model_name_or_path"] = "somebody/model-7b"
    (homeless / peft.CONFIG).write_text(json.dumps(config))
    (homeless / peft.BASE).unlink()             # as PEFT leaves an adapter: with a path alone
    for model, settings, message in (
            (talker, dict(adapter=["nosuch"]), "there is none at nosuch"),
            (talker, dict(adapter=[str(talker)]), "a folder that has adapter_config.json"),
            (talker, dict(adapter=[folder, folder]), "two are called sums"),
            (talker, dict(adapter=[f"a.b={folder}"]), "'a.b' cannot be an adapter's name"),
            (saved, dict(adapter=[folder]), "belong"),
            ("", dict(adapter=[str(homeless)]), "somebody/model-7b.*--model=DIR"),
            (talker, dict(adapter=[folder], chat=True, prompt="/adapter x"), "'x', only sums")):
        with pytest.raises(UserError, match=message) as e:
            sample.main(sample.Config(**{"prompt": "a", "model": str(model), **settings}))
        assert "\n" not in str(e.value)


def test_a_sentencepiece_prompt_begins_with_its_first_token_and_goes_on_with_a_space(tmp_path):
    """Without <s> a Llama 2 is out of its mind; and the sample is the text after the prompt."""
    tok = tokenizers.load(spm_file(tmp_path))
    ids = sample.encode(tok, "hello")
    assert ids[:1] == list(tok.prefix) and len(tok.prefix) == 1
    assert sample.encode(tok, "") == ids[:1]
    whole = tok.encode("hello world")
    assert ids[1:] == whole[:len(ids) - 1]
    text = Text(tok, [], set(), ids)
    assert "".join(text.put(i) for i in whole[len(ids) - 1:]) + text.flush() == " world"


def spm_file(folder):
    """A tokenizer.model as sentencepiece trains and writes it, for a Llama."""
    import sentencepiece
    (folder / "text").write_text("hello world the quick brown fox jumps over the lazy dog\n" * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=300, byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    return folder
