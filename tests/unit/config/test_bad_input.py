"""What a user can get wrong, and what is said of it: the key, the value, and the value to set instead."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from prune_distill.config.load import compose
from prune_distill.config.wording import override
from prune_distill.errors import ConfigError

QWEN = ["experiment=qwen3_8b_to_6b_width"]
DEMO = ["experiment=demo", "prune.ffn_hidden_size=null"]
# A small mixture, its layers alone pruned.
MOE = [
    *(*DEMO, "model.family=qwen3_moe", "model.shape.num_moe_experts=4", "model.shape.moe_ffn_hidden_size=128"),
    "model.shape.moe_router_topk=2",
]
TWO_RANKS = ["cluster.devices_per_node=2", "distill.micro_batch_size=2"]
EP_OF_2 = [*TWO_RANKS, "distill.parallel.expert_model_parallel_size=2"]
LOCAL = ["model=local", "name=x", "cluster=one_node", "prune.num_layers=2", "data=jsonl", "data.train=[a.jsonl]"]
CORRECTION = [
    *("distill.correct_teacher.max_steps=9", "distill.correct_teacher.seq_length=64"),
    *("distill.correct_teacher.global_batch_size=4", "distill.correct_teacher.min_lr=1e-5"),
]

# Overrides, and the parts of the one fault that they give.
CASES: list[tuple[list[str], list[str]]] = [
    # What there is no such thing of.
    ([], ["no experiment is chosen", "experiment=NAME", "demo", "qwen3_8b_to_6b_depth", "model=NAME"]),
    (["experiment=dmo"], ["experiment=dmo does not exist (did you mean demo?)", "there are demo, llama3_1_8b"]),
    ([*DEMO, "model=qwen3"], ["model=qwen3 does not exist", "qwen3_8b"]),
    ([*DEMO, "cluster=7"], ["cluster=7 does not exist", "local, one_gpu_24gb, one_node"]),
    ([*DEMO, "distill.lrr=1"], ["distill.lrr is not a known key (did you mean distill.lr?)"]),
    (
        [*DEMO, "lr=1"],
        ["lr is not a known key (did you mean model.demo.training.lr or distill.lr or "],
    ),
    ([*DEMO, "distil.lr=1"], ["distil is not a known key (did you mean distill?)"]),
    ([*DEMO, "distill.zzz=1"], ["distill.zzz is not a known key; distill has max_steps, seq_length"]),
    ([*DEMO, "+distill.new=1"], ["distill.new is not a known key"]),
    # Values of the wrong type, and missing ones.
    ([*DEMO, "distill.lr=fast"], ["distill.lr='fast' is not a number; set distill.lr to a number"]),
    ([*DEMO, "distill.lr=nan"], ["distill.lr=nan is not a number"]),
    ([*DEMO, "distill.max_steps=10.0"], ["distill.max_steps=10.0 is not a whole number; set distill.max_steps to 10"]),
    ([*DEMO, "distill.max_steps=1.5"], ["distill.max_steps=1.5 is not a whole number", "to a whole number"]),
    # Numbers that are too large, and changes and ranges written as people say them.
    ([*DEMO, "seed=4294967296"], ["seed=4294967296 is too large; set seed to at most 4294967295"]),
    ([*DEMO, "cluster.devices_per_node=1e6"], ["devices_per_node=1000000.0 is too large", "to at most 1024"]),
    ([*DEMO, "distill.max_steps=1e22"], ["distill.max_steps=1e+22 is too large", "to at most 2147483647"]),
    ([*DEMO, "data.shard_bytes=1e22"], ["data.shard_bytes=1e+22 is too large", "to at most 9223372036854775807"]),
    ([*DEMO, "prune.num_layers=36->24"], ["set prune.num_layers to 24"]),
    ([*DEMO, "prune.num_layers=36→24"], ["set prune.num_layers to 24"]),
    ([*DEMO, "prune.num_layers=36-"], ["set prune.num_layers to the new value alone (a shell reads '>'"]),
    ([*DEMO, "prune.num_layers=null", "prune.drop_layers=20-24"], ["set prune.drop_layers=[20,21,22,23,24]"]),
    ([*DEMO, "prune.num_layers=null", "prune.drop_layers=3"], ["set prune.drop_layers=[3]"]),
    ([*DEMO, "distill.skip_steps=5"], ["set distill.skip_steps=[[5,5]]"]),
    ([*DEMO, "distill.skip_steps=[5,9]"], ["set distill.skip_steps=[[5,9]]"]),
    ([*DEMO, "distill.skip_steps=5-9"], ["set distill.skip_steps=[[5,9]]"]),
    ([*DEMO, "data.train=a b.jsonl"], ["""set 'data.train=["a b.jsonl"]'"""]),
    ([*DEMO, f"name={'x' * 256}"], ["run_dir holds the name xxxxxxxxxxxxxxxxxxxx...", "255 bytes", "set run_dir"]),
    ([*DEMO, "run_dir='-x'"], ["run_dir=-x would be read as an option", "set run_dir=./-x"]),
    ([*DEMO, "seed=true"], ["seed=True is not a whole number"]),
    ([*DEMO, "distill.overlap_grad_reduce=1"], ["distill.overlap_grad_reduce=1 is not true or false"]),
    ([*DEMO, "distill.precision=fp16"], ["precision=fp16 is not known (did you mean bf16?)", "set", "bf16 or fp32"]),
    ([*DEMO, "distill.recompute=some"], ["distill.recompute=some", "none or selective or full"]),
    ([*DEMO, "data.train=a.jsonl"], ["data.train='a.jsonl' is not a list; set data.train=[a.jsonl]"]),
    ([*DEMO, "prune.drop_layers=[1,x]", "prune.num_layers=null"], ["prune.drop_layers[1]='x' is not a whole number"]),
    ([*DEMO, "distill.parallel=2"], ["distill.parallel=2 is a value", "distill.parallel.KEY=VALUE"]),
    ([*DEMO, "distill.max_steps=null"], ["distill.max_steps is null; set distill.max_steps to a whole number"]),
    ([*DEMO, "distill.max_steps=???"], ["distill.max_steps is not set; set distill.max_steps to a whole number"]),
    ([*DEMO, "~distill.lr"], ["distill.lr is not set; set distill.lr to a number"]),
    ([*DEMO, "name=???"], ["name is not set; set name to some text"]),
    ([*DEMO, "run_dir=${oc.env:NO_SUCH_VARIABLE}"], ["run_dir", "NO_SUCH_VARIABLE", "set run_dir to a plain value"]),
    # The teacher's signal, and its correction.
    ([*DEMO, "distill.signal=both"], ["distill.signal=both is not known", "live or stored"]),
    ([*DEMO, "distill.signal_top_k=0"], ["distill.signal_top_k=0 must be above 0"]),
    (
        [*DEMO, "distill.signal=stored", "distill.signal_top_k=1024"],
        ["distill.signal_top_k=1024 leaves nothing of the vocabulary of 1024", "at most 1023"],
    ),
    (
        [*DEMO, "distill.signal=stored", "distill.loss=ce", "distill.controls=[]"],
        ["distill.signal=stored", "distill.loss=ce does not read", "set distill.signal=live"],
    ),
    (
        [*DEMO, "distill.signal=stored", "distill.kd.divergence=reverse_kl"],
        [
            "distill.kd.divergence asks for what distill.signal=stored does not keep",
            "set distill.kd.divergence=forward",
        ],
    ),
    (
        [*DEMO, "distill.signal=stored", "distill.phases=[{max_steps: 100}, {max_steps: 60}]"],
        ["distill.phases takes sequences of which distill.signal=stored keeps no signal", "set distill.phases=null"],
    ),
    ([*DEMO, "distill.signal=stored", "distill.skip_steps=[[3,4]]"], ["set distill.skip_steps=[], or distill.signal"]),
    ([*DEMO, "distill.signal=stored", "distill.kd.top_k=8"], ["set distill.kd.top_k=null", "distill.signal_top_k=64"]),
    (
        [*DEMO, "distill.signal=stored", "distill.kd.intermediate_pairs=[{student: 1, teacher: 1}]"],
        ["set distill.kd.intermediate_pairs=[], or distill.signal=live"],
    ),
    (
        [*DEMO, "distill.signal=stored", "distill.kd.implementation=upstream"],
        ["set distill.kd.implementation=chunked, or distill.signal=live"],
    ),
    ([*DEMO, "distill.correct_teacher.lr=0", *CORRECTION], ["distill.correct_teacher.lr=0.0 must be above 0"]),
    (
        [*DEMO, *CORRECTION, "distill.correct_teacher.lr=1e-4", "distill.correct_teacher.micro_batch_size=3"],
        ["distill.correct_teacher.global_batch_size=4 is not divisible by 3"],
    ),
    (
        [*DEMO, *CORRECTION, "distill.correct_teacher.lr=1e-4", "distill.loss=ce", "distill.controls=[]"],
        ["distill.correct_teacher trains a teacher that distill.loss=ce does not need"],
    ),
    (
        [*DEMO, "distill.swap_teacher_at_step=10"],
        ["distill.swap_teacher_at_step=10 brings in a corrected teacher", "distill.correct_teacher=null makes none"],
    ),
    (
        [*DEMO, *CORRECTION, "distill.correct_teacher.lr=1e-4", "distill.swap_teacher_at_step=160"],
        ["distill.swap_teacher_at_step=160 is not below distill.max_steps=160", "to at most 159"],
    ),
    (
        [
            *(*DEMO, *CORRECTION, "distill.correct_teacher.lr=1e-4"),
            *("distill.swap_teacher_at_step=10", "distill.signal=stored"),
        ],
        ["distill.swap_teacher_at_step=10 changes a teacher that runs", "distill.signal=stored runs none"],
    ),
    # Mixtures of experts.
    ([*DEMO, "model.family=qwen3_moe"], ["qwen3_moe is a mixture of experts", "model.shape.num_moe_experts"]),
    ([*DEMO, "model.shape.num_moe_experts=4"], ["num_moe_experts=4 describes experts", "model.family=qwen3 has not"]),
    ([*MOE, "model.shape.moe_router_topk=5"], ["moe_router_topk=5 experts a token", "set it to at most 4"]),
    ([*DEMO, "prune.num_moe_experts=2"], ["prune.num_moe_experts=2 prunes experts", "prune.num_moe_experts=null"]),
    ([*MOE, "prune.num_moe_experts=1"], ["less than the 2 that a token goes through", "to at least 2"]),
    ([*MOE, "prune.num_moe_experts=5"], ["prune.num_moe_experts=5 is larger than the teacher's 4"]),
    ([*MOE, "prune.moe_ffn_hidden_size=100"], ["not a multiple of 64", "set prune.moe_ffn_hidden_size to 64 or 128"]),
    ([*MOE, "prune.ffn_hidden_size=640"], ["a mixture of experts has not", "prune.moe_ffn_hidden_size"]),
    (
        [*MOE, "prune.num_layers=null", "prune.budget.params_share=0.8"],
        ["prune.budget cannot search", "set prune.budget=null"],
    ),
    (
        [
            *(*MOE, "prune.num_layers=null", "prune.drop_layers=[2]", "prune.tensor_model_parallel_size=2"),
            *TWO_RANKS,
        ],
        ["prune.tensor_model_parallel_size=2 does not go with experts"],
    ),
    ([*DEMO, *EP_OF_2], ["expert_model_parallel_size=2 shares out experts, but the model has none"]),
    (
        [*MOE, *EP_OF_2, "prune.num_moe_experts=3"],
        ["does not divide the teacher's 4 and the student's 3 experts", "expert_model_parallel_size to 1"],
    ),
    (
        [*MOE, "distill.parallel.expert_model_parallel_size=2"],
        ["expert_model_parallel_size=2 does not divide the 1 ranks of a pipeline stage", "to 1"],
    ),
    (
        [
            *(*MOE, *EP_OF_2, "distill.parallel.tensor_model_parallel_size=2"),
            "distill.parallel.sequence_parallel=false",
        ],
        ["distill.parallel.sequence_parallel=False does not go with tensor parallelism where there are experts"],
    ),
    # What Hydra itself refuses.
    ([*DEMO, "distill.lr=[1"], ["'distill.lr=[1' cannot be read as KEY=VALUE"]),
    ([*DEMO, "distill.lr=1e-3,1e-4"], ["add --multirun"]),
    ([*DEMO, "~no.such.key"], ["no.such.key"]),
    # Numbers out of range.
    ([*DEMO, "distill.max_steps=0"], ["distill.max_steps=0 must be above 0; set distill.max_steps to 1 or more"]),
    ([*DEMO, "distill.lr=-1e-3"], ["distill.lr=-0.001 must be above 0; set distill.lr to a number above 0"]),
    ([*DEMO, "distill.min_lr=-1e-3"], ["distill.min_lr=-0.001 must not be negative"]),
    ([*DEMO, "model.demo.training.micro_batch_size=0"], ["model.demo.training.micro_batch_size=0 must be above 0"]),
    ([*DEMO, "distill.parallel.tensor_model_parallel_size=0"], ["tensor_model_parallel_size=0 must be above 0"]),
    ([*DEMO, "model.shape.num_layers=-6"], ["model.shape.num_layers=-6 must be above 0"]),
    ([*DEMO, "prune.hidden_size=0"], ["prune.hidden_size=0 must be above 0"]),
    ([*DEMO, "cluster.nodes=0"], ["cluster.nodes=0 must be above 0"]),
    ([*DEMO, "evaluate.verify_tokens=-1"], ["evaluate.verify_tokens=-1 must not be negative"]),
    ([*DEMO, "distill.adam_beta2=1.5"], ["distill.adam_beta2=1.5", "must be between 0 and 1"]),
    ([*DEMO, "data.holdout_every=1"], ["data.holdout_every=1 would hold out every document", "2 or more"]),
    ([*DEMO, "name=''"], ["name='' is empty"]),
    ([*DEMO, "run_dir=' '"], ["run_dir=' ' is empty; set run_dir"]),
    # The model and its data.
    ([*DEMO, "model.hf_path=Qwen/Qwen3-8B"], ["model.hf_path=Qwen/Qwen3-8B and model.demo are both set"]),
    ([*QWEN, "model.hf_path=null"], ["model.hf_path=null names no teacher; set model.hf_path"]),
    ([*DEMO, "model.shape=null"], ["model.shape=null", "set model.shape"]),
    ([*LOCAL, "model.hf_path=./nowhere"], ["no config.json", "model.hf_path=./nowhere", "set model.hf_path"]),
    ([*LOCAL, "model.hf_path=no-such-owner/no-such-model"], ["not in the local Hub cache", "download the model first"]),
    (["model=local", *LOCAL[1:]], ["model.hf_path is not set; set model.hf_path"]),
    ([*DEMO, "model.shape.num_query_groups=3"], ["num_attention_heads=4 is not divisible by", "1 or 2 or 4"]),
    ([*QWEN, "data.train=null"], ["data.train=null", "set data.train=[FILE.jsonl]"]),
    ([*DEMO, "data.validation=[v.jsonl]"], ["data.validation=['v.jsonl'] is set without data.train"]),
    ([*QWEN, "data.train=[]"], ["data.train=[] names no file"]),
    ([*QWEN, "data.train=[a,b]", "data.validation=[b]"], ["data.validation holds b, which data.train holds too"]),
    # Pruning.
    ([*DEMO, "prune.num_layers=null"], ["as large as the teacher", "prune.num_layers", "prune.drop_layers"]),
    ([*DEMO, "prune.num_layers=6"], ["as large as the teacher"]),
    ([*DEMO, "prune.num_layers=7"], ["prune.num_layers=7 is larger than the teacher's 6", "to at most 6"]),
    ([*QWEN, "prune.hidden_size=8192"], ["prune.hidden_size=8192 is larger than the teacher's 4096"]),
    ([*DEMO, "prune.hidden_size=200"], ["prune.hidden_size=200 is not a multiple of 64", "to 192 or 256"]),
    ([*DEMO, "prune.ffn_hidden_size=500"], ["prune.ffn_hidden_size=500 is not a multiple of 64", "to 448 or 512"]),
    ([*DEMO, "prune.num_attention_heads=3"], ["heads=3 is not divisible by the student's 2 query groups", "2 or 4"]),
    ([*DEMO, "prune.num_query_groups=1"], ["heads=4 over 1 query groups are 4 heads a group", "has 2", "1 or 2"]),
    ([*DEMO, "prune.drop_layers=[2]"], ["prune.drop_layers=[2] cannot go together with prune.num_layers=4", "=null"]),
    ([*DEMO, "prune.num_layers=null", "prune.drop_layers=[0,7]"], ["names [0, 7]", "numbers from 1 to 6"]),
    ([*DEMO, "prune.num_layers=null", "prune.drop_layers=[2,2]"], ["names [2] more than once", "drop_layers=[2]"]),
    ([*DEMO, "prune.calibration_seq_length=4096"], ["prune.calibration_seq_length=4096 is longer", "at most 2048"]),
    (
        [*DEMO, "prune.pipeline_model_parallel_size=7", "cluster.devices_per_node=7", "distill.global_batch_size=28"],
        ["prune.pipeline_model_parallel_size=7 is more than the teacher's 6 layers", "to at most 6"],
    ),
    (
        [*DEMO, "prune.pipeline_model_parallel_size=2"],
        ["prune.pipeline_model_parallel_size=2 is more than the 1 devices", "at most 1"],
    ),
    # Layout.
    (
        [*DEMO, "distill.parallel.tensor_model_parallel_size=2"],
        ["devices_per_node=1 ranks is not a multiple of 2", "distill.parallel", "start 2 ranks"],
    ),
    (
        [*QWEN, "distill.parallel.tensor_model_parallel_size=16", "cluster.nodes=2"],
        ["tensor_model_parallel_size=16 does not divide the teacher's num_query_groups 8", "to 1 or 2 or 4 or 8"],
    ),
    (
        [*QWEN, "distill.parallel.tensor_model_parallel_size=1", "distill.parallel.pipeline_model_parallel_size=8"],
        ["pipeline_model_parallel_size=8 does not divide the teacher's 36 and the student's 36 layers", "to 1 or 2"],
    ),
    (
        [
            "experiment=qwen3_8b_to_6b_depth",
            "distill.parallel={tensor_model_parallel_size:4,pipeline_model_parallel_size:2}",
            "prune.num_layers=25",
        ],
        ["pipeline_model_parallel_size=2 does not divide the student's 25 layers; set it to 1"],
    ),
    (
        [*QWEN, "distill.parallel.tensor_model_parallel_size=2", "distill.global_batch_size=30"],
        ["distill.global_batch_size=30 is not divisible by 8", "x 4 data-parallel ranks", "to 24 or 32"],
    ),
    ([*QWEN, "distill.global_batch_size=1"], ["distill.global_batch_size=1 is not divisible by 2", "to 2"]),
    (
        [
            *QWEN,
            "distill.parallel={tensor_model_parallel_size:4,context_parallel_size:2,sequence_parallel:false}",
            "distill.seq_length=4090",
        ],
        ["distill.seq_length=4090 is not divisible by the 4 pieces", "context parallel 2", "to 4088 or 4092"],
    ),
    ([*QWEN, "distill.seq_length=4095"], ["distill.seq_length=4095", "the 8 pieces", "to 4088 or 4096"]),
    ([*DEMO, "distill.seq_length=4096"], ["distill.seq_length=4096 is longer", "max_position_embeddings 2048"]),
    ([*DEMO, "evaluate.seq_length=4096"], ["evaluate.seq_length=4096 is longer", "at most 2048"]),
    (
        [*DEMO, "evaluate.sample_prompt_tokens=2000"],
        ["evaluate.sample_prompt_tokens + sample_new_tokens=2064 is"],
    ),
    ([*DEMO, "benchmark.prompt_tokens=2040"], ["benchmark.prompt_tokens + new_tokens=2072 is longer", "at most 2048"]),
    ([*DEMO, "benchmark.new_tokens=1"], ["benchmark.new_tokens=1 leaves nothing to time", "to 2 or more"]),
    ([*DEMO, "benchmark.rounds=0"], ["benchmark.rounds=0 must be above 0"]),
    ([*DEMO, "evaluate.continuations.questions=0"], ["evaluate.continuations.questions=0 must be above 0"]),
    ([*DEMO, "evaluate.tasks=[mmlu,arc_easy,mmlu]"], ["names one twice; set evaluate.tasks=['arc_easy', 'mmlu']"]),
    ([*DEMO, "evaluate.tasks=[heldout_continuations]"], ["take it out and set evaluate.continuations={}"]),
    # The cluster.
    (
        [*DEMO, "cluster.time_limit=4h"],
        [
            "cluster.time_limit: '4h' is not a time limit of the form H:MM:SS or D-HH:MM:SS",
            "cluster.time_limit='4:00:00'",
        ],
    ),
    ([*DEMO, "cluster.time_limit=14400"], ["without quotes YAML reads 4:00:00 as a number"]),
    ([*DEMO, "cluster.time_limit=0:00:00"], ["'0:00:00' is zero"]),
    ([*DEMO, "cluster.gpu.memory_gib=80", "cluster.gpu.bf16_tflops=989"], ["cluster.gpu.name is not set"]),
    (
        [*QWEN, "cluster.gpu.utilisation=40"],
        ["cluster.gpu.utilisation=40.0 must be between 0 and 1", "to a number above 0 and at most 1"],
    ),
    ([*QWEN, "cluster.gpu.memory_gib=0"], ["cluster.gpu.memory_gib=0.0 must be above 0"]),
    # Training.
    ([*DEMO, "distill.warmup_steps=160"], ["distill.warmup_steps=160", "distill.max_steps=160", "such as 8"]),
    ([*DEMO, "distill.min_lr=1"], ["distill.min_lr=1.0 is above distill.lr=0.001", "to at most 0.001"]),
    (
        [*DEMO, "model.demo.training.use_distributed_optimizer=false"],
        ["model.demo.training.overlap_param_gather=True needs model.demo.training.use_distributed_optimizer=True"],
    ),
    (
        [*DEMO, "distill.controls=[kd]"],
        ["distill.controls=['kd'] names ['kd'], which is not known", "['ce', 'scratch']"],
    ),
    ([*DEMO, "distill.controls=[ce,ce]"], ["names one twice; set distill.controls=['ce']"]),
    (
        [*DEMO, "prune.rounds=[{steps: 20, num_layers: 4}]", "prune.num_layers=5", "prune.ffn_hidden_size=null"],
        ["prune.num_layers=5 is larger than the teacher's 4"],
    ),
    (
        [*DEMO, "prune.rounds=[{steps: 20, drop_layers: [7]}]", "prune.num_layers=4"],
        ["prune.rounds[0]: prune.drop_layers=[7] names [7], but the teacher's layers are 1 to 6"],
    ),
    (
        [*DEMO, "prune.rounds=[{steps: 3, num_layers: 5}]", "prune.num_layers=4"],
        ["prune.rounds[0].steps=3 end before the learning rate is at its height", "warmup_steps=10"],
    ),
    (
        [*DEMO, "prune.num_layers=null", "prune.budget.params_share=0.5", "prune.rounds=[{steps: 20, num_layers: 5}]"],
        ["prune.budget searches among shapes of the teacher, which prune.rounds leaves behind"],
    ),
    ([*DEMO, "distill.loss=ce"], ["distill.controls=['ce'] repeats what distill.loss=ce already trains"]),
    # Its loss.
    ([*DEMO, "distill.kd.temperature=0"], ["distill.kd.temperature=0.0 must be above 0"]),
    ([*DEMO, "distill.kd.temperature=-2"], ["distill.kd.temperature=-2.0 must be above 0"]),
    ([*DEMO, "distill.kd.kd_weight=0"], ["distill.kd.kd_weight=0.0 must be above 0"]),
    ([*DEMO, "distill.kd.lm_weight=-1"], ["distill.kd.lm_weight=-1.0 must not be negative"]),
    ([*DEMO, "distill.kd.chunk_tokens=0"], ["distill.kd.chunk_tokens=0 must be above 0"]),
    ([*DEMO, "distill.kd.divergence=kl"], ["distill.kd.divergence=kl", "forward_kl or reverse_kl or jensen_shannon"]),
    ([*DEMO, "distill.kd.top_k=1024"], ["distill.kd.top_k=1024 takes the whole vocabulary", "top_k=null"]),
    ([*DEMO, "distill.kd.top_k=9", "distill.kd.divergence=reverse_kl"], ["top_k=9 goes with forward KL only"]),
    (
        [*DEMO, "distill.kd.implementation=upstream", "distill.kd.divergence=jensen_shannon"],
        [
            "implementation=upstream has no distill.kd.divergence=jensen_shannon",
            "set distill.kd.implementation=chunked",
        ],
    ),
    ([*DEMO, "distill.kd.implementation=upstream", "distill.kd.top_k=9"], ["has no distill.kd.top_k=9"]),
    (
        [*DEMO, "distill.kd.intermediate_pairs=[{student:5,teacher:6}]"],
        ["distill.kd.intermediate_pairs names layers [5] of the student, which has 1 to 4"],
    ),
    (
        [*DEMO, "distill.kd.intermediate_pairs=[{student:0,teacher:6}]"],
        ["pairs[0].student=0 must be above 0"],
    ),
    (
        [*DEMO, "distill.kd.intermediate_pairs=[{student:2,teacher:3},{student:2,teacher:4}]"],
        ["names layers [2] of the student more than once"],
    ),
    ([*DEMO, "distill.kd.intermediate_pairs=[{student:2}]"], ["intermediate_pairs[0].teacher is not set"]),
    (
        [*DEMO, "distill.kd.intermediate_pairs=[{student:2,teacher:3}]", "distill.recompute=full"],
        ["distill.kd.intermediate_pairs teach nothing with distill.recompute=full", "set distill.recompute=selective"],
    ),
    (
        [
            *(*DEMO, "cluster.devices_per_node=2", "distill.parallel.pipeline_model_parallel_size=2"),
            "distill.kd.intermediate_pairs=[{student:2,teacher:4}]",
        ],
        ["names layers [2] of the student", "pipeline_model_parallel_size=2 stages, which has its layers 3 to 4"],
    ),
]


@pytest.mark.parametrize(("overrides", "parts"), CASES, ids=lambda value: " ".join(value) if value else "nothing")
def test_one_fault_names_the_value_and_the_mend(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    (fault,) = caught.value.faults
    for part in parts:
        assert part in fault


def test_all_faults_come_in_one_message() -> None:
    types = ["distill.lrr=1", "seed=x"]
    contradictions = ["distill.max_steps=0", "prune.num_layers=9", "cluster.devices_per_node=3"]
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=demo", *types, *contradictions, "distill.warmup_steps=500"])
    assert [fault.partition(" ")[0].partition("=")[0] for fault in caught.value.faults] == [
        "seed",
        "distill.lrr",
        "distill.max_steps",
        "prune.num_layers",
        "distill.global_batch_size",
    ]
    assert str(caught.value).startswith("5 faults in the configuration:\n  - seed")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.hf_path=./nowhere", ["model.hf_path=./nowhere does not exist; set model.hf_path"]),
        ("data.train=[a.jsonl,b.jsonl]", ["data.train names a.jsonl and 1 more, not to be found", "[FILE.jsonl]"]),
        ("data.validation=[v.jsonl]", ["data.validation names v.jsonl, not to be found"]),
        ("evaluate.tasks=[mmlu,nonsuch]", ["evaluate.tasks names nonsuch, which lm_eval does not know"]),
        ("evaluate.task_folder=./nowhere", ["evaluate.task_folder=./nowhere is no folder; set it to one with task"]),
        ("benchmark.engine=vllm", ["benchmark.engine=vllm, but vllm is not installed", "=transformers"]),
    ],
)
def test_missing_files_are_named_where_a_run_starts(tmp_path: Path, override: str, parts: list[str]) -> None:
    documents = tmp_path / "docs.jsonl"
    documents.write_text("")
    overrides = [*QWEN, f"data.train=[{documents}]", override]
    compose(overrides)
    with pytest.raises(ConfigError) as caught:
        compose(overrides, check_files=True)
    (fault,) = caught.value.faults
    for part in parts:
        assert part in fault


def test_tasks_of_the_users_are_known(tmp_path: Path) -> None:
    documents, tasks = tmp_path / "docs.jsonl", tmp_path / "tasks"
    documents.write_text("")
    (tasks / "deep").mkdir(parents=True)
    (tasks / "deep" / "one.yaml").write_text("tag:\n  - mine\ntask: my_one\nprocess_docs: !function utils.process\n")
    mine = [f"evaluate.task_folder={tasks}", "evaluate.tasks=[mine, my_one, arc_challenge]"]
    compose([*QWEN, f"data.train=[{documents}]", *mine], check_files=True)
    with pytest.raises(ConfigError, match="names your_one, which lm_eval does not know and .* does not define"):
        compose([*QWEN, f"data.train=[{documents}]", mine[0], "evaluate.tasks=[your_one]"], check_files=True)


def test_a_harness_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from prune_distill.config.rules import evaluation as evaluation_rules

    monkeypatch.setattr(evaluation_rules.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="need lm_eval, which is not installed; run make setup"):
        compose(DEMO, check_files=True)


@pytest.mark.parametrize("control", ["\n", "\r", "\x00", "\x1b", "\t", "\u2028", "\udcff"])
@pytest.mark.parametrize("key", ["run_dir", "name", "model.name", "data.text_key", "data.train", "evaluate.tasks"])
def test_a_control_character_is_refused_everywhere(key: str, control: str) -> None:
    text = f'"a{control}#SBATCH --wrap=id"'
    with pytest.raises(ConfigError) as caught:
        compose([*DEMO, f"{key}=[{text}]" if key in ("data.train", "evaluate.tasks") else f"{key}={text}"])
    assert any(fault.startswith(key) and "control character" in fault for fault in caught.value.faults)


@pytest.mark.parametrize(
    "value",
    [
        "a b",
        "it's",
        'say "hi"',
        "a,b",
        "a=b",
        "a(b",
        "{x}",
        "[x",
        "back\\slash\\",
        '\\"',
        "#1",
        "$HOME `id` Größe 汉字 \u0915\u200d\u0937",
    ],
)
def test_an_override_that_is_offered_survives_bash_and_hydra(value: str) -> None:
    """What a fault says to set, copied into a shell."""
    command = f"printf %s {override('model.name', value)}"
    word = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert compose([*DEMO, word]).model.name == value


def test_a_value_that_hydra_cannot_read_is_offered_quoted() -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*DEMO, "model.name=a(b", "run_dir=/x/a,b"])
    first, second = caught.value.faults
    assert first.endswith("""set 'model.name="a(b"'""")
    assert """set 'run_dir="/x/a,b"' for one text""" in second
    assert "--multirun" in second
