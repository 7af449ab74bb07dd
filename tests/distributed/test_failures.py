"""A rank that fails ends the whole run soon, with an outcome that names it, and leaves no process behind.

These runs go through the launcher and torchrun, as a study's do.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed import ranks
from tunemap.capture import launch as captures
from tunemap.training import finished, launch
from tunemap.training.failure import describe, read_failures, write_failure
from tunemap.training.heartbeat import Heartbeat, Watchdog, read_beats

FAILING_WORKER = Path(__file__).parent / "sabotage.py"
FAILING_STEP = 3
OF_SHARED_CORES = {"cpu_share", "wall", "training_time"}  # where ranks share them, seconds may pass between parts
PROMPT_S = 8.0  # from the failure to the outcome file, on a busy machine; about one on an idle one


@pytest.fixture
def fail_in(tmp_path, monkeypatch):
    """Let one rank of a launcher's workers fail in some way; returns the function that asks when it did."""

    def fail_in(launcher, worker: str, *, rank: int, how: str):
        command = launcher._command

        def failing(*arguments):
            """The command with the worker as a script in place of `-m WORKER`."""
            parts = command(*arguments)
            place = parts.index(worker)
            return [*parts[: place - 1], str(FAILING_WORKER), *parts[place + 1 :]]

        monkeypatch.setattr(launcher, "_command", failing)
        monkeypatch.setenv("SABOTAGED_WORKER", worker)
        monkeypatch.setenv("SABOTAGE", json.dumps({"rank": rank, "step": FAILING_STEP, "how": how}))
        monkeypatch.setenv("SABOTAGE_TIME", str(tmp_path / "time"))
        return lambda: float((tmp_path / "time").read_text())

    return fail_in


@pytest.fixture
def launched(material, tmp_path, fail_in):
    """Launch a run whose rank 1 fails in some way; returns its outcome and the seconds from the failure to the end."""

    def run(how: str, strategy: str = "ddp", world_size: int = 2, **factors) -> tuple[dict, float]:
        failed_at = fail_in(launch, "tunemap.training.worker", rank=1 if world_size > 1 else 0, how=how)
        paths = paths_in(tmp_path, material)
        assert launch.launch(ranks.make_run("lora", strategy, world_size, **factors), paths, device="cpu") == 0
        seconds = time.time() - failed_at()
        assert processes_of(tmp_path) == []
        # Tensors stay where a checkpoint is to be resumed, and nowhere else.
        assert any(paths.work.rglob("*.pt")) is ("checkpoint_steps" in factors)
        return json.loads(paths.outcome.read_text()), seconds

    return run


