"""python -m tests.benchmarks.plain_kd TEACHER STUDENT TOKENS.npy STEPS [--threads N]: a bare distillation.

Hugging Face models, torch's own AdamW, and the loss written as people write it: what a training loop costs that has
nothing around it. The batch, precision, clipping and learning rate are the demo's. Prints seconds a step.
"""

from __future__ import annotations

import argparse
import json
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("tokens", help="a .npy file of token ids, one long row")
    parser.add_argument("steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)
    args = parser.parse_args()
    import numpy as np
    import torch
    from torch.nn.functional import kl_div, log_softmax
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("medium")
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="sdpa")
        for folder in (args.teacher, args.student)
    )
    teacher.eval()
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rows = torch.from_numpy(np.load(args.tokens).astype(np.int64)).view(-1, args.batch, args.seq_length)
    for step in range(args.steps):
        started = time.perf_counter()
        ids = rows[step]
        with torch.no_grad():
            teacher_log_probs = log_softmax(teacher(ids, use_cache=False).logits.float(), -1)
        student_log_probs = log_softmax(student(ids, use_cache=False).logits.float(), -1)
        loss = kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        line = {"step": step + 1, "loss": loss.item(), "seconds": time.perf_counter() - started}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
