"""nanoGPT's own Tiny Shakespeare run, to compare with: its architecture, optimizer and settings.

    python data/prepare.py shakespeare_char
    python train.py config/nanogpt_shakespeare_char.py

cost: 10,745,088 parameters x 81,920,000 tokens -> 5,810 TFLOPs; on two CPU cores hours, on a GPU
minutes. Expect what nanoGPT's README publishes for an A100: a best val_loss of 1.47. What is
measured here is its speed on a CPU: RESULTS.md. config/shakespeare_char.py is the better recipe.
"""
out_dir = "out/nanogpt_shakespeare_char"
dataset = "shakespeare_char"
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
block_size = 256
batch_size = 64
gradient_accumulation_steps = 1

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99                        # few tokens a step: a longer memory of their squares
max_iters = 5000
lr_decay_iters = 5000
warmup_iters = 100
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False      # only when the validation loss improves: it overfits
