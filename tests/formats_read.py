"""Every kind of file that the project reads: a sound one, our reader, and the library's.

    for kind in formats_read.make_all(folder): kind.read(), kind.expected()

A reader gives values that compare by ==. `oracle` is the library of the format, or the definition
of it in a few lines; None where there is none, and then only the sound file's value is right.
"""
import contextlib
import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import numpy as np
import safetensors
import sentencepiece
import tokenizers
import torch
import transformers

import checkpoint
import tokenizer
import train
from config import UserError
from data import chats, corpus, loader, public
from formats.peft import find_base, load_adapter, save_adapter
from formats.safetensors import read, read_header
from layers.lora import add_lora
from model import ModelConfig, Transformer
from training import faults

ROOT = Path(__file__).resolve().parent.parent
TEXT = "the quick brown fox jumps over the lazy dog, and again it jumps. "
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHAPE = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=300, block_size=64, init_std=0.4)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
YARN = dict(rope_scaling={"rope_type": "yarn", "factor": 4.0,
                          "original_max_position_embeddings": 32})
FAMILIES = {"llama": {}, "qwen3": YARN, "gpt2": {}, "gemma3": {}, "glm4_moe": {
    **EXPERTS, "first_k_dense_replace": 1, "intermediate_size": 32}, "qwen3_moe": EXPERTS}
IDS = torch.arange(2, 42)[None]
SAMPLES = ("the quick <think> brown <|im_end|>fox\n", "the quick brown fox", "ü — 123")
# what the library gives back as it stands, or leaves out, is no value of ours
LOGITS = 1e-4                           # two programs' float32


@dataclass
class Kind:
    """A kind of file: where a sound one is, and who reads it."""
    name: str
    file: Path
    ours: Callable[[], Any]             # reads the file's folder
    oracle: Callable[[], Any] | None = None
    equal: Callable[[Any, Any], bool] = lambda a, b: a == b
    sound: bytes = b""
    value: Any = field(default=None)

    def __post_init__(self) -> None:
        self.sound = self.file.read_bytes()
        self.value = self.read()
        if self.oracle:
            assert self.equal(self.value, self.oracle()), f"{self.name}: the sound file differs"

    def read(self) -> Any:
        with contextlib.redirect_stderr(io.StringIO()):
            return self.ours()

    def is_right(self, value: Any) -> bool:
        """Whether the value read from a damaged file is the sound one's, or the library's."""
        if self.equal(value, self.value):
            return True
        if self.oracle is None:
            return False
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                return self.equal(value, self.oracle())
        except BaseException as e:      # tokenizers panics; refusing is right in its own way
            if isinstance(e, KeyboardInterrupt):
                raise
            return False


# --- models -----------------------------------------------------------------------------------

def train_tokenizer():
    found = tokenizer.train([TEXT * 50], 300, special_tokens=CONTROLS)
    found.template = "chatml"
    return found


def close(a, b):
    return a.shape == b.shape and bool(torch.allclose(a, b, atol=LOGITS, rtol=0))


def compute_logits(folder):
    with torch.no_grad():
        return checkpoint.load_model(folder, "cpu").logits(IDS)


FLOATS = re.compile(r".*(eps\w*|theta|freq|softcapping|factor|beta_\w+)")


def compute_theirs(folder):
    """transformers' logits; a number that it calls a float may be written without a point."""
    file = folder / "config.json"
    file.write_text(json.dumps(as_floats(json.loads(file.read_bytes()))))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


def save(folder, name, more):
    torch.manual_seed(0)
    made = Transformer(ModelConfig.from_family(name, **SHAPE, **more))
    return checkpoint.save_model(folder / name, made,
                                 train_tokenizer())


def as_floats(value):
    if not isinstance(value, dict):
        return value
    if type(scale := value.get("query_pre_attn_scalar")) is float and scale.is_integer():
        value = {**value, "query_pre_attn_scalar": int(scale)}
    return {k: float(v) if type(v) is int and FLOATS.fullmatch(k) else as_floats(v)
            for k, v in value.items()}


