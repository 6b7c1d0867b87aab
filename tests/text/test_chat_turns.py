"""Turns of a chat: what each draws, commands, and what is promised of rows in each dtype."""
import math
import re

import pytest
import torch

import sft
import checkpoint
import eval as evaluation
import sample
import train
from config import UserError, configure
from inference import generate as generation
from inference.generate import TURN, Sampling, generate, sample_text
from inference.quantize import pack
# fixtures and helpers of sample.py's tests: a tiny chat model, stdin, a run in this process
from sample_base import build, prompt, run_all, run_main, saved, stdin    # noqa: F401
from test_sample_chat import talker    # noqa: F401

# ---------------------------------------------------------------------------- what turns draw


def answer(folder, said, seed, **how) -> str:
    """The answer to a conversation, by generate() alone."""
    model, tokenizer = checkpoint.load_model(folder, "cpu"), checkpoint.load_tokenizer(folder)
    ids, _ = tokenizer.render(said, add_generation_prompt=True)
    new = [step[0] for step in generate(model, [ids], 12, Sampling(**how), seed,
                                        tokenizer.vocab_size,
                                        lambda _, token: token in tokenizer.stop_ids)]
    return tokenizer.decode([t for t in new if t not in tokenizer.stop_ids])


def test_equal_questions_are_answered_anew_and_reproducibly(talker, capsys, stdin):     # noqa: F811
    how = dict(temperature=1.5, top_k=0)
    chat = dict(chat=True, max_new_tokens=12, **how)
    expected, said = [], []
    for k in range(4):
        said.append({"role": "user", "content": "hello"})
        expected.append(answer(talker, said, 7 + k * TURN, **how))
        said.append({"role": "assistant", "content": expected[-1]})
    for _ in range(2):                          # the same command, the same conversation
        stdin("hello\n" * 4)
        assert run_main(capsys, talker, seed=7, **chat) == "\n".join(expected) + "\n"
    # with nothing remembered the questions are equal as the model sees them, the answers are not
    stdin("hello\n/new\n" * 4)
    out = run_main(capsys, talker, seed=7, **chat)
    fresh = [answer(talker, said[:1], 7 + k * TURN, **how) for k in range(4)]
    assert out == "\n".join(fresh) + "\n" and len(set(fresh)) == 4
    stdin("hello\n/new\nhello\n")               # greedy answers have nothing to draw
    one, two = run_main(capsys, talker, chat=True, max_new_tokens=8, temperature=0).splitlines()
    assert one == two


def test_samples_of_a_prompt_differ_and_are_those_of_the_seeds_after(talker, capsys):   # noqa: F811
    def go(**settings):
        return run_main(capsys, talker, prompt="hello", temperature=1.5, top_k=0, echo=False,
                        **settings)[:-1]
    rows = go(seed=3, num_samples=3).split(f"\n{sample.SEPARATOR}\n")
    assert rows == [go(seed=3 + r) for r in range(3)] and len(set(rows)) == 3

# ------------------------------------------------------------------------------- the commands


def test_help_lists_every_command(talker, capsys, stdin):                               # noqa: F811
    stdin("/help\n")
    sample.main(sample.Config(model=str(talker), chat=True, device="cpu"))
    out, err = capsys.readouterr()
    assert out == "" and all(f"{name} " in err for name in sample.COMMANDS if name != "/exit")
    assert "/exit" in err and "//" in err


@pytest.mark.parametrize("word", ["/quit", "/exit"])
def test_quit_ends_a_conversation(talker, capsys, stdin, word):                         # noqa: F811
    stdin(f"hello\n{word}\nthe fox\n")
    how = dict(chat=True, max_new_tokens=8, temperature=0)
    both = run_main(capsys, talker, **how)
    assert both == run_main(capsys, talker, prompt="hello", **how)


@pytest.mark.parametrize("line, says", [
    ("/hepl", "no command '/hepl': did you mean /help"), ("/", "no command '/'"),
    ("/etc/hosts is a file", "no command '/etc/hosts'.*begin with //"),
    ("/New", "no command '/New': did you mean /new"), ("/new chat", "/new stands alone"),
    ("/quit now", "/quit stands alone"), ("/adapter x", "no adapter 'x', only the model")])
@pytest.mark.parametrize("way", ["pipe", "prompt"])
def test_unknown_commands_are_refused(talker, capsys, stdin, line, says, way):          # noqa: F811
    """In a pipe or as --prompt with status 2, and nothing is said to the model."""
    stdin(line + "\n")
    with pytest.raises(UserError, match=says):
        run_main(capsys, talker, chat=True, prompt=line if way == "prompt" else "")
    assert capsys.readouterr().out == ""


