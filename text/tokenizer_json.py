"""tokenizer.json of byte-level BPE and of characters, to and from the parts of a Tokenizer.

The merges are the point. A file lists pairs, each with a rank, and a pair that is not listed never
merges; tiktoken and bpe.bpe() go by tokens: any two neighbours merge that spell one. Both do the
same once a token has the rank of the one pair that can make it. Why there is one: while nothing
has merged across the ends of a token's text, the merges within it are those of the text alone, in
the same order. That order has one last step, so one pair. rank_tokens() finds it for each token,
and leaves out the tokens that no text becomes; the oracle of the tests is `tokenizers`.
"""
from __future__ import annotations

from typing import Any, Iterable, Mapping

from config import refuse_to_run
from text.bpe import BYTE_ORDER, CHAR_BYTE, bpe, printable, unprintable
from text import pre_tokenizer
from text.added_tokens import flags_of, number

SEP = "\ud800"          # between the halves of a merge: half a surrogate pair is never in a text
LETTERS = frozenset(CHAR_BYTE)          # of tokens that stand for bytes: a letter a byte
FORMS = ("NFC", "NFD", "NFKC", "NFKD")


# --- merges -> ranks ------------------------------------------------------------------------

def rank_tokens(vocab: Mapping[str, int], merges: Iterable, whole: bool,
                controls: Iterable[str] = ()) -> tuple[dict[bytes, int], list[bytes]]:
    """Merges of a file -> ({token bytes: rank}, tokens that only a chunk of its own becomes).

    vocab: of printable characters. whole: a chunk that is in the vocabulary is not merged
    (ignore_merges); then its token gets a rank as well, unless merging by tokens would make it
    where the file lists no pair for it: those are the second part of the result. controls: names
    of added tokens, which no chunk is taken for.
    """
    pairs: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        if left not in vocab or right not in vocab or token not in vocab:
            raise ValueError(f"the merge {left!r:.40} {right!r:.40} is not of this vocabulary")
        if left and right and LETTERS.issuperset(token):    # others never apply
            pairs[left, right] = rank       # of two equal merges the library keeps the last
    made, doubtful = last_steps(pairs)
    keyed = {}                              # the same pairs, as bpe() takes them
    if doubtful or whole:
        keyed = {left + SEP + right: rank for (left, right), rank in pairs.items()}
    for token in doubtful:
        last = SEP.join(last_parts(token, keyed))
        if last in keyed:
            made[token] = keyed[last]
    in_order = [c for c in (printable(bytes([b])) for b in BYTE_ORDER) if c in vocab]
    in_order += sorted(made, key=made.__getitem__)
    only_whole = []
    known = {*in_order, *controls, ""}
    for token in vocab if whole else ():
        if token in known or not LETTERS.issuperset(token):
            continue
        if len(last_parts(token, keyed)) == 2:
            only_whole.append(unprintable(token))
        else:
            in_order.append(token)
    return {unprintable(t): k for k, t in enumerate(in_order)}, only_whole


def last_steps(pairs: dict[tuple[str, str], int]) -> tuple[dict[str, int], list[str]]:
    """Return (token -> rank of the pair that makes it, tokens for which that is not plain to see).

    Plain is the order of every trained vocabulary: both halves have lower ranks than the pair, and
    no merge across the middle comes before they are whole. To see that, go back in time from the
    pair: a is the last part of the left half and lives until a_end, b the first part of the right
    one, until b_end. Of equal ranks the left place goes first.
    """
    made: dict[str, int] = {}
    halves: dict[str, tuple[str, str]] = {}
    doubtful: dict[str, None] = {}
    for (left, right), rank in sorted(pairs.items(), key=lambda item: item[1]):
        token = left + right
        if token in made:
            continue
        a = left
        b = right
        a_end = b_end = rank
        # -1: a byte, which was always there; rank: a half that is not made yet, if at all
        a_born = made.get(a, -1 if len(a) == 1 else rank)
        b_born = made.get(b, -1 if len(b) == 1 else rank)
        plain = a_born < rank and b_born < rank
        while plain and (a_born >= 0 or b_born >= 0):
            if a_born > b_born:
                a_end = a_born
                a = halves[a][1]
                a_born = made.get(a, -1)
            else:
                b_end = b_born
                b = halves[b][0]
                b_born = made.get(b, -1)
            middle = pairs.get((a, b), rank)
            plain = middle >= a_end or middle > b_end
        if plain:
            made[token] = rank
            halves[token] = left, right
        else:
            doubtful[token] = None
    return made, [token for token in doubtful if token not in made]