def compute_meta(file, hf):
    """transformers' Llama with the settings that Meta's names mean."""
    said = json.loads(file.read_bytes())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        hf,
        dtype=torch.float32,
        rms_norm_eps=float(said["norm_eps"]),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(said.get("rope_theta", 10000.0)),
        },
        hidden_size=said["dim"],
        num_hidden_layers=said["n_layers"],
        num_attention_heads=said["n_heads"],
        num_key_value_heads=said.get("n_kv_heads", said["n_heads"]),
    ).eval()
    with torch.no_grad():
        return model(IDS).logits


def make_configs(folder: Path) -> list[Kind]:
    """config.json of several families, with our section and without."""
    found = []
    for name, more in FAMILIES.items():
        for own in (True, False):
            path = save(folder / ("own" if own else "theirs"), name, more)
            if not own:
                settings = json.loads((path / "config.json").read_text())
                del settings["handmade"]
                (path / "config.json").write_text(json.dumps(settings))
            # our section says everything again, and damage to it has no library
            found.append(Kind(f"config.json of {name}{' with ours' * own}", path / "config.json",
                              lambda path=path: compute_logits(path),
                              lambda path=path: compute_theirs(path), close))
    return found


def make_weights(folder: Path) -> list[Kind]:
    """Files of weights, their index, Meta's settings, adapters, and a trainer's state."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_family("llama", **SHAPE))
    one = checkpoint.save_model(folder / "one", model)
    shards = checkpoint.save_model(folder / "shards", model, shard_bytes=8000)
    meta = checkpoint.convert(one, folder / "meta", form="meta")
    checkpoint.save_checkpoint(folder / "run", model, None, {
        "optimizer": {"a": torch.arange(50.0), "step": 3}, "state": {"step": 3},
        "settings": {"batch_size": 2}})

    def bytes_of(tensor):
        return str(tensor.dtype), tuple(tensor.shape), tensor.view(-1).view(torch.uint8).tolist()

    def ours():
        return {name: bytes_of(read(place))
                for name, place in read_header(one / "model.safetensors").items()}

    def theirs():
        with safetensors.safe_open(one / "model.safetensors", "pt") as f:
            return {name: bytes_of(f.get_tensor(name)) for name in f.keys()}

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value.tolist() if isinstance(value, torch.Tensor) else value

    adapted = checkpoint.load_model(one, "cpu")
    add_lora(adapted, 2, 4)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight)
    adapter = save_adapter(folder / "adapter", adapted, base=str(one))

    def apply_adapter():
        loaded = checkpoint.load_model(one, "cpu")
        load_adapter(adapter, loaded)
        with torch.no_grad():
            return loaded.logits(IDS)

    def apply_theirs():
        import peft
        loaded = transformers.AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(loaded, adapter).eval()
        with torch.no_grad():
            return loaded(IDS).logits

    return [
        Kind("model.safetensors", one / "model.safetensors", ours, theirs),
        Kind("model.safetensors.index.json", shards / "model.safetensors.index.json",
             lambda: compute_logits(shards), lambda: compute_theirs(shards), close),
        Kind("params.json", meta / "params.json", lambda: compute_logits(meta),
             lambda: compute_meta(meta / "params.json", one), close),
        Kind("trainer.pt", folder / "run" / "trainer.pt",
             lambda: plain(checkpoint.load_trainer(folder / "run"))),
        Kind("adapter_config.json", adapter / "adapter_config.json", apply_adapter, apply_theirs,
             close),
        Kind("base.json", adapter / "base.json", lambda: os.path.realpath(find_base([adapter]))),
    ]


# --- tokenizers -------------------------------------------------------------------------------

def encode_ours(folder):
    """What a text becomes, with and without the ids around it; which tokens have a role."""
    found = checkpoint.load_tokenizer(folder)
    ids = [found.encode(text, "all") for text in SAMPLES]
    around = [[*found.prefix, *row, *found.suffix] for row in ids]
    return ids, around, [found.bos_token, found.eos_token, found.pad_token]


def encode_theirs(folder):
    """The same by transformers, which wants a mark on tokens that are objects."""
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_bytes())
    file.write_text(json.dumps({
        key: {"__type": "AddedToken", **value} if key.endswith("_token") and isinstance(value, dict)
        else value for key, value in said.items()}))
    found = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [found(text, add_special_tokens=False).input_ids for text in SAMPLES]
    around = [found(text).input_ids for text in SAMPLES]
    return ids, around, [name or None for name in (found.bos_token, found.eos_token,
                                                   found.pad_token)]


def encode_library(file):
    found = tokenizers.Tokenizer.from_file(str(file))
    found.no_truncation()
    found.no_padding()
    return [[found.encode(text, add_special_tokens=special).ids for text in SAMPLES]
            for special in (False, True)]


POST = {"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": CONTROLS[0], "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {CONTROLS[0]: {"id": CONTROLS[0], "ids": [297],
                                         "tokens": [CONTROLS[0]]}}}
THINK = {"id": 300, "content": "<think>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": False}
SETTINGS = {"bos_token": CONTROLS[0], "pad_token": CONTROLS[2], "add_bos_token": False,
            "extra_special_tokens": [CONTROLS[1]],
            "added_tokens_decoder": {"299": {
                "content": CONTROLS[2], "lstrip": False, "rstrip": False, "normalized": False,
                "special": True, "single_word": False}}}
ROLES = {"eos_token": {"content": CONTROLS[2], "lstrip": False, "special": True},
         "bos_token": CONTROLS[0], "additional_special_tokens": [CONTROLS[1]], "pad_token": None}


def make_tokenizers(folder: Path) -> list[Kind]:
    """tokenizer.json, tokenizer.model, and the files that stand beside them."""
    found = []

    def add(name, **files):
        """A folder of its own for a file; those in `files` are edited: name -> what to add."""
        path = folder / str(len(found))
        checkpoint.save_model(path, model, train_tokenizer())
        (path / "tokenizer_config.json").write_text((path / "tokenizer_config.json").read_text())
        for file, more in files.items():
            file = path / f"{file}.json"
            whole = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps({**whole, **more}))
        return path, name

    def kind(path, name, ours=encode_ours, theirs=encode_theirs):
        found.append(Kind(name, path / name, lambda: ours(path), theirs and (lambda: theirs(path))))

    def stops(path):
        return checkpoint.load_tokenizer(path).stop_ids

    def stops_theirs(path):
        """The end of a text and of a turn, and what the file adds to them."""
        said = json.loads((path / "generation_config.json").read_bytes()).get("eos_token_id")
        said = said if isinstance(said, list) else [said]
        assert all(i is None or type(i) is int for i in said)
        return sorted({297, 299} | {i for i in said if i is not None and 0 <= i < 300})

    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_family("llama", **SHAPE))

    def vocabulary(path):
        return list(encode_ours(path)[:2])

    def library(path):
        return encode_library(path / "tokenizer.json")

    kind(*add("tokenizer.json"), vocabulary, library)
    plain = json.loads(found[0].sound)
    kind(*add("tokenizer.json", tokenizer={
        "post_processor": POST, "added_tokens": [*plain["added_tokens"], THINK],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "truncation": {"direction": "Right", "max_length": 20, "strategy": "LongestFirst",
                       "stride": 0},
        "model": {**plain["model"], "merges": [m.split(" ") for m in plain["model"]["merges"]]}}),
        vocabulary, library)
    kind(*add("tokenizer_config.json"))
    kind(*add("tokenizer_config.json", tokenizer_config=SETTINGS))
    kind(*add("special_tokens_map.json", special_tokens_map=ROLES))
    kind(*add("added_tokens.json", added_tokens={CONTROLS[2]: 299, CONTROLS[1]: 298}))
    kind(*add("config.json"))
    kind(*add("generation_config.json"), stops, stops_theirs)
    return [*found, make_sentencepiece(folder / "spm")]


def make_sentencepiece(folder: Path) -> Kind:
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT * 3] * 20), model_prefix=str(folder / "tokenizer"),
        vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2)

    def ours():
        found = tokenizer.load(folder / "tokenizer.model")
        return [found.encode(text) for text in SAMPLES]

    def theirs():
        found = sentencepiece.SentencePieceProcessor()
        found.LoadFromSerializedProto((folder / "tokenizer.model").read_bytes())
        return [found.encode(text) for text in SAMPLES]

    return Kind("tokenizer.model", folder / "tokenizer.model", ours, theirs)


# --- data -------------------------------------------------------------------------------------

RECORDS = {
    "sft": [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "hi"},
                {
                    "role": "assistant",
                    "content": "ho",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
                    ],
                },
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "a", "reasoning_content": "r", "train": True},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "task": "t",
            "answer": "a",
            "chat_template_kwargs": {"x": 1},
        },
        {"instruction": "a", "input": "b", "output": "c", "history": [["q", "a"]], "system": "s"},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": "x", "weight": 1},
            ],
            "source": "web",
        },
    ],
    "preference": [
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1.0},
        {
            "chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "z"}],
        },
        {
            "conversations": [{"from": "human", "value": "x"}],
            "chosen": {"from": "gpt", "value": "y"},
            "rejected": {"from": "gpt", "value": "z"},
        },
    ],
    "labels": [{"text": "a", "label": 1}, {"text": "a", "label": "spam", "idx": 3}],
}


def make_data(folder: Path) -> list[Kind]:
    """Shards, their meta.json, records of any layout, and logs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "t.txt").write_text(TEXT * 1000)
    ready = folder / "ready"
    subprocess.run([sys.executable, "data/prepare.py", folder / "t.txt", "--vocab_size=270",
                    f"--out={ready}", "--workers=1"], cwd=ROOT, check=True, capture_output=True)

    def shard():
        return loader.Dataset(ready).tokens("train").read(0, whole).tolist()

    def shard_theirs():
        return np.load(ready / "train_00000.npy", allow_pickle=False).astype(np.int64).tolist()

    def dataset():
        found = loader.Dataset(ready)
        found.check_tokenizer(tokenizer.load(ready))
        parts = [found.tokens(split) for split in ("train", "val")]
        return [p.read(0, len(p)).tolist() for p in parts], found.vocab_size, found.eot

    def log():
        return faults.read_log(folder / "log.jsonl", train.State(step=4))

    def log_theirs():
        kept = []
        for line in (folder / "log.jsonl").read_bytes().split(b"\n")[:-1]:
            with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
                if int(json.loads(line.decode())["step"]) <= 4:
                    kept.append(line.decode() + "\n")
        return kept

    def run_names():
        return [checkpoint.resolve(folder / "run", which).name for which in ("best", "last")]

    def names_theirs():
        said = json.loads((folder / "run" / "checkpoints.json").read_bytes())
        there = [n for n in (said.get("best"), said.get("last")) if n in ("step_000002",
                                                                          "step_000004")]
        return [there[0], said["last"]]

    whole = len(np.load(ready / "train_00000.npy"))
    (folder / "log.jsonl").write_text("".join(
        json.dumps({"step": n, "loss": n / 7}) + "\n" for n in range(1, 7)))
    for name in ("step_000002", "step_000004"):
        (folder / "run" / name).mkdir(parents=True)
        (folder / "run" / name / "config.json").touch()
    (folder / "run" / "checkpoints.json").write_text(json.dumps(
        {"last": "step_000004", "best": "step_000002", "complete": True}))
    return [Kind("shard .npy", ready / "train_00000.npy", shard, shard_theirs),
            Kind("meta.json", ready / "meta.json", dataset),
            Kind("log.jsonl", folder / "log.jsonl", log, log_theirs),
            Kind("checkpoints.json", folder / "run" / "checkpoints.json", run_names,
                 names_theirs),
            make_bin(folder), *make_records(folder), *make_archives(folder)]


