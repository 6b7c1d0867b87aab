"""The demo's chat model learns which answers are preferred: DPO of out/sft on skills' pairs.

    python sft.py config/sft_skills.py                          # the chat model, once
    python dpo.py config/dpo_skills.py
    python dpo.py --init_from=resume --out_dir=out/dpo --eval_only=1

cost: the pairs once, of whose rows and tokens dpo.py prints how many there are, and one forward
over them for the reference. Minutes and accuracy: RESULTS.md, "End-to-end pipeline".
"""
init_from = "out/sft"
dataset = "skills"
out_dir = "out/dpo"
epochs = 1.0
batch_size = 8
gradient_accumulation_steps = 1

loss = "sigmoid"
beta = 0.1
sft_weight = 3.0                # without it exact match falls from 97.4% to 94.7%
learning_rate = 1.5e-4
schedule = "linear"
min_lr = 0.0

eval_interval = 100
eval_iters = 50
log_interval = 20
