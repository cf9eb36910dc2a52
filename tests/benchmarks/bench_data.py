"""python -m tests.benchmarks.bench_data [--rounds 5]: data preparation and ModelOpt's megatron_preprocess_data.

The same text, tokenizer (byte-level BPE, 49,152 entries, Qwen3's pattern) and cores; the two take turns, and medians
are quoted. A rate by the clock is that of the work itself: each side works on a shorter and on a longer text, and the
rate is that of what the longer one has more, so that starting (imports, the tokenizer, ours also the proof that
fastokens is equal) cancels out. The time of a whole call is also reported. Ours is too fast for the available text, and
reads it many times.

fastokens caches words, and is twice as fast on text that it has seen. So hours are computed from text that occurs
once: a worker makes shards of it, in CPU time, after a warmup on a quarter of the text. Encoders alone (fastokens, and
tiktoken as the alternative) get the same text in memory, and their ids are discarded.

Prints a table and writes runs/bench/data.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Sized
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 49_152
# The shorter and the longer run, in quarters of the text.
OURS, THEIRS = (16, 128), (1, 4)
WHOLE = 4
BUDGET = 100e9
SHARD_BYTES = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="alternations of which the median is taken")
    parser.add_argument("--arm", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(ARMS[args.arm[0]](Path(args.arm[1]), int(args.arm[2]), int(args.arm[3]))))
        return
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        raise SystemExit("two cores are needed")
    target = ROOT / "runs" / "bench"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as folder:
        result = measure(Path(folder), args.rounds)
    (target / "data.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    from tests.benchmarks.text import write_text

    text = write_text(folder)
    print(", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in text.items() if size > 1), flush=True)
    write_tokenizer(folder)
    with (folder / "text.jsonl").open("rb") as file:
        lines = file.readlines()
    for quarters in {*OURS, *THEIRS}:
        with (folder / f"text{quarters}.jsonl").open("wb") as file:
            file.writelines(lines[: len(lines) * quarters // 4] if quarters < 4 else lines * (quarters // 4))
    (folder / "validation.jsonl").write_text('{"text": "held out"}\n')
    runs: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        for arm, cores, quarters in _order():
            name = f"{arm}-{cores}-{quarters}"
            runs.setdefault(name, []).append(run(folder, arm, cores, quarters))
            print(f"round {number + 1}: {name} {runs[name][-1]['seconds']:.1f} s", flush=True)
    rates = {f"{arm}_{cores}": median(_rates(runs, arm, cores)) for arm in ("ours", "theirs") for cores in (1, 2)}
    # Of the same text, round by round.
    cpu = {arm: [one["tokens"] / one["cpu_seconds"] for one in runs[f"{arm}-1-{WHOLE}"]] for arm in ONCE}
    cpu["theirs"] = _rates(runs, "theirs", 1, "cpu_seconds")
    share = {arm: median(a / b for a, b in zip(cpu["worker"], cpu[arm], strict=True)) for arm in ONCE}
    rss = max(one["rss_mb"] for name, of in runs.items() if name.startswith("ours") for one in of)
    return {
        "speedup_1core": rates["ours_1"] / rates["theirs_1"],
        "speedup_2core": rates["ours_2"] / rates["theirs_2"],
        "speedup_1core_by_cpu_time": median(cpu["worker"]) / median(cpu["theirs"]),
        "share_of_encoder_rate": share["fastokens"],
        "share_of_tiktoken_rate": share["tiktoken"],
        "rss_mb_per_process": rss,
        "rss_mb_by_quarters_of_text": {c: max(one["rss_mb"] for one in runs[f"ours-1-{c}"]) for c in (WHOLE, *OURS)},
        "rss_mb_of_the_parent": max(
            one["parent_rss_mb"] for of in runs.values() for one in of if "parent_rss_mb" in one
        ),
        "scaling_1_to_2": rates["ours_2"] / rates["ours_1"],
        "ids_equal": all(one["sha256"] == runs[SAME[0]][0]["sha256"] for n in SAME for one in runs[n]),
        "tokens_per_second": rates,
        "tokens_per_cpu_second": {arm: median(of) for arm, of in cpu.items()},
        "whole_call_seconds": {name: median(one["seconds"] for one in of) for name, of in runs.items()},
        "core_hours_100b_tokens": {
            arm: BUDGET / median(cpu[of]) / 3600 for arm, of in (("ours", "worker"), ("theirs", "theirs"))
        },
        "text": text,
        "vocabulary": VOCABULARY,
        "rounds": rounds,
    }


# In CPU time, on text that comes once.
ONCE = ("worker", "fastokens", "tiktoken")
SAME = tuple(f"{arm}-{cores}-{WHOLE}" for arm in ("theirs", "ours") for cores in (1, 2))


def _order() -> list[tuple[str, int, int]]:
    """Return the arms to compare, in order."""
    one = [*[("theirs", 1, quarters) for quarters in THEIRS], *[(arm, 1, WHOLE) for arm in ONCE], ("ours", 1, WHOLE)]
    two = [*[("theirs", 2, quarters) for quarters in THEIRS], ("ours", 2, WHOLE)]
    return [*one, *two, *[("ours", cores, quarters) for quarters in OURS for cores in (1, 2)]]


def _rates(runs: dict[str, list[dict[str, Any]]], arm: str, cores: int, clock: str = "seconds") -> list[float]:
    """Return tokens per second of the difference between the longer and the shorter run, by round."""
    short, long = (runs[f"{arm}-{cores}-{quarters}"] for quarters in (OURS if arm == "ours" else THEIRS))
    return [(b["tokens"] - a["tokens"]) / (b[clock] - a[clock]) for a, b in zip(short, long, strict=True)]


def run(folder: Path, arm: str, cores: int, quarters: int) -> dict[str, Any]:
    """Run one arm in a separate process, on a number of cores."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.bench_data",
        "--arm",
        arm,
        str(folder),
        str(cores),
        str(quarters),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _pin(cores: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def ours(folder: Path, cores: int, quarters: int) -> dict[str, Any]:
    from prune_distill.data.prepare import prepare
    from prune_distill.schema import DataConfig

    _pin(cores)
    out = folder / "ours"
    shutil.rmtree(out, ignore_errors=True)
    files = {"train": [str(folder / f"text{quarters}.jsonl")], "validation": [str(folder / "validation.jsonl")]}
    data = DataConfig(num_workers=cores, shard_bytes=SHARD_BYTES)
    started, cpu = time.perf_counter(), _cpu_seconds()
    made = prepare(data, files, folder / "tokenizer", out, 1)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "cpu_seconds": _cpu_seconds() - cpu,
        "tokens": made.train_tokens,
        "rss_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "parent_rss_mb": _high_water_mb(),
        "sha256": _sha256([out / part["prefix"] for part in made.train]),
    }


