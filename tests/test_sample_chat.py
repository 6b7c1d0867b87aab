"""A chat in a terminal, with adapters, and of other vocabularies.
"""
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers

from text import chat
from formats import peft
from layers import lora as lora_layers
import sample
import tokenizer as tokenizers
from checkpoint import load_model, load_tokenizer, save_model
from config import UserError
from inference import generate as generation
from inference.generate import Text
from model import Transformer
from sample_base import (GREEDY, KINDS, build, greedy, prompt, run_all, run_main, saved, script,     # noqa: F401
                         stdin)

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
        for parameter in lora_layers.get_parameters(model).values():
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