def last_parts(token: str, keyed: dict[str, int]) -> list[str]:
    """Return what a token's text becomes by the merges that do not make the token itself.

    Two parts that the file lists as a pair are its last step; any other parts stay apart.
    """
    own = {key: keyed.pop(key) for k in range(1, len(token))
           if (key := token[:k] + SEP + token[k:]) in keyed}
    parts = bpe(keyed, token, SEP)
    keyed.update(own)
    return parts


# --- reading --------------------------------------------------------------------------------

KEYS = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
        "post_processor", "decoder", "model"}


def check_document(document: Any) -> None:
    """Raise ValueError for what the library does not take for a tokenizer.json either: a key that
    is misspelt would be left out without a word."""
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ValueError("expected an object with a model")
    if unknown := sorted(document.keys() - KEYS):
        raise ValueError(f"unknown key {unknown[0]!r:.40}, expected {', '.join(sorted(KEYS))}")
    lists = {"added_tokens": document.get("added_tokens", []),
             "merges": document["model"].get("merges", [])}
    if wrong := [name for name, value in lists.items() if not isinstance(value, list)]:
        raise ValueError(f"{wrong[0]} is {lists[wrong[0]]!r:.40}, expected a list")


def read(document: dict) -> dict[str, Any]:
    """Return a parsed tokenizer.json -> the arguments of Tokenizer().

    ValueError names what is not supported; KeyError, TypeError and the like mean a broken file.
    """
    model = document["model"]
    kind = model.get("type", "BPE")
    vocab = {str(t): whole_number(i) for t, i in model["vocab"].items()}
    added = number(document.get("added_tokens") or [], vocab)
    special = {name: token["id"] for name, token in added.items() if token["special"]}
    parts = {"special": special, "added": added, "post": document.get("post_processor"),
             "forms": read_normalizer(document.get("normalizer"))}
    if kind == "WordLevel":
        if any(len(t) != 1 for t in vocab if t not in added):
            raise ValueError("words are not supported, only characters")
        ids = {t.encode(): i for t, i in vocab.items() if t not in special}
        return {**parts, "ranks": {}, "pattern": "", "ids": ids}
    if kind != "BPE" or model.get("byte_fallback"):
        raise ValueError("only byte-level and SentencePiece-style BPE are supported")
    if strange := [k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
                   if model.get(k)]:
        raise ValueError(f"a BPE model with {strange[0]} is not supported")
    ranks, only_whole = rank_tokens(vocab, model["merges"], bool(model.get("ignore_merges")), added)
    if len(ranks) < 256 and not all(bytes([b]) in ranks for b in range(256)) \
            and model.get("unk_token") in vocab:
        raise ValueError("a vocabulary that lacks bytes and has an unknown token is not supported")
    pattern, splits = pre_tokenizer.read(document.get("pre_tokenizer") or {})
    # A token of the vocabulary that is no spelling of bytes, and the names of control tokens
    # (whose letters are no token), are never the end of merging: they only have ids.
    other = {t: i for t, i in vocab.items()
             if not LETTERS.issuperset(t) or t in added and unprintable(t) not in ranks}
    ids = {unprintable(t): i for t, i in vocab.items() if t not in other}
    kept = {key: document.get(key) for key in ("normalizer", "pre_tokenizer", "decoder",
                                               "truncation", "padding")}
    kept["model"] = {key: value for key, value in model.items() if key != "vocab"}
    return {**parts, "ranks": ranks, "pattern": pattern, "splits": splits, "ids": ids,
            "whole": only_whole, "other": other, "document": kept}


def whole_number(value: Any) -> int:
    """Return an id of a file; ValueError if it is none."""
    if type(value) is not int:
        raise ValueError(f"{value!r:.40} is not an id")
    return value


def read_normalizer(normalizer: dict | None) -> tuple[str, ...]:
    """Return the Unicode forms that text is brought to, one after another."""
    out = []
    for step in pre_tokenizer.flatten(normalizer or {}, "normalizer"):
        if step.get("type") not in FORMS:
            raise ValueError(f"the normalizer {step.get('type')!r:.40} is not supported in "
                             f"byte-level BPE, only {', '.join(FORMS)}")
        out.append(step["type"])
    return tuple(out)