def _high_water_mb() -> float:
    """The most memory that this process had; its ru_maxrss is that of the one that started it, if that had more."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def theirs(folder: Path, cores: int, quarters: int) -> dict[str, Any]:
    from modelopt.torch.utils.plugins import megatron_preprocess_data

    _pin(cores)
    out = folder / "theirs"
    shutil.rmtree(out, ignore_errors=True)
    started, cpu = time.perf_counter(), _cpu_seconds()
    megatron_preprocess_data(
        [folder / f"text{quarters}.jsonl"],
        output_dir=out,
        tokenizer_name_or_path=str(folder / "tokenizer"),
        append_eod=True,
        max_sequence_length=32_000,
        workers=cores,
        log_interval=1_000_000,
    )
    seconds = time.perf_counter() - started
    prefix = out / f"text{quarters}_text_document"
    import gc

    gc.collect()  # its pool is ended by the collector, and counts among the children only then
    return {
        "seconds": seconds,
        "cpu_seconds": _cpu_seconds() - cpu,
        "tokens": prefix.with_suffix(".bin").stat().st_size // 2,
        "sha256": _sha256([prefix]),
    }


def worker(folder: Path, cores: int, quarters: int) -> dict[str, Any]:
    """What a worker process and its parent do, in this one: four shards, of which the first is not measured."""
    from prune_distill.data import work
    from prune_distill.data.encoder import FastokensEncoder, TokenizersEncoder
    from prune_distill.data.plan import make_plan
    from prune_distill.data.shards import publish
    from prune_distill.data.tokenizer import read_tokenizer
    from prune_distill.schema import DataConfig

    _pin(cores)
    file = folder / f"text{quarters}.jsonl"
    data, tokenizer = DataConfig(shard_bytes=file.stat().st_size // 4 + 1), read_tokenizer(folder / "tokenizer")
    shards = make_plan(data, {"train": [str(file)]}, tokenizer, None, 1)
    assert len(shards) == 4
    work.start_worker(work.Settings(data, 1, tokenizer, None, holdout_every=0))
    own, tokens = TokenizersEncoder(tokenizer), 0
    with tempfile.TemporaryDirectory(dir=folder) as out:
        for number, shard in enumerate(shards):
            if number == 1:
                started, cpu = time.perf_counter(), time.process_time()
            made = work.make_shard(shard, Path(out) / "partial", FastokensEncoder.name)
            assert own.find_mismatch(made.samples) is None
            publish(Path(out) / "partial", Path(out) / shard.name, made.manifest)
            tokens += made.manifest["train"]["tokens"] if number else 0
    return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu, "tokens": tokens}


def fastokens(folder: Path, cores: int, quarters: int) -> dict[str, Any]:
    """The encoder alone, with texts in memory and ids thrown away."""
    from prune_distill.data.encoder import FastokensEncoder
    from prune_distill.data.tokenizer import read_tokenizer

    os.environ["FASTOKENS_BPE_THREADS"] = "1"  # as a worker has it
    return _encoded(FastokensEncoder(read_tokenizer(folder / "tokenizer")), folder, cores, quarters)


def tiktoken(folder: Path, cores: int, quarters: int) -> dict[str, Any]:
    """tiktoken alone, on text that is normalized beforehand; its ranks are the tokenizer's ids."""
    import numpy as np
    import tiktoken

    from prune_distill.data.encoder import byte_alphabet, token_bytes
    from tests.helpers.tokenizers import QWEN_PATTERN

    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    alphabet = byte_alphabet()
    ranks = {content: number for token, number in vocabulary.items() if (content := token_bytes(token, alphabet))}
    end = {"<|endoftext|>": vocabulary["<|endoftext|>"]}
    del ranks[b"<|endoftext|>"]
    core = tiktoken.Encoding("bench", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=end)._core_bpe

    def encode(text: str) -> np.ndarray:
        return np.frombuffer(core.encode_to_tiktoken_buffer(text, set()), dtype=np.uint32)

    return _encoded(encode, folder, cores, quarters)


