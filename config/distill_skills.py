"""The demo's chat model taught to a student of a quarter of its size, on whatever is at hand.

    python data/prepare.py skills && python sft.py config/sft_skills.py     # the teacher, once
    python distill.py config/distill_skills.py
    python distill.py config/distill_skills.py --alpha=1 --hidden=0 --hidden_layers=0 \\
        --out_dir=out/student                       # the same student without a teacher
    python sample.py --out_dir=out/distill --chat

cost: a step reads its rows twice, the second time with the teacher, forward only; both meet the
vocabulary with the answers alone. Minutes and accuracy: RESULTS.md, "End-to-end pipeline".
"""
dataset = "skills"              # the teacher: out/dpo, or out/sft where it is not
out_dir = "out/distill"
epochs = 1.25
batch_size = 8
gradient_accumulation_steps = 1

init_from = "scratch"           # less than a third of the demo
family = "qwen3"
n_layer = 4
n_head = 4
n_embd = 128
rope_theta = 10000.0
tie_word_embeddings = True

alpha = 0.5
temperature = 1.5
divergence = "forward"
hidden = 8.0                    # matched hidden states help far more than its distribution
hidden_layers = 2

optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 3e-3
schedule = "linear"
min_lr = 0.0

eval_interval = 500
eval_iters = 50
log_interval = 50
