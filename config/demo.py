"""The demo: a small Qwen3-shaped model on the Python standard library, on whatever is at hand.

    python data/prepare.py && python train.py config/demo.py && python sample.py --out_dir=out/demo

cost: 11,602,688 parameters x 1,024,000 tokens -> 49 TFLOPs; minutes: see RESULTS.md, "the demo".
Expect: samples with the shape of Python (indentation, def, docstrings) and little sense.
"""
out_dir = "out/demo"
dataset = "stdlib"
family = "qwen3"
n_layer = 4
n_head = 4
n_embd = 256
rope_theta = 10000.0
tie_word_embeddings = False
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1

optimizer = "muon"
learning_rate = 3e-3
muon_learning_rate = 0.02
beta2 = 0.95
weight_decay = 0.0
max_iters = 500
warmup_iters = 10
schedule = "linear"
min_lr = 0.0

eval_interval = 250
eval_iters = 40
log_interval = 10
