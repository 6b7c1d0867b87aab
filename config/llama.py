"""Llama 3 in small: RoPE, RMSNorm, SwiGLU, grouped queries, an output matrix of its own.

    python data/prepare.py && python train.py config/llama.py
    python sample.py --out_dir=out/llama

cost: 8,653,248 parameters x 614,400 tokens -> 22 TFLOPs.
Expect: the loss and minutes in RESULTS.md, "one of each family"; flags: presets.py, 'llama'.
"""
out_dir = "out/llama"
dataset = "stdlib"
family = "llama"
n_layer = 6
n_head = 6
n_kv_head = 2                       # three queries share a key and a value
n_embd = 192
rope_theta = 10000.0
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
