"""sample.py: the choice of tokens, batches and caches, stop strings, and what reaches stdout."""
import math
import os
import subprocess
import sys

import pytest
import torch
import transformers

import kernels
import sample
import tokenizer as tokenizers
from checkpoint import save_model
from config import UserError
from conftest import ROOT
from inference.generate import Sampling, Text, generate, next_token, prefill, warp
from sample_base import (GREEDY, KINDS, V, build, greedy, prompt, run_all, run_main, saved,     # noqa: F401
                         script, stdin)


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


def test_only_the_text_is_on_stdout_streamed_or_not(saved, capsys):
    streamed = script(f"--model={saved}", "--max_new_tokens=30", "--prompt=hello", "--ignore_eot",
                      "--device=cpu")
    whole = run_main(capsys, saved, max_new_tokens=30, prompt="hello", ignore_eot=True,
                     stream=False)
    assert streamed.returncode == 0 and streamed.stdout == whole
    assert streamed.stdout.startswith("hello") and len(streamed.stdout) > 20
    assert "tokens/s" in streamed.stderr and "parameters" in streamed.stderr


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


@pytest.mark.parametrize("text, lines, note", [
    ("a\n\nb\n", ["a", "b"], "1 empty line left out, so that there are 2 answers"),
    ("a\r\n\r\n\r\nb", ["a", "b"], "2 empty lines left out"), ("a\nb\n", ["a", "b"], "")])
def test_empty_lines_of_a_prompt_are_counted(text, lines, note, capsys):
    assert sample.read_lines(text) == lines
    err = capsys.readouterr().err
    assert note in err and bool(note) == bool(err)
