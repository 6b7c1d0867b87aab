"""MiniCPM in small: scaled embedding, branches and logits, trained with its WSD schedule.

    python data/prepare.py && python train.py config/minicpm.py
    python sample.py --out_dir=out/minicpm

cost: 5,802,432 parameters x 614,400 tokens -> 24 TFLOPs.
Expect: the loss and minutes in RESULTS.md, "one of each family"; flags: presets.py, 'minicpm'.
"""
out_dir = "out/minicpm"
dataset = "stdlib"
family = "minicpm"
n_layer = 6
n_head = 6
n_embd = 192
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1

optimizer = "adamw"
learning_rate = 3e-3                # the scales keep it right for wider models too
weight_decay = 0.1
warmup_iters = 10
schedule = "wsd"                    # warm up, stay, and decay over the last tenth only
wsd_decay = 0.1
min_lr = 0.0
max_iters = 300
eval_interval = 100
eval_iters = 20
log_interval = 10
