"""Qwen3-MoE in small: every MLP is eight experts, of which each token takes two.

    python data/prepare.py && python train.py config/qwen3_moe.py
    python sample.py --out_dir=out/qwen3_moe

cost: 10,825,536 parameters x 614,400 tokens -> 23 TFLOPs. Each token meets 5,517,120 of them.
Expect: the loss and minutes in RESULTS.md, "one of each family"; flags: presets.py, 'qwen3_moe'.
"""
out_dir = "out/qwen3_moe"
dataset = "stdlib"
family = "qwen3_moe"
n_layer = 6
n_head = 6
n_kv_head = 2
n_embd = 192
head_dim = 32
rope_theta = 10000.0
tie_word_embeddings = True
num_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 256         # two of them are as wide as the MLP of config/qwen3.py
router_aux_loss_coef = 0.02         # evens the load out; watch load_max in log.jsonl
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1

optimizer = "muon"
learning_rate = 3e-3                # of AdamW: embeddings and norms
muon_learning_rate = 0.02
weight_decay = 0.0
warmup_iters = 10
schedule = "linear"
min_lr = 0.0
max_iters = 300
eval_interval = 100
eval_iters = 20
log_interval = 10
