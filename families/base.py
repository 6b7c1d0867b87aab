"""What a family file says: a row of flags, published shapes, and how its files spell both.

    ROWS = (like(LLAMA, "seed_oss", "SeedOssForCausalLM", fixed=dict(...), defaults=dict(...)),)

A family is a row, never a subclass of a model. Its architecture fixes some fields of ModelConfig
(`fixed`), its config.json says others (`fields`), and a model from scratch takes what the published
models share (`scratch`). formats/huggingface.py reads and writes files by these rows; the parity
test opens what is written in transformers, for every row.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Callable

from config import UserError, refuse_to_run


def set_biases(bias: bool) -> dict[str, bool]:
    """Return the flags of --bias=1: a bias in every linear; without it the family's own."""
    return dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True) if bias else {}


@dataclass(frozen=True)
class Family:
    """How a published architecture spells our settings and our parameters."""
    model_type: str                 # in config.json
    architecture: str               # transformers' class
    fixed: dict[str, Any]           # ModelConfig fields that make the family what it is
    fields: tuple[tuple[str, str], ...]         # (ModelConfig field, its key in config.json)
    defaults: dict[str, Any]        # what transformers takes where config.json is silent
    only: dict[str, tuple] = field(default_factory=dict)    # keys that change the maths in a
    #                                 way that the model has no flag for: their allowed values
    prefix: str = "model."          # files of a bare body lack it: both are read
    # module on disk -> our modules, joined along their outputs; others have the name on disk
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()            # modules stored (in, out)
    neighbours: tuple[str, ...] = ()            # rows of each head as rotary pairs (2i, 2i + 1)
    # what is no pair of one key and one field: (config.json, values) completes the values,
    # (ModelConfig, config.json) the file
    read: Callable[[dict, dict], None] = lambda hf, values: None
    write: Callable[[Any, dict], None] = lambda config, hf: None
    rope: str = "plain"             # plain, partial, nested by layer type, own: by read
    writable: bool = True           # False: read only, saved as another family that fits
    rank: int = 1                   # of rows that fit a model equally, the lowest is written;
    #                                 2: written for models that were read as this family
    null_ids: bool = True           # whether its class opens with bos_token_id null
    reads: tuple[str, ...] = ()     # keys that `read` looks at
    ignores: tuple[str, ...] = ()   # keys of the family that change no logit (config_keys.py has
    #                                 those of all families)
    nulls: dict[str, Any] = field(default_factory=dict)     # the meaning of an explicit null,
    #                                 where it is not that of a missing key
    synonyms: dict[str, str] = field(default_factory=dict)  # a second name of a key -> the key
    # --- models from scratch (--family=, --preset=)
    name: str = ""                  # of --family; "": model_type
    scratch: dict[str, Any] | None = field(default_factory=dict)    # flags beside `fixed`; None:
    #                                 no model from scratch, its files are another family's
    from_shape: Callable[[dict], dict] = lambda shape: {}   # flags that depend on the shape
    from_bias: Callable[[bool], dict] = set_biases          # flags of --bias
    presets: dict[str, dict] = field(default_factory=dict)  # published shapes: ModelConfig fields
    hub: str = ""                   # owner on the Hugging Face hub whose names --init_from takes
    # --- files other than config.json and .safetensors
    layout: str = ""                # of --layout, for files as the authors published them
    params_keys: tuple[str, ...] = ()           # of params.json beside one .pth file; (): neither
    sizes: dict[str, str] = field(default_factory=dict)     # key -> the tensor whose first
    #                                 dimension it is, where the file says -1 or nothing
    wraps: str = ""                 # model_type of a multimodal model with this text model

    @property
    def flags(self) -> dict[str, Any]:
        """ModelConfig fields of a model from scratch."""
        return {**self.fixed, **(self.scratch or {})}

    @property
    def title(self) -> str:
        """The name of --family."""
        return self.name or self.model_type

    @property
    def saved_as(self) -> str:
        """ModelConfig.saved_as of a model of this family: "" where the first that fits will do."""
        return self.model_type if self.rank > 1 else ""

    def find_stem(self, module: str) -> str:
        """Return the name on disk of one of our modules that is not joined with others."""
        return next((stem for stem, modules in self.keys.items() if modules == (module,)), module)


def like(row: Family, model_type: str, architecture: str, fixed: dict | None = None,
         fields: dict[str, str] | None = None, defaults: dict | None = None,
         scratch: dict | None = None, **rest) -> Family:
    """Return another family's row with changes.

    fixed, defaults and scratch are laid over the row's; what is fixed is no field any more, and a
    field has one key. Shapes and names of --family are not inherited.
    """
    fixed = {**row.fixed, **(fixed or {})}
    fields = fields or {}
    inherited = tuple(pair for pair in row.fields
                      if pair[0] not in fixed and pair[0] not in fields)
    flags = {k: v for k, v in (row.scratch or {}).items() if k not in fixed}
    changes = {"model_type": model_type, "architecture": architecture, "fixed": fixed,
               "fields": inherited + tuple(fields.items()),
               "defaults": {**row.defaults, **(defaults or {})},
               "scratch": {**flags, **(scratch or {})},
               "rank": 1, "name": "", "presets": {}, "hub": "", "layout": "", "wraps": ""}
    return replace(row, **{**changes, **rest})


L = "model.layers.{i}."
NO_BIAS = dict(qkv_bias=False, o_bias=False, mlp_bias=False)
LARGEST_DEPTH = 10 ** 4     # of layers that a list is made for before the weights are looked at
# None as a default: the key has to be there
NEEDED = {"vocab_size": None, "hidden_size": None, "num_hidden_layers": None,
          "num_attention_heads": None, "intermediate_size": None}