def test_at_a_terminal_a_wrong_command_is_told_and_the_chat_goes_on(
        talker, capsys, monkeypatch):                                                   # noqa: F811
    class Terminal:
        lines = iter(["/hepl", "/adapter x", "hello"])

        def isatty(self):
            return True
    monkeypatch.setattr(sample.sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda: next(Terminal.lines, ""))
    sample.main(sample.Config(model=str(talker), chat=True, device="cpu", max_new_tokens=8,
                              temperature=0))
    out, err = capsys.readouterr()
    assert "did you mean /help" in err and "no adapter 'x'" in err
    assert out == run_main(capsys, talker, chat=True, prompt="hello", max_new_tokens=8,
                           temperature=0)


def test_messages_that_begin_with_a_slash(                                              # noqa: F811
        talker, capsys, stdin, tmp_path, monkeypatch):
    """`//x` is the message /x, a space keeps it a message as it is, a file is always one."""
    seen, real = [], sample.fit

    def watched(render, messages, room):
        seen.append(messages[-1]["content"])
        return real(render, messages, room)
    monkeypatch.setattr(sample, "fit", watched)
    stdin("//etc/hosts\n /new\n///\n")
    run_main(capsys, talker, chat=True, max_new_tokens=2)
    (tmp_path / "code.c").write_text("// a comment\n/* another */\n")
    run_main(capsys, talker, chat=True, max_new_tokens=2, file=str(tmp_path / "code.c"))
    run_main(capsys, talker, chat=True, max_new_tokens=2, start=f"FILE:{tmp_path / 'code.c'}")
    run_main(capsys, talker, chat=True, max_new_tokens=2, prompt="//x")
    code = "// a comment\n/* another */\n"
    assert seen == ["/etc/hosts", " /new", "//", code, code, "/x"]

# ------------------------------------------------------------- what is promised in which dtype

TYPES = {"float32": ("", torch.float32), "bfloat16": ("", torch.bfloat16),
         "int8": ("int8", torch.float32), "int4": ("int4", torch.bfloat16)}


@pytest.mark.parametrize("name", TYPES)
def test_rows_of_a_batch_in_each_dtype(name):
    """As generate() promises: float32 rows are those of lone prompts; elsewhere each token is the
    likeliest one alone, or as good as tied with it; and a call gives the same tokens again."""
    quantize, dtype = TYPES[name]
    model = build("llama", block_size=96).to(dtype)
    pack(model, quantize)
    prompts = [[5], [7, 8, 9], list(range(30)), [3, 1, 4, 1, 5, 9, 2, 6]]
    greedy = Sampling(temperature=0)
    rows = run_all(model, prompts, 50, greedy)
    assert rows == run_all(model, prompts, 50, greedy)
    alone = [run_all(model, [p], 50, greedy)[0] for p in prompts]
    if name == "float32":
        assert rows == alone
    for start, row in zip(prompts, rows):
        with torch.inference_mode():
            z = model(torch.tensor([start + row[:-1]])).float()[0, len(start) - 1:]
        best, chosen = z.amax(-1), z[torch.arange(len(row)), torch.tensor(row)]
        # 8 bits of a bfloat16 mantissa, over the layers of the model
        tied = {"float32": 1e-4}.get(name, 2 ** -8 * 8) * float(z.abs().max())
        assert (best - chosen <= tied).all()


def test_the_promise_stands_where_a_user_reads_it():
    for text in (sample.__doc__, evaluation.__doc__, generation.__doc__):
        assert re.search(r"[Ii]n\s+float32", text) and "tied" in text

# ------------------------------------------------------------------------ nan, and where it ends


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["model.embed_tokens.weight", "model.norm.weight",
                                   "model.layers.1.mlp.down_proj.weight"])
@pytest.mark.parametrize("quantize", ["", "int8", "int4"])
def test_weights_that_are_not_finite_are_refused(value, where, quantize):
    model = build("llama")
    with torch.no_grad():
        model.get_parameter(where).flatten()[3] = value
    pack(model, quantize)
    for prompts in ([[0, 5]], [[0, 5], [0, 7, 9]]):
        with pytest.raises(UserError, match="logits are nan or infinite"):
            run_all(model, prompts, 5, Sampling(temperature=0))


