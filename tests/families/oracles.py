"""What the tests of this subject share: fixtures and oracles.
"""

import pytest
import torch
import transformers as T


T.logging.set_verbosity_error()
T.logging.disable_progress_bar()

V, BLOCK = 96, 64
BASE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=BLOCK,
            attention_dropout=0.0, bos_token_id=0, eos_token_id=1, pad_token_id=None)
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=24)
DEEP = {"num_hidden_layers": 7}         # Gemma 3's first layer without a window is the sixth
GLM45 = dict(MOE, head_dim=16, n_routed_experts=4, routed_scaling_factor=1.5)


def rope(kind="default", theta=10000.0, **settings):
    return {"rope_parameters": dict(rope_type=kind, rope_theta=theta, **settings)}


def yarn(**settings):
    return rope("yarn", factor=4.0, original_max_position_embeddings=16, **settings)


# name -> (transformers' class, its settings beside BASE, the model_type that we save it as)
VARIANTS = {
    "gpt2": ("GPT2", {}, "gpt2"),
    "llama": ("Llama", dict(rms_norm_eps=1e-3), "llama"),
    "llama tied": ("Llama", dict(tie_word_embeddings=True), "llama"),
    "llama biases, wide heads": ("Llama", dict(attention_bias=True, mlp_bias=True, head_dim=16),
                                 "llama"),
    "llama linear": ("Llama", rope("linear", factor=4.0), "llama"),
    "llama 3.1": ("Llama", rope("llama3", 5e5, factor=8.0, low_freq_factor=1.0,
                                high_freq_factor=4.0, original_max_position_embeddings=16),
                  "llama"),
    "llama yarn": ("Llama", yarn(), "llama"),
    "llama yarn mscale": ("Llama", yarn(mscale=0.7, mscale_all_dim=1.2, beta_fast=16.0,
                                        beta_slow=2.0), "llama"),
    "llama yarn exact": ("Llama", yarn(truncate=False, attention_factor=1.3), "llama"),
    "mistral": ("Mistral", dict(sliding_window=None), "llama"),
    "mistral window": ("Mistral", dict(sliding_window=5), "mistral"),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2), "mixtral"),
    "mixtral window": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=3,
                                       sliding_window=5), "mixtral"),
    "qwen2": ("Qwen2", {}, "qwen2"),
    "qwen2 windows": ("Qwen2", dict(use_sliding_window=True, sliding_window=5,
                                    max_window_layers=1), "qwen2"),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True), "qwen3"),
    "qwen3 biases, yarn": ("Qwen3", dict(head_dim=16, attention_bias=True, **yarn()), "qwen3"),
    "qwen3 windows": ("Qwen3", dict(use_sliding_window=True, sliding_window=5,
                                    max_window_layers=2), "qwen3"),
    "qwen3_moe": ("Qwen3Moe", dict(MOE, head_dim=16, num_experts=4), "qwen3_moe"),
    "qwen3_moe norm": ("Qwen3Moe", dict(MOE, head_dim=16, num_experts=4, norm_topk_prob=True),
                       "qwen3_moe"),
    "qwen3_moe window": ("Qwen3Moe", dict(MOE, head_dim=16, num_experts=4, sliding_window=5,
                                          use_sliding_window=True), "qwen3_moe"),
    "gemma2": ("Gemma2", dict(head_dim=16, sliding_window=5, query_pre_attn_scalar=24), "gemma2"),
    "gemma3": ("Gemma3Text", dict(DEEP, head_dim=16, sliding_window=5, query_pre_attn_scalar=24),
               "gemma3_text"),
    "gemma3 linear": ("Gemma3Text", dict(DEEP, head_dim=16, sliding_window=5, rope_parameters={
        "full_attention": rope("linear", 1e6, factor=8.0)["rope_parameters"],
        "sliding_attention": rope()["rope_parameters"]}), "gemma3_text"),
    "glm": ("Glm", dict(head_dim=16), "glm"),
    "glm without biases": ("Glm", dict(head_dim=16, attention_bias=False), "glm"),
    "glm4": ("Glm4", dict(head_dim=16), "glm4"),
    "glm4_moe": ("Glm4Moe", dict(GLM45, n_shared_experts=1, first_k_dense_replace=1), "glm4_moe"),
    "glm4_moe all flags": ("Glm4Moe", dict(GLM45, n_shared_experts=2, first_k_dense_replace=2,
                                           use_qk_norm=True, attention_bias=True), "glm4_moe"),
    "glm4_moe all experts": ("Glm4Moe", dict(GLM45, n_shared_experts=1, first_k_dense_replace=0,
                                             norm_topk_prob=False), "glm4_moe"),
    "olmo2": ("Olmo2", dict(attention_bias=True), "olmo2"),
    "cohere": ("Cohere", dict(logit_scale=0.2), "cohere"),
    "smollm3": ("SmolLM3", dict(num_hidden_layers=5), "smollm3"),
    "granite": ("Granite", dict(embedding_multiplier=12.0, residual_multiplier=0.3,
                                attention_multiplier=0.2, logits_scaling=3.0), "granite"),
    "arcee": ("Arcee", {}, "arcee"),
    # --- added as files alone: the flags were there
    "gemma": ("Gemma", dict(head_dim=8), "gemma"),
    "phi3": ("Phi3", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                               partial_rotary_factor=0.5)), "phi3"),
    "phi3 window": ("Phi3", dict(sliding_window=7), "phi3"),
    "seed_oss": ("SeedOss", dict(head_dim=8), "seed_oss"),
    "helium": ("Helium", dict(head_dim=8), "helium"),
    "ernie4_5": ("Ernie4_5", dict(head_dim=16), "ernie4_5"),
    "ernie4_5 biases": ("Ernie4_5", dict(head_dim=16, use_bias=True), "ernie4_5"),
    "cwm": ("Cwm", dict(head_dim=16, sliding_window=7), "cwm"),
    "ministral": ("Ministral", dict(head_dim=16, sliding_window=7, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention"]), "ministral"),
    "starcoder2": ("Starcoder2", dict(sliding_window=7), "starcoder2"),
    "stablelm": ("StableLm", dict(use_qkv_bias=True), "stablelm"),
    "stablelm parallel": ("StableLm", dict(use_parallel_residual=True), "stablelm"),
    "jais2": ("Jais2", dict(head_dim=16), "jais2"),
    "internlm3": ("InternLM3", dict(head_dim=16, attention_bias=True, mlp_bias=True), "internlm3"),
    "iquestcoder": ("IQuestCoder", dict(head_dim=16), "iquestcoder"),
    "olmo3": ("Olmo3", dict(sliding_window=7, num_hidden_layers=4), "olmo3"),
    "olmoe": ("Olmoe", dict(num_experts=4, num_experts_per_tok=2), "olmoe"),
    "cohere2": ("Cohere2", dict(sliding_window=7, num_hidden_layers=4), "cohere2"),
    "exaone4": ("Exaone4", dict(sliding_window=7, num_hidden_layers=4), "exaone4"),
    "exaone4 full": ("Exaone4", dict(sliding_window=None, layer_types=["full_attention"] * 3),
                     "exaone4"),
    "vaultgemma": ("VaultGemma", dict(head_dim=16, sliding_window=7, query_pre_attn_scalar=24),
                   "vaultgemma"),
    "hyperclovax": ("HyperCLOVAX", dict(head_dim=16, residual_multiplier=0.5, logits_scaling=2.0,
                                        embedding_multiplier=3.0), "hyperclovax"),
    "dots1": ("Dots1", dict(MOE, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1,
                            routed_scaling_factor=1.5, sliding_window=7, max_window_layers=1),
              "dots1"),
    "solar_open": ("SolarOpen", dict(MOE, head_dim=16, n_routed_experts=4), "solar_open"),
    "minimax_m2": ("MiniMaxM2", dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2,
                                     rotary_dim=8), "minimax_m2"),
    "hy_v3": ("HYV3", dict(MOE, head_dim=16, num_experts=4), "hy_v3"),
    "qwen3_moe dense layers": ("Qwen3Moe", dict(MOE, num_experts=4, mlp_only_layers=[2],
                                                decoder_sparse_step=1), "qwen3_moe"),
    "qwen3_moe every second": ("Qwen3Moe", dict(MOE, num_experts=4, decoder_sparse_step=2),
                               "qwen3_moe"),
}