def _encoded(encode: Callable[[str], Sized], folder: Path, cores: int, quarters: int) -> dict[str, Any]:
    _pin(cores)
    with (folder / f"text{quarters}.jsonl").open() as file:
        texts = [unicodedata.normalize("NFC", json.loads(line)["text"]) for line in file]
    first = len(texts) // 4
    for text in texts[:first]:
        encode(text)
    started, cpu = time.perf_counter(), time.process_time()
    tokens = sum(len(encode(text)) + 1 for text in texts[first:])
    return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu, "tokens": tokens}


ARMS = {"ours": ours, "theirs": theirs, "worker": worker, "fastokens": fastokens, "tiktoken": tiktoken}


def _sha256(prefixes: list[Path]) -> str:
    """Of all documents of the prefixes, one after the other: ids and lengths."""
    import hashlib

    import numpy as np

    from prune_distill.data.shards import Index

    digest, lengths = hashlib.sha256(), hashlib.sha256()
    for prefix in prefixes:
        digest.update(np.memmap(f"{prefix}.bin", dtype=np.uint8, mode="r"))
        lengths.update(Index.read(Path(f"{prefix}.idx")).lengths.tobytes())
    return digest.hexdigest() + lengths.hexdigest()


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE trained on a third of the text, its ids in the order of merging."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from tests.helpers.tokenizers import QWEN_PATTERN, save

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated", False)
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    with (folder / "text.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line in file]
    tokenizer.train_from_iterator(texts[::3], trainer)
    save(folder / "tokenizer", tokenizer, VOCABULARY, eos_token="<|endoftext|>")


def table(result: dict[str, Any]) -> str:
    rates, cpu, hours = (
        result[key] for key in ("tokens_per_second", "tokens_per_cpu_second", "core_hours_100b_tokens")
    )
    rows = [
        ("", "ours", "ModelOpt", "ratio"),
        *(
            (
                f"M tokens/s, {cores} core{'s'[: cores - 1]}",
                *(f"{rates[f'{arm}_{cores}'] / 1e6:.2f}" for arm in ("ours", "theirs")),
                f"{result[f'speedup_{cores}core']:.1f}",
            )
            for cores in (1, 2)
        ),
        (
            "M tokens per CPU second, new text",
            *(f"{cpu[arm] / 1e6:.2f}" for arm in ("worker", "theirs")),
            f"{result['speedup_1core_by_cpu_time']:.1f}",
        ),
        ("core-hours for 100 B tokens", *(f"{hours[arm]:.1f}" for arm in ("ours", "theirs")), ""),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    shares = (("fastokens", "share_of_encoder_rate"), ("tiktoken", "share_of_tiktoken_rate"))
    return "\n".join(
        [
            *lines,
            *(
                f"of {name} alone, {cpu[name] / 1e6:.2f} M tokens per CPU second: {result[key]:.1%}"
                for name, key in shares
            ),
            f"1 to 2 cores: {result['scaling_1_to_2']:.2f}x; memory of a worker: {result['rss_mb_per_process']:.0f} MB;"
            f" ids equal: {result['ids_equal']}",
        ]
    )


if __name__ == "__main__":
    main()
