"""GPT-2 355M: the recipe of gpt2_small.py, wider and deeper.

    python data/prepare.py fineweb --shards=100
    torchrun --nproc_per_node=8 train.py config/gpt2_medium.py --dataset=fineweb

cost: 354,551,808 parameters x 9,999,974,400 tokens -> 24,227,020 TFLOPs.
Not measured here: at 40% of an H100's 989 TFLOP/s that is 1,021 minutes on one, 128 on eight.
Expect a lower loss than gpt2_small.py at every step; no figure of our own yet.
"""
out_dir = "out/gpt2_medium"
dataset = "stdlib"                  # so that it runs as it stands; --dataset=fineweb is meant
family = "gpt2"
n_layer = 24
n_head = 16
n_embd = 1024
block_size = 1024
batch_size = 8
gradient_accumulation_steps = 60    # 8 x 60 x 1024 = 491,520 tokens a step
checkpointing = False

learning_rate = 3e-4
min_lr = 3e-5
weight_decay = 0.1
max_iters = 20345
warmup_iters = 700
eval_interval = 500
eval_iters = 100
