"""Tiny Shakespeare, character by character: nanoGPT's first example, sized for two CPU cores.

    python data/prepare.py shakespeare_char
    python train.py config/shakespeare_char.py
    python sample.py --out_dir=out/shakespeare_char

cost: 1,796,672 parameters x 1,228,800 tokens -> 16 TFLOPs; minutes: see RESULTS.md.
Expect: val_loss about 1.55 nats a character in less time than nanoGPT's CPU command, which ends at
1.89, takes on the same machine. On a GPU ask for more: --max_iters=2000 --dropout=0.2
"""
out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
family = "qwen3"                    # RoPE, RMSNorm, SwiGLU, normalised queries and keys
n_layer = 4
n_head = 3
n_embd = 192
rope_theta = 10000.0                # Qwen3's own base is for contexts of 40,960
tie_word_embeddings = False
block_size = 256
batch_size = 8                      # many small steps suit Muon better than few large ones
gradient_accumulation_steps = 1

optimizer = "muon"
learning_rate = 2e-3
muon_learning_rate = 0.015
beta2 = 0.99                        # few tokens a step: a longer memory of their squares
weight_decay = 0.0
max_iters = 600
warmup_iters = 10
schedule = "linear"
min_lr = 0.0

eval_interval = 600
eval_iters = 1000                   # all of the validation split
log_interval = 10
