"""A workflow that is stopped in the middle goes on where it was.

Every test that looks at the finished study looks at one that was interrupted.
"""

from .conftest import BASE, FULL, LORA


def test_interrupted_study_finishes_without_repeating_runs(interrupted, finished):
    assert len(interrupted.ended) == 1
    for run, said in interrupted.ended.items():  # Snakemake may not have seen the end of the job, and runs it once more
        now = (finished.results / "runs" / run / "outcome.json").read_text()
        assert now == said, f"{run} was computed again"
    assert {finished.outcome(run)["outcome"] for run in (FULL, LORA, BASE)} == {"ok"}
    assert (finished.results / "report.html").exists()