def test_nan_is_refused_by_every_script_that_asks_a_model(talker, tmp_path, capsys):    # noqa: F811
    model, tokenizer = checkpoint.load_model(talker, "cpu"), checkpoint.load_tokenizer(talker)
    with torch.no_grad():
        model.output_weight[:] = math.nan
    folder = checkpoint.save_model(tmp_path / "m", model, tokenizer)
    data = tmp_path / "a.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, '
                    '{"role": "assistant", "content": "b"}]}\n')
    for run in (lambda: run_main(capsys, folder, prompt="hello"),
                lambda: run_main(capsys, folder, prompt="hello", num_samples=2),
                lambda: run_main(capsys, folder, prompt="hello", chat=True),
                lambda: evaluation.main(evaluation.Config(model=str(folder), dataset=str(data),
                                                          device="cpu"))):
        with pytest.raises(UserError, match="nan or infinite"):
            run()
    # a sample on the way is no reason to end a run
    said = sft.answer(model, tokenizer, {"messages": [{"role": "user", "content": "a"}]}, 0)
    assert said.startswith("no sample: the model's logits are nan")


def test_training_samples_end_at_the_first_stop_token(talker):                          # noqa: F811
    """Both of them: after a prompt of plain text, and after a question."""
    model, tokenizer = checkpoint.load_model(talker, "cpu"), checkpoint.load_tokenizer(talker)
    ids = tokenizer.encode_ordinary("hello world")
    stops = set(tokenizer.stop_ids)
    assert len(stops) == 2, "the end of text and of a turn"
    lengths = set()
    for seed in range(6):
        free = run_all(model, [ids], 60, Sampling(temperature=20.0), seed, tokenizer.vocab_size)[0]
        end = next((k + 1 for k, token in enumerate(free) if token in stops), 60)
        text = sample_text(model, tokenizer, ids, Sampling(temperature=20.0), seed, 60)
        assert text == tokenizer.decode(ids + free[:end])
        lengths.add(end)
    assert len(lengths) > 2, "or none ended"
    asked = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x"}]
    ids, _ = tokenizer.render(asked[:1], add_generation_prompt=True)
    free = run_all(model, [ids], 100, Sampling(temperature=0), 0, tokenizer.vocab_size)[0]
    end = next((k + 1 for k, token in enumerate(free) if token in stops), 100)
    assert sft.answer(model, tokenizer, {"messages": asked}, 0) == tokenizer.decode(
        ids + free[:end])
    # a record's tools are in its prompt; what stands before the first question is context
    tools = [{"type": "function", "function": {"name": "look"}}]
    talk = [{"role": "assistant", "content": "Welcome"}, *asked]
    prompt = tokenizer.render(talk[:2], None, True, tools=tools)[0]
    said = sft.answer(model, tokenizer, {"messages": talk, "tools": tools}, 0)
    assert said.startswith(tokenizer.decode(prompt)) and '"look"' in said and "Welcome" in said


def test_a_sample_prompt_outside_the_vocabulary_is_told_before_training(tmp_path, capsys):
    """It could otherwise end a run at its first sample, hours later."""
    from data import prepare
    text = tmp_path / "a.txt"
    text.write_text("abc def\n" * 400)
    prepare.main(configure(prepare.Config, [str(text), f"--out={tmp_path / 'data'}", "--workers=1",
                                            "--tokenizer=char"], ("source",)))
    flags = [f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}", "--sample_prompt=Z",
             "--sample_interval=1", "--max_iters=1", "--device=cpu"]
    with pytest.raises(UserError, match="'Z'"):
        train.main(configure(train.Config, flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("think", [None, True, False], ids=str)
def test_think_reaches_the_template(talker, monkeypatch, think, capsys):                # noqa: F811
    """sample.py and eval.py alike; without the flag the template decides."""
    model, tokenizer = checkpoint.load_model(talker, "cpu"), checkpoint.load_tokenizer(talker)
    asked, real = [], type(tokenizer).render

    def watched(self, messages, *args, **options):
        asked.append(options.pop("enable_thinking", None))
        return real(self, messages, *args, **options)
    monkeypatch.setattr(type(tokenizer), "render", watched)
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    evaluation.answers(model, tokenizer, [record], max_new_tokens=1, think=think,
                       template="qwen3")
    run_main(capsys, talker, chat=True, prompt="a", think=think, max_new_tokens=1,
             template="qwen3")
    assert asked == [think] * len(asked) and len(asked) >= 2
    if think is not None:               # a template that has no such switch would ignore it
        with pytest.raises(UserError, match="no place for enable_thinking"):
            evaluation.answers(model, tokenizer, [record], max_new_tokens=1, think=think)