def scramble(model, seed=0):
    """All weights random, and large enough that attention is far from uniform."""
    g = torch.Generator().manual_seed(seed)
    corrections = [(n, b) for n, b in model.named_buffers() if n.endswith("correction_bias")]
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *corrections]:
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 + (1.0 if "norm" in name else 0.0))
    return model.eval()


def some_ids(rows=2, length=30, seed=1):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def error(a, b) -> float:
    """Relative L2."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def build(variant):
    family, settings, _ = VARIANTS[variant] if isinstance(variant, str) else variant
    kind = getattr(T, f"{family}Config")
    shape = {**BASE, **settings}
    if family == "GPT2":
        shape = dict(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=BLOCK)
    return scramble(T.AutoModelForCausalLM.from_config(kind(**shape), attn_implementation="eager"))


class Oracle:
    """transformers' model of a variant, its directory, and what it computes."""

    def __init__(self, name, directory):
        self.model, self.path, self.ids = build(name), directory, some_ids()
        self.model.save_pretrained(directory)
        with torch.no_grad():
            self.logits = self.model(self.ids).logits


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    made = {}

    def get(name) -> Oracle:
        if name not in made:
            made[name] = Oracle(name, tmp_path_factory.mktemp("oracle") / "m")
        return made[name]
    return get


def opened(path, **settings):
    """transformers' model of a directory; nothing of it may be missing, left over or random."""
    model, info = T.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager", **settings)
    assert not any(info.values()), info
    return model.eval()


def shape(model_type, layers, heads, kv_heads, width, mlp, vocab, context, **more):
    """The keys that nearly all published files share."""
    return dict(model_type=model_type, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, hidden_size=width, intermediate_size=mlp,
                vocab_size=vocab, max_position_embeddings=context, hidden_act="silu",
                initializer_range=0.02, attention_dropout=0.0, use_cache=True, bos_token_id=1,
                eos_token_id=[2, 3], torch_dtype="bfloat16", transformers_version="4.43.1",
                auto_map={"AutoModel": "modeling.Model"}, **more)
