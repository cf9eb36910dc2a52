"""Chains of fake stages on a real Slurm: to their end, again, and with something going wrong."""

from __future__ import annotations

from tests.slurm.conftest import Chain, slurm

ALL = {"first", "second", "aside", "report"}


def test_a_chain_runs_to_its_end_and_a_second_submission_does_nothing(chain: Chain) -> None:
    chain.run_dir = chain.run_dir.parent / 'it\'s a run, 100% "whole"'
    chain.submit({})
    chain.wait_until_ended()
    assert chain.complete() == ALL, chain.told()
    # One after the other where one reads what another made.
    calls = (chain.run_dir / "calls.txt").read_text().split()
    assert (calls[0], set(calls[1:3]), calls[3:]) == ("first", {"second", "aside"}, ["report"])
    assert not list(chain.run_dir.glob("*/stop"))
    done = chain.launch({})
    assert done.returncode == 0
    assert done.stdout.count("complete, skipped") == 4


def test_z_what_is_complete_is_left_out(chain: Chain) -> None:
    chain.submit({}, "--until", "second")
    chain.wait_until_ended()
    assert chain.complete() == {"first", "second"}
    done = chain.launch({})
    assert "first: complete, skipped" in done.stdout
    chain.wait_until_ended()
    assert chain.complete() == ALL
    scripts = sorted(path.name for path in (chain.run_dir / "slurm").glob("*.sbatch"))
    assert scripts == ["01-first.sbatch", "02-second.sbatch", "03-aside.sbatch", "04-report.sbatch"]
    # By hand, and complete when it starts: it does nothing.
    script = chain.run_dir / "slurm" / "02-second.sbatch"
    slurm("sbatch", "--wait", str(script))
    assert chain.log("second").count("complete already") == 1
    assert (chain.run_dir / "calls.txt").read_text().split().count("second") == 1