def make_bin(folder: Path) -> Kind:
    """llm.c's shard of tokens: 256 int32, then uint16."""
    file = folder / "tokens.bin"
    ids = np.arange(500, dtype="<u2") % 290
    head = np.zeros(256, dtype="<i4")
    head[:3] = 20240520, 1, len(ids)
    file.write_bytes(head.tobytes() + ids.tobytes())
    tok = train_tokenizer()

    def ours():
        out = []
        writer = SimpleNamespace(write=lambda ids, documents, size: out.extend(ids.tolist()))
        corpus.convert_bins([(file, "train")], tok, {"train": writer})
        return out

    def theirs():
        return np.frombuffer(file.read_bytes()[1024:], "<u2").tolist()

    return Kind("llm.c .bin", file, ours, theirs)


def make_records(folder: Path) -> list[Kind]:
    """JSON lines, an array, CSV, and gzip of them; records of the layouts of chats."""
    rows = [{"text": f"line {n}, “quoted”", "n": n, "deep": {"a": [n, None, True]}}
            for n in range(8)]
    files = {"r.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
             "r.json": json.dumps(rows, indent=1),
             "r.csv": "text,n\n" + "".join(f'"a ""{n}"", b",{n}\n' for n in range(8))}
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "r.jsonl.gz").write_bytes(gzip.compress(files["r.jsonl"].encode(), mtime=0))

    def ours(file):
        return [record for _, record in loader.Reader().records(file)]

    def lines(text):
        """Values one after the other; commas may stand between them."""
        found = []
        at = 0
        while (at := re.compile(r"[ \t\r\n,]*").match(text, at).end()) < len(text):
            value, at = json.JSONDecoder().raw_decode(text, at)
            found.append(value)
        return found

    def rows_of_csv(file):
        rows = csv.DictReader(io.StringIO(file.read_bytes().decode(), newline=""), strict=True)
        rows.fieldnames = [name.strip() or f"column {k}"
                           for k, name in enumerate(rows.fieldnames or (), 1)]
        return list(rows)

    oracles = {
        "r.jsonl": lambda f: lines(f.read_bytes().decode()),
        "r.json": lambda f: json.loads(f.read_bytes().decode() or "[]"),
        "r.csv": rows_of_csv,
        "r.jsonl.gz": lambda f: lines(gzip.decompress(f.read_bytes()).decode()),
    }
    return [Kind({"r.jsonl": "JSON lines", "r.json": "JSON array", "r.csv": "CSV",
                  "r.jsonl.gz": "JSON lines .gz"}[name], folder / name,
                 lambda file=folder / name: ours(file),
                 lambda file=folder / name, read_=read_: read_(file))
            for name, read_ in oracles.items()]