@pytest.fixture(scope="module")
def undisturbed(material, tmp_path_factory):
    """The files of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    paths = paths_in(folder, material)
    assert launch.launch(ranks.make_run("lora", "fsdp", 2, checkpoint_steps=2), paths, device="cpu") == 0
    assert processes_of(folder) == []
    return paths


def paths_in(folder, material):
    own = {name: folder / name for name in ("work", "weights")}
    files = {"steps": folder / "steps.csv", "outcome": folder / "outcome.json"}
    return launch.Paths(material.model, material.dataset, material.tokens, **own, **files)


def processes_of(folder):
    """Command lines of living processes that work in `folder`."""
    deadline = time.monotonic() + 2  # the kernel needs a moment to end orphans
    while found := [line for line in _command_lines() if str(folder) in line]:
        if time.monotonic() > deadline:
            return found
        time.sleep(0.05)
    return []


def _command_lines():
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            yield " ".join(process.info["cmdline"] or [])


def test_out_of_memory_of_one_rank_is_the_runs_outcome(launched):
    outcome, seconds = launched("out of memory")
    assert seconds < PROMPT_S
    assert (outcome["outcome"], outcome["rank"], outcome["phase"]) == ("oom", 1, "train")
    assert (outcome["bytes_asked"], outcome["bytes_free"]) == (2 * 2**30, 3 * 2**29)


def test_exception_of_one_rank_is_named_and_not_its_partners_complaint(launched):
    outcome, seconds = launched("exception", "fsdp")
    assert seconds < PROMPT_S
    assert (outcome["outcome"], outcome["rank"]) == ("error", 1)
    assert outcome["reason"] == "ValueError: the tokens of this rank are spoiled"


def assert_killed_rank_is_named(outcome, seconds):
    assert seconds < PROMPT_S
    assert (outcome["outcome"], outcome["rank"], outcome["phase"]) == ("error", 1, "train")
    assert outcome["step"] == FAILING_STEP
    assert outcome["reason"] == (
        "rank 1: the training process was ended by SIGKILL (the system may have run out of memory)"
    )


def test_killed_rank_is_named(launched):
    assert_killed_rank_is_named(*launched("killed"))


def test_a_repeated_run_goes_on_from_the_checkpoint_of_the_killed_one(
    launched, undisturbed, material, tmp_path, monkeypatch, capfd
):
    """What `tunemap retry` does, and then the same as a run that nobody killed."""
    assert_killed_rank_is_named(*launched("killed", "fsdp", checkpoint_steps=2))
    assert "`tunemap retry STUDY.yaml` says to repeat it, from its checkpoint" in capfd.readouterr().out
    monkeypatch.undo()
    paths, run = paths_in(tmp_path, material), ranks.make_run("lora", "fsdp", 2, checkpoint_steps=2)
    finished.forget(paths.work)
    assert launch.launch(run, paths, device="cpu") == 0
    assert "resuming after step 2" in capfd.readouterr().out
    repeated, whole = (json.loads(one.outcome.read_text()) for one in (paths, undisturbed))
    assert repeated["outcome"] == whole["outcome"] == "ok"
    assert repeated["weights_sha256"] == whole["weights_sha256"]
    assert len(paths.steps.read_text().splitlines()) == len(undisturbed.steps.read_text().splitlines())
    assert [path.name for path in paths.work.iterdir()] == [finished.FINISHED]


def test_hanging_rank_ends_the_run_at_the_limit_and_is_named(launched, monkeypatch):
    monkeypatch.setattr(launch, "STALL_LIMIT_S", 3.0)
    outcome, seconds = launched("hang")
    assert 3 < seconds < 3 + PROMPT_S
    assert (outcome["outcome"], outcome["rank"], outcome["phase"]) == ("timeout", 1, "train")
    assert outcome["reason"] == f"rank 1 has not moved on for 3 s, in step {FAILING_STEP} (forward)"


def test_hanging_single_process_ends_too(launched, monkeypatch):
    monkeypatch.setattr(launch, "STALL_LIMIT_S", 3.0)
    outcome, seconds = launched("hang", "single", 1)
    assert 3 < seconds < 3 + PROMPT_S
    assert (outcome["outcome"], outcome["rank"]) == ("timeout", 0)


def test_ranks_end_with_a_launcher_that_is_killed(material, tmp_path):
    run = ranks.make_run("lora", "ddp", 2, max_steps=100_000, epochs=None)
    (tmp_path / "run.json").write_text(json.dumps(run.training_spec()))
    paths = paths_in(tmp_path, material)
    program = (
        "import sys; from pathlib import Path; from tunemap.run import Run; from tunemap.training import launch\n"
        "run = Run.from_json(Path(sys.argv[1]).read_text())\n"
        "launch.launch(run, launch.Paths(*map(Path, sys.argv[2:])), device='cpu')\n"
    )
    named = ("model", "dataset", "tokens", "work", "weights", "steps", "outcome")
    arguments = [str(tmp_path / "run.json"), *(str(getattr(paths, name)) for name in named)]
    launcher = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + ranks.WAIT_SECONDS
        while len(read_beats(paths.work)) < 2:
            assert time.monotonic() < deadline
            assert launcher.poll() is None
            time.sleep(0.1)
    finally:  # a test that fails must not leave ranks that train until the suite ends
        launcher.kill()
        launcher.wait()
    assert processes_of(tmp_path) == []


def test_capture_whose_rank_is_killed_names_it_and_leaves_nothing(material, tmp_path, fail_in):
    failed_at = fail_in(captures, "tunemap.capture.worker", rank=1, how="killed")
    outcome, folder = tmp_path / "outcome.json", tmp_path / "capture"
    outcome.write_text(json.dumps({"outcome": "ok", "measurements": {"step_time_mean_s": 1.0}}))
    run = ranks.make_run("lora", "ddp", 2)
    inputs = {"model": material.model, "tokens": material.tokens, "outcome": outcome}
    captures.capture(run, **inputs, folder=folder, device="cpu", backend="torch")
    assert time.time() - failed_at() < PROMPT_S
    described = json.loads((folder / "capture.json").read_text())
    assert described["outcome"] == "error"
    assert described["reason"].startswith("rank 1: the training process was ended by SIGKILL")
    assert processes_of(tmp_path) == []


# --- the parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:36247",
        "Read error [127.0.0.1]:9: Connection reset by peer",
        "NCCL error: remote process exited or there was a network error, NCCL version 2.27.5",
    ],
)
def test_cause_stands_before_its_consequences(tmp_path, message):
    write_failure(tmp_path, describe(RuntimeError(message), rank=0, phase="train", step=1))
    write_failure(tmp_path, describe(ValueError("the cause"), rank=3, phase="train", step=1))
    assert [failure.rank for failure in read_failures(tmp_path)] == [3, 0]
    write_failure(tmp_path, describe(MemoryError(), rank=2, phase="train", step=1))
    assert [failure.rank for failure in read_failures(tmp_path)] == [2, 3, 0]


def test_watchdog_names_the_rank_that_is_furthest_behind(tmp_path):
    hearts = [Heartbeat(tmp_path, rank) for rank in range(3)]
    for heart, phase in zip(hearts, ("backward", "forward", "backward"), strict=True):
        heart.beat(7, phase)
    patient, strict = Watchdog(tmp_path, 60.0), Watchdog(tmp_path, 0.05)
    assert patient.stalled() is None
    assert strict.stalled() is None  # it has just seen them move
    time.sleep(0.1)
    assert (strict.stalled().rank, strict.stalled().step, strict.stalled().phase) == (1, 7, "forward")
    assert patient.stalled() is None
    hearts[0].beat(7, "optimizer")
    assert strict.stalled() is None
    for heart in hearts:
        heart.stop()
    time.sleep(0.1)
    assert strict.stalled() is None  # saving may take its time


def test_watchdog_is_silent_before_training(tmp_path):
    watchdog = Watchdog(tmp_path, 0.01)
    watchdog.stalled()
    time.sleep(0.05)
    assert watchdog.stalled() is None


def test_ranks_that_torchrun_ended_are_no_cause(tmp_path):
    from tunemap.training.torchrun import silent_failures

    write_failure(tmp_path, describe(RuntimeError("Connection closed by peer"), rank=0, phase="train", step=1))
    codes = {0: 1, 1: -signal.SIGSEGV, 2: -signal.SIGTERM, 3: 0}
    (failure,) = silent_failures(codes, tmp_path)
    assert (failure.rank, failure.reason) == (1, "rank 1: the training process was ended by SIGSEGV")


def test_run_that_ends_well_through_torchrun_has_an_outcome_and_leaves_nothing(undisturbed):
    outcome = json.loads(undisturbed.outcome.read_text())
    assert (outcome["outcome"], outcome["measurements"]["steps"]) == ("ok", 6)
    gates = {gate["gate"]: gate for gate in outcome["gates"]}
    assert {name for name, gate in gates.items() if not gate["passed"]} <= OF_SHARED_CORES
    assert gates["fsdp_units"]["message"].startswith("3 FSDP")
    assert "replicas" not in gates
    assert outcome["measurements"]["communication_bytes_per_step"] > 0
    assert [rank["rank"] for rank in outcome["memory_by_rank"]] == [0, 1]
    assert len(outcome["communication_by_rank"]) == 2
    assert [path.name for path in undisturbed.work.iterdir()] == [finished.FINISHED]