# --- writing --------------------------------------------------------------------------------

def list_added(added: Mapping[str, dict]) -> list[dict]:
    """Return the added tokens as a file lists them, in the order of their ids."""
    return [{"id": token["id"], "content": name, **flags_of(token, token["id"])}
            for name, token in sorted(added.items(), key=lambda item: item[1]["id"])]


def write(tokenizer: Any) -> dict[str, Any]:
    """Return the document of a byte-level or character Tokenizer, from normalizer to decoder.

    What was read from a file is written back: its merges, its pre_tokenizer, its flags.
    """
    kept = tokenizer.document
    vocab = {printable(t) if tokenizer.bytewise else t.decode(): i
             for t, i in tokenizer.ids.items()}
    # added tokens stand in the vocabulary as well: the library would number them anew
    vocab.update(tokenizer.other)
    vocab.update((name, token["id"]) for name, token in tokenizer.added.items())
    forms = [{"type": form} for form in tokenizer.forms]
    parts = {"version": "1.0", "truncation": None, "padding": None,
             "added_tokens": list_added(tokenizer.added),
             "normalizer": {"type": "Sequence", "normalizers": forms} if len(forms) > 1 else
             forms[0] if forms else None}
    if kept:
        parts.update((key, kept[key]) for key in kept if key not in ("model", "normalizer"))
        model = {**kept["model"], "vocab": vocab}
        return {**parts, "post_processor": tokenizer.post, "model": model}
    cut = {"type": "Split", "pattern": {"Regex": tokenizer.pattern or r"[\s\S]"},
           "behavior": "Isolated", "invert": False}
    if not tokenizer.pattern:       # a character is a "word"; one never seen is an error there too
        return {**parts, "pre_tokenizer": cut, "post_processor": tokenizer.post,
                "decoder": {"type": "Fuse"},
                "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": vocab}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    # the two halves of a token are what the older tokens alone make of it
    halves = []
    older = {}
    for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1]):
        halves.append(bpe(older, token))
        older[token] = rank
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
             "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "byte_fallback": False,
             # a token without halves can only be a whole chunk, looked up before merging
             "ignore_merges": any(len(h) > 2 for h in halves), "vocab": vocab,
             "merges": [" ".join(map(printable, h)) for h in halves if len(h) == 2]}
    return {**parts, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
            "post_processor": tokenizer.post, "decoder": byte_level, "model": model}


def surround_text(first: dict[str, int], last: dict[str, int] | None = None) -> dict | None:
    """Return a post_processor that puts these tokens before and after a text; None for none."""
    last = last or {}

    # type_id tells the two texts of a pair apart (BERT's); no decoder looks at it
    def token(name: str, which: int) -> dict:
        return {"SpecialToken": {"id": name, "type_id": which}}

    def around(name: str, which: int) -> list[dict]:
        return [*(token(n, which) for n in first), {"Sequence": {"id": name, "type_id": which}},
                *(token(n, which) for n in last)]

    both = {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in {**first, **last}.items()}
    return both and {"type": "TemplateProcessing", "single": around("A", 0),
                     "pair": around("A", 0) + around("B", 1), "special_tokens": both} or None


def read_affixes(post: dict | None) -> tuple[list[int], list[int]]:
    """Return the ids that a post_processor puts before and after a text."""
    if post is None:
        return [], []
    kind = post.get("type")
    before: list[int] = []
    after: list[int] = []
    if kind == "Sequence":              # the last step is the outermost
        for step in post["processors"]:
            first, last = read_affixes(step)
            before = first + before
            after = after + last
    elif kind == "TemplateProcessing":
        target = before
        for item in post["single"]:
            if "Sequence" in item:
                target = after
            else:
                target += check_ids(post["special_tokens"][item["SpecialToken"]["id"]]["ids"])
        if target is before:
            raise ValueError("the post_processor has no place for the text")
    elif kind in ("BertProcessing", "RobertaProcessing"):
        before = check_ids([post["cls"][1]])
        after = check_ids([post["sep"][1]])
    elif kind != "ByteLevel":
        raise ValueError(f"the post_processor {kind!r:.40} is not supported")
    return before, after


def check_ids(ids: Any) -> list[int]:
    """Return the ids of a post_processor; ValueError for anything else."""
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"the post_processor has {ids!r:.40}, expected ids")
    return ids


if __name__ == "__main__":
    refuse_to_run()