MOE = {"num_experts_per_tok": "num_experts_per_tok",
       "moe_intermediate_size": "moe_intermediate_size"}


def no_windows(hf: dict, values: dict) -> None:
    """Refuse windows in a family whose layers all see everything: transformers ignores them."""
    if set(hf.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(f"layer_types with windows are not supported in a {hf['model_type']} model")


LLAMA = Family(
    "llama", "LlamaForCausalLM",
    fixed=dict(position="rope", norm="rmsnorm", gated=True),
    fields=(("vocab_size", "vocab_size"), ("block_size", "max_position_embeddings"),
            ("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads"),
            ("n_kv_head", "num_key_value_heads"), ("n_embd", "hidden_size"),
            ("head_dim", "head_dim"), ("intermediate_size", "intermediate_size"),
            ("norm_eps", "rms_norm_eps"), ("activation", "hidden_act"),
            ("qkv_bias", "attention_bias"), ("o_bias", "attention_bias"),
            ("mlp_bias", "mlp_bias"), ("tie_word_embeddings", "tie_word_embeddings"),
            ("init_std", "initializer_range"), ("dropout", "attention_dropout")),
    defaults=dict(NEEDED, max_position_embeddings=2048, num_key_value_heads=0, head_dim=0,
                  rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False, mlp_bias=False,
                  tie_word_embeddings=False, initializer_range=0.02),
    read=no_windows, reads=("layer_types",), nulls={"num_key_value_heads": 0}, rank=0,
    scratch=dict(activation="silu", tie_word_embeddings=False))


def windowed(everywhere: int | None) -> dict[str, Any]:
    """Return read and write of `sliding_window`, of all layers alike.

    everywhere: the window where the file does not say one.

    Subtle: null in the file means no window, silence means transformers' default. There is no
    switch: transformers knows use_sliding_window in Qwen's families and in SmolLM3 alone.
    """
    def read(hf: dict, values: dict) -> None:
        values["sliding_window"] = read_window(hf, everywhere)
        kind = "sliding_attention" if values["sliding_window"] else "full_attention"
        if set(hf.get("layer_types") or ()) - {kind}:
            raise UserError("layer_types that differ are not supported in a "
                            f"{hf['model_type']} model")

    def write(config: Any, hf: dict) -> None:
        hf["sliding_window"] = config.sliding_window or None

    return {"read": read, "write": write, "reads": ("sliding_window", "layer_types"),
            "ignores": ("use_sliding_window", "max_window_layers")}


def read_window(hf: dict, silent: int | None) -> int:
    """Return sliding_window, 0 for null; `silent` where it is not said."""
    window = hf.get("sliding_window", silent)
    if window == 0:
        raise UserError("sliding_window = 0 hides every key: expected a number above 0, or null")
    return window or 0


def by_layer(default: Callable[[int, dict], bool], asks: bool,
             window: int | None = 4096) -> dict[str, Any]:
    """Return read and write of `layer_types`.

    default(layer, config.json): which layers have the window where the file does not say.
    asks: none has it unless use_sliding_window says so. window: where the file does not say.
    """
    def read(hf: dict, values: dict) -> None:
        if asks and not hf.get("use_sliding_window"):
            no_windows(hf, values)      # transformers ends there without an explanation
            return
        values["sliding_window"] = read_window(hf, window)
        if hf.get("layer_types") is not None:
            values["layer_types"] = hf["layer_types"]
        elif values["sliding_window"] and type(values["n_layer"]) is int:
            values["layer_types"] = [
                "sliding_attention" if default(i, hf) else "full_attention"
                for i in range(min(values["n_layer"], LARGEST_DEPTH))]

    def write(config: Any, hf: dict) -> None:
        hf["layer_types"] = config.layer_types or ["full_attention"] * config.n_layer
        slide = "sliding_attention" in hf["layer_types"]
        if asks:
            hf["use_sliding_window"] = slide
        # Gemma's classes do not open with null, even where no layer has a window
        hf["sliding_window"] = config.sliding_window or (None if asks else 4096)

    return {"read": read, "write": write, "reads": (
        "sliding_window", "layer_types", *("use_sliding_window", "max_window_layers") * asks)}


def read_dense_layers(hf: dict, values: dict) -> None:
    """Read mlp_layer_types: which layers have an ordinary MLP; by default the first."""
    types = hf.get("mlp_layer_types")
    if types is None:
        types = ["dense"]
    elif not isinstance(types, list) or set(types) - {"dense", "sparse"} or (
            len(types) != values["n_layer"]):
        raise UserError("expected dense or sparse for each layer in mlp_layer_types")
    values["mlp_only_layers"] = [i for i, kind in enumerate(types) if kind == "dense"] or None


def write_dense_layers(config: Any, hf: dict) -> None:
    """Write mlp_layer_types."""
    hf["mlp_layer_types"] = ["sparse" if config.is_moe(i) else "dense"
                             for i in range(config.n_layer)]


def needs_experts(hf: dict, values: dict) -> None:
    """Refuse an MoE model without experts."""
    # 0 experts would be an ordinary MLP, whose tensors have other names
    if not values["num_experts"]:
        raise UserError("expected experts in an MoE model, got none")


def run_all(*steps: Callable) -> Callable:
    """Return a function that calls all of `steps` in order."""
    return lambda *arguments: [step(*arguments) for step in steps] and None


def make_size(layers: int, heads: int, kv_heads: int, width: int, mlp: int = 0, **more) -> dict:
    """Return a published shape as ModelConfig fields."""
    return dict(n_layer=layers, n_head=heads, n_kv_head=kv_heads, n_embd=width,
                intermediate_size=mlp, **more)


if __name__ == "__main__":
    refuse_to_run()