def make_archives(folder: Path) -> list[Kind]:
    """What public sets come as: UCI's zip, Stanford's tar.gz."""
    text = "".join(f"{('ham', 'spam')[n % 2]}\tmessage {n}\n" for n in range(20))
    with zipfile.ZipFile(folder / "sms.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("readme", "x" * 50)
        archive.writestr("SMSSpamCollection", text)
    with gzip.GzipFile(folder / "imdb.tar.gz", "wb", mtime=0) as packed:
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for n in range(6):
                data = f"review {n}".encode()
                member = tarfile.TarInfo(f"aclImdb/train/{('pos', 'neg')[n % 2]}/{n}_7.txt")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

    def read_archive(read_, name):
        try:
            return [r for _, r in read_(folder / name, loader.Reader())]
        except public.BROKEN as e:              # as public.py does around all of them
            raise UserError(str(e)[:200]) from None

    def zip_ours():
        return read_archive(public.sms, "sms.zip")

    def zip_theirs():
        with zipfile.ZipFile(folder / "sms.zip") as archive:
            found = archive.read("SMSSpamCollection").decode()
        return [dict(zip(("label", "text"), line.rstrip("\r").split("\t", 1)))
                for line in found.split("\n") if line.strip()]

    def tar_ours():
        return read_archive(public.reviews, "imdb.tar.gz")

    def tar_theirs():
        with tarfile.open(folder / "imdb.tar.gz") as archive:
            return [{"text": archive.extractfile(m).read().decode(),
                     "label": "positive" if "/pos/" in m.name else "negative"} for m in archive]

    return [Kind("zip archive", folder / "sms.zip", zip_ours, zip_theirs),
            Kind("tar.gz archive", folder / "imdb.tar.gz", tar_ours, tar_theirs)]


def make_all(folder: Path) -> list[Kind]:
    return [*make_weights(folder / "weights"), *make_tokenizers(folder / "tokenizers"),
            *make_data(folder / "data"), *make_configs(folder / "configs")]


def read_layout(kind: str, file: Path) -> list:
    """The records of a chat file in the layout of a stage, each value of the type it must have."""
    found = list(chats.read_chats(file, kind))
    for record in found:
        for name in ("messages", "chosen", "rejected"):
            for turn in record.get(name, []):
                assert isinstance(turn["content"], str) and turn["role"] in (
                    "system", "user", "assistant", "tool"), turn
                assert isinstance(turn.get("reasoning_content", ""), str)
                assert type(turn.get("train", True)) is bool
                assert all(isinstance(call["function"]["arguments"], dict)
                           for call in turn.get("tool_calls", []))
        assert all(isinstance(record.get(name, ""), str)
                   for name in ("task", "answer", "text", "label"))
    return found
