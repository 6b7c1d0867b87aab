"""GPT-2 124M, nanoGPT's recipe: half a million tokens a step, 10 billion in all.

    python data/prepare.py                                      # try it on what is here, or
    python data/prepare.py fineweb --shards=100                 # 10 billion tokens, 20 GB
    torchrun --nproc_per_node=8 train.py config/gpt2_small.py --dataset=fineweb

cost: 124,337,664 parameters x 9,999,974,400 tokens -> 8,544,362 TFLOPs.
Not measured here: at 40% of an H100's 989 TFLOP/s that is 360 minutes on one, 45 on eight.
Expect on fineweb a val_loss of about 3.28: llm.c's published figure, not a run of ours.
The default dataset is the standard library, so that the command runs as it stands everywhere; it
has 2.5 million tokens, so a run on it is a test of the machine: add --max_iters=100.
"""
out_dir = "out/gpt2_small"
dataset = "stdlib"
family = "gpt2"
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
batch_size = 12
gradient_accumulation_steps = 40    # 12 x 40 x 1024 = 491,520 tokens a step over all ranks

learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1
max_iters = 20345
warmup_iters = 700
eval_interval = 500
eval_iters = 150
