"""The fault campaign: `make chaos`, or `python -m tests.chaos.campaign --seed 1 --faults 500`.

A study is run once undisturbed. Then, for each fault, a copy of it loses the outputs of one stage, the stage is run and
struck by the fault, whatever the message asks for is done, and the stage is run again. Nothing is lost if the rerun
ends well, its results are those of the undisturbed run (times aside), no process and no temporary file is left, and
what was said names the fault. One line per fault goes to benchmarks/results/chaos.csv.
"""

import argparse
import csv
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.files import read_sealed, write_sealed
from tunemap.training import finished

from .record import record, sums_by
from .stages import STAGES, WITH_WORKERS, Fault, Study, adopt_orphans, preload, stray_processes

REPOSITORY = Path(__file__).resolve().parents[2]
OUTPUT = REPOSITORY / "benchmarks" / "results" / "chaos.csv"
DISKS = ("ENOSPC", "EROFS", "EDQUOT", "EIO")
STEPS_COMPARED = ("rank", "step", "epoch", "learning_rate", "loss", "gradient_norm", "samples", "real_tokens")
COLUMNS = ("stage", "fault", "seed", "injected", "survived", "lost", "seconds", "problem")
TIMED = re.compile(r"time|second|_s$|seal|elapsed|memory|bytes|cpu|wall|host|energy|utili|mfu|hfu|flops|environment")
LEFT_BEHIND = re.compile(r"\.tmp$|\.part$|\.partial$|\.next$|^unfinished$|^lease\.json|\.abandoned\.")
# Weights of faults: a stage that takes long is struck less often.
WEIGHTS = {
    "prepare_model": 6, "prepare_dataset": 12, "tokenize_dataset": 10, "train_run": 8, "evaluate_run": 6,
    "capture_run": 1, "extract_facts": 5, "make_tables": 5, "make_figures": 0.3, "make_report": 4,
    "one file": 60,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What became of one fault."""

    stage: str
    fault: str
    seed: int
    injected: bool  # the process reached the point at which the fault waited
    survived: bool
    lost: int  # results that were not what they are without the fault
    seconds: float
    problem: str


class LostError(AssertionError):
    """A fault was not survived."""


class Campaign:
    """The undisturbed study, and faults against copies of it."""

    def __init__(self, folder: Path, without: Sequence[str] = ()) -> None:
        self.folder = folder
        stages = [stage for stage in STAGES if stage not in without]
        self.whole = Study(folder / "whole")
        self.whole.root.mkdir()
        self.whole.make()
        self.changes: dict[str, dict[str, int]] = {}
        for stage in stages:
            ended = self.whole.run(stage)
            assert ended.code == 0, f"{stage}: {ended.output}"
            self.changes[stage] = ended.changes
            if stage == "train_run":  # what evaluation forgets, faults of the hand-over need
                shutil.copytree(self.whole.root / self.whole.paths()["work"], folder / "work")
        self.expected = {stage: content(self.whole, stage) for stage in stages}

    def strike(self, seed: int, only: str | None = None) -> Row:
        """Make the fault of a seed, and see whether it is survived."""
        rng = random.Random(seed)
        stage = only or rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if stage == "one file":
            return interrupt_write(seed, rng, self.folder / f"file-{seed}")
        kinds: list[Callable[[str, random.Random, Study], tuple[str, bool]]] = [
            self._kill,
            self._kill,
            self._disk,
            self._disk,
        ]
        kinds.append(self._clock)
        if stage in DAMAGEABLE:
            kinds.append(self._damage)
        if stage == "train_run":
            kinds += [self._damage_checkpoint, self._damage_kept, self._diverge]
        how = rng.choice(kinds)
        study = self.whole.copy(self.folder / f"fault-{seed}")
        started, problem, lost, name, injected = time.perf_counter(), "", 0, how.__name__.strip("_"), True
        try:
            remove(study, stage)
            name, injected = how(stage, rng, study)
            found = content(study, stage)
            lost = sum(found.get(key) != value for key, value in self.expected[stage].items())
            if lost:
                differing = [key for key, value in self.expected[stage].items() if found.get(key) != value]
                raise LostError(f"differs in {', '.join(differing)[:300]}")
            if left := left_behind(study):
                raise LostError(f"left behind: {', '.join(left)}")
        except LostError as error:
            problem = str(error)
        if strays := stray_processes():
            problem = problem or f"stray processes: {strays}"
        shutil.rmtree(study.root)
        return Row(stage, name, seed, injected, not problem, lost, round(time.perf_counter() - started, 2), problem)

    # --- faults ---------------------------------------------------------------------------------------------

    def _kill(self, stage: str, rng: random.Random, study: Study) -> tuple[str, bool]:
        """SIGKILL to the stage, or to its worker, before one of its changes of files."""
        fault = self._place(stage, "killed", rng)
        ended = study.run(stage, fault)
        if fault.where == "worker" and ended.code == 0:  # the run has an outcome, which says so: repeat it by hand
            self._expect_failed_result(stage, study, "SIGKILL")
            remove(study, stage, work=True)
        elif ended.code not in (-9, 0, 1):
            raise LostError(f"exit code {ended.code}: {ended.output[-300:]}")
        if ended.code != 0 and rng.random() < 0.5:
            remove(study, stage)  # Snakemake removes the outputs of a failed job, unless it was killed with it
        self._again(stage, study)
        return f"kill {fault.where}", ended.code != 0 or fault.where == "worker"

    def _disk(self, stage: str, rng: random.Random, study: Study) -> tuple[str, bool]:
        """A disk that is full, read-only, over quota or broken from one change of a file on."""
        how = rng.choice(DISKS)
        fault = self._place(stage, how, rng)
        ended = study.run(stage, fault)
        if ended.code == 0:
            # struck after its last write that matters, or too early to say more than an exit code
            remove(study, stage, work=stage == "train_run")
        elif ended.code != 1:
            raise LostError(f"exit code {ended.code}: {ended.output[-300:]}")
        else:
            self._expect_words(ended.output, os.strerror(getattr(errno, how)))
        self._again(stage, study)
        return f"disk {how} {fault.where}", ended.code != 0 or fault.where == "worker"

    def _clock(self, stage: str, rng: random.Random, study: Study) -> tuple[str, bool]:
        """A clock that is set, by minutes or years, forwards or backwards, while the stage runs: it does not matter."""
        seconds = rng.choice([-1, 1]) * rng.choice([90, 3600, 86_400, 3 * 365 * 86_400])
        fault = self._place(stage, f"clock {seconds}", rng)
        ended = study.run(stage, fault)
        if ended.code != 0:
            raise LostError(f"clock set by {seconds} s: {ended.output[-300:]}")
        return f"clock {fault.where}", True

    def _damage(self, stage: str, rng: random.Random, study: Study) -> tuple[str, bool]:
        """An input that is changed, cut, emptied or gone is refused by name and set aside; then it is made anew."""
        place = rng.choice(DAMAGEABLE[stage])
        folder = study.root / study.paths()[place]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        files = [path for path in files if stage not in READ or READ[stage].search(path.name)]
        file = rng.choice(files)
        how = damage(file, rng)
        ended = study.run(stage)
        if stage == "make_tables":
            tables = study.root / "results" / "small" / "tables"
            text = "".join((tables / f"{name}.csv").read_text() for name in ("runs", "gates") if ended.code == 0)
            if ended.code != 0 or file.name not in text.replace('""', '"'):
                raise LostError(f"{file.name} {how}, and the table does not say so: {ended.output[-200:]}")
        elif ended.code == 0:
            raise LostError(f"{place}/{file.name} {how} was used")
        else:
            self._expect_words(ended.output, file.name)
        heal(self.whole, study, place)
        self._again(stage, study)
        return f"damage {place} ({how})", True

    def _damage_checkpoint(self, stage: str, rng: random.Random, study: Study) -> tuple[str, bool]:
        """A checkpoint that is damaged after a kill is set aside, and training begins anew."""
        remove(study, stage, work=True)
        asleep = kill_after_checkpoint(study, stage)
        files = checkpoints(study)
        if not asleep or not files:
            raise LostError("no checkpoint to damage")
        file = rng.choice(files)
        how = damage(file, rng)
        ended = self._again(stage, study)
        gone = how == "gone" and file.name == "manifest.json"
        expected = "no checkpoint" if gone else "is damaged: set aside"
        if expected not in ended:
            raise LostError(f"{file.name} {how}: {ended[-300:]}")
        return f"damage checkpoint ({how})", True

    def _damage_kept(self, stage: str, rng: random.Random, study: Study) -> tuple[str, bool]:
        """Kept results of a finished run, of which one is damaged before they are handed over again."""
        work = study.root / study.paths()["work"]
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.folder / "work", work)
        file = rng.choice(sorted(path for path in (work / "finished").rglob("*") if path.is_file()))
        how = damage(file, rng)
        said = self._again(stage, study)
        if file.name != "key.json" and "changed after they were written" not in said:
            raise LostError(f"{file.name} {how}: {said[-300:]}")
        return f"damage kept results ({how})", True

    def _diverge(self, stage: str, rng: random.Random, study: Study) -> tuple[str, bool]:
        """A loss that is NaN, or gradients that explode, end the run as invalid with a reason."""
        step, how = rng.randrange(6), rng.choice(["NaN loss", "infinite loss", "exploding gradients"])
        ended = study.run(stage, None, _spoil_loss(step, how))
        outcome = json.loads((study.root / study.paths()["run"] / "outcome.json").read_text())
        if ended.code != 0 or outcome["outcome"] != "invalid":
            raise LostError(f"{how} at step {step}: {outcome['outcome']}: {outcome['reason']} {ended.output[-200:]}")
        words = ("finite at", "finite_loss") if how.startswith("exploding") else (str(step),)
        if not any(word in outcome["reason"] for word in words):
            raise LostError(f"{how}: nothing of it in {outcome['reason']}")
        remove(study, stage, work=True)
        self._again(stage, study)
        return how, True

    # --- parts ----------------------------------------------------------------------------------------------

    def _place(self, stage: str, how: str, rng: random.Random) -> Fault:
        where = rng.choice(["stage", "worker"]) if stage in WITH_WORKERS else "stage"
        return Fault(how, rng.randrange(self.changes[stage][where]), where)

    def _again(self, stage: str, study: Study) -> str:
        ended = study.run(stage)
        if ended.code != 0:
            raise LostError(f"the rerun ends with {ended.code}: {ended.output[-400:]}")
        return ended.output

    def _expect_words(self, output: str, words: str) -> None:
        if words not in output or "Traceback" in output.split("error: ")[-1]:
            raise LostError(f"the message does not say {words!r}: {output[-300:]}")

    def _expect_failed_result(self, stage: str, study: Study, words: str) -> None:
        """A worker that dies leaves a result that says so, where there is one at all."""
        names = {"train_run": "run/outcome.json", "evaluate_run": "evaluation/evaluation.json"}
        folder, file = names.get(stage, "capture/capture.json").split("/")
        result = json.loads((study.root / study.paths()[folder] / file).read_text())
        if result["outcome"] != "ok" and words not in (result["reason"] or ""):
            raise LostError(f"{file} does not say {words!r}: {result['reason']}")


# What each stage reads, by the names of Study.paths().
DAMAGEABLE = {
    "tokenize_dataset": ["dataset"],
    "train_run": ["model", "tokens"],
    "evaluate_run": ["model", "tokens", "run"],
    "make_tables": ["evaluation", "run"],
    "extract_facts": ["capture"],
}


# What some stages read of it; damage to the rest is for others to find.
READ = {
    "evaluate_run": re.compile(r"^(?!steps\.csv$)"),
    "make_tables": re.compile(r"^(outcome|evaluation)\.json$|^steps\.csv$|^predictions\.jsonl$"),
    "extract_facts": re.compile(r"^capture\.json$|^trace\."),
}


def damage(file: Path, rng: random.Random) -> str:
    """Change a file in one of four ways; returns which."""
    data = bytearray(file.read_bytes())
    how = rng.choice(["one bit", "cut", "emptied", "gone"]) if data else "gone"
    if how == "one bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[rng.randrange(len(data)) :]
    elif how == "emptied":
        data.clear()
    file.unlink()
    if how != "gone":
        file.write_bytes(data)
    return how


def heal(whole: Study, study: Study, place: str) -> None:
    """What the workflow does about an input that was set aside: the stage before makes it anew."""
    folder = study.root / study.paths()[place]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole.root / whole.paths()[place], folder)


def remove(study: Study, stage: str, *, work: bool = False) -> None:
    """Remove the outputs of a stage, as Snakemake does with those of a failed job."""
    for output in study.outputs(stage):
        path = study.root / output
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if work:
        finished.forget(study.root / study.paths()["work"])  # as `tunemap retry` does: the checkpoint stays


def checkpoints(study: Study) -> list[Path]:
    """The files of the run's checkpoint."""
    folder = study.root / study.paths()["work"] / "checkpoint"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def left_behind(study: Study) -> list[str]:
    """Temporary files below results; what a finished run keeps for the next rule is none."""
    found = (path for path in (study.root / "results").rglob("*") if LEFT_BEHIND.search(path.name))
    work = study.root / "results" / "small" / "unfinished"
    return [str(path.relative_to(study.root)) for path in found if path != work]


def interrupt_write(seed: int, rng: random.Random, folder: Path) -> Row:
    """Kill a process while it replaces a file: the old content or the new is there, and the next write tidies up."""
    started, problem = time.perf_counter(), ""
    folder.mkdir()
    path, name = folder / "result.json", rng.choice(["kill at a change", "kill at a time", "disk ENOSPC"])
    old, new, last = ({"version": version, "filling": "x" * rng.randrange(1, 3_000_000)} for version in range(3))
    write_sealed(path, old)
    at, delay_s = rng.randrange(6), rng.random() * 0.02
    pid = os.fork()
    if pid == 0:
        _write_and_be_struck(name, at, path, new)
    if name == "kill at a time":
        time.sleep(delay_s)
        os.kill(pid, 9)
    _, status = os.waitpid(pid, 0)
    try:
        found = read_sealed(path)["version"]
        if found not in (0, 1) or (os.waitstatus_to_exitcode(status) == 0 and found != 1):
            problem = f"version {found}"
        write_sealed(path, last)
    except UserError as error:
        problem = str(error)
    if left := [one.name for one in folder.iterdir() if one != path]:
        problem = problem or f"left behind: {left}"
    lost = int(not problem.startswith("left") and bool(problem))
    shutil.rmtree(folder)
    seconds = round(time.perf_counter() - started, 3)
    return Row("one file", name, seed, os.waitstatus_to_exitcode(status) != 0, not problem, lost, seconds, problem)


def _write_and_be_struck(name: str, at: int, path: Path, value: dict[str, Any]) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.chmod", "fcntl.flock", "os.remove"):
            seen += 1
            if seen > at and name == "kill at a change":
                os.kill(os.getpid(), 9)
            if seen > at and event == "open" and name == "disk ENOSPC":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    sys.addaudithook(hook)
    try:
        write_sealed(path, value)
    except OSError:
        os._exit(1)
    os._exit(0)


# --- what must be equal -------------------------------------------------------------------------------------


def content(study: Study, stage: str) -> dict[str, Any]:
    """What a stage made, by file, without times."""
    found: dict[str, Any] = {}
    for output in study.outputs(stage):
        path = study.root / output
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and not (stage == "capture_run" and file.name.startswith(("trace.", "capture.rank"))):
                found[str(file.relative_to(study.root))] = content_of(file)
    return found


def content_of(file: Path) -> Any:
    """What a file says, without times; of one that holds none, its checksum."""
    if file.name == "steps.csv":
        rows = list(csv.DictReader(io.StringIO(file.read_text())))
        return [[row[name] for name in STEPS_COMPARED] for row in rows]
    if file.name in ("outcome.json", "evaluation.json", "capture.json"):
        return _untimed(json.loads(file.read_text()))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _untimed(value: Any) -> Any:
    """Nested values without what a clock or a machine says."""
    if isinstance(value, dict):
        skipped = ("started_at", "gates", "facts", "steps_sha256", "measured_steps", "padding")
        return {
            key: _untimed(inner) for key, inner in value.items() if key not in skipped and not TIMED.search(key)
        }  # measured_steps: the first step after a resumption is not measured
    if isinstance(value, list):
        return [_untimed(inner) for inner in value]
    return None if isinstance(value, float) else value


# --- inside of a worker -------------------------------------------------------------------------------------


def _spoil_loss(step: int, how: str) -> Callable[[], None]:
    factor = {"NaN loss": float("nan"), "infinite loss": float("inf"), "exploding gradients": 1e37}[how]

    def spoil() -> None:
        _at_forward(step, lambda loss: loss * factor)

    return spoil


def _at_forward(step: int, change: Callable[[Any], Any]) -> None:
    from tunemap.training import loop

    original, calls = loop.loss_sum, iter(range(10**9))

    def changed(*arguments: Any) -> Any:
        loss = original(*arguments)
        return change(loss) if next(calls) == step else loss

    loop.loss_sum = changed


def kill_after_checkpoint(study: Study, stage: str) -> bool:
    """Kill worker and launcher with a checkpoint on disk, whatever point that is."""
    pid = os.fork()
    if pid == 0:
        study.run(stage, None, _sleep_at_step(5))
        os._exit(0)
    deadline = time.monotonic() + 60
    while not (study.root / study.paths()["work"] / "asleep").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    import psutil

    processes = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    for process in processes:
        process.kill()
    os.waitpid(pid, 0)
    asleep = study.root / study.paths()["work"] / "asleep"
    existed = asleep.exists()
    asleep.unlink(missing_ok=True)
    return existed


def _sleep_at_step(step: int) -> Callable[[], None]:
    def spoil() -> None:
        def sleep(loss: Any) -> Any:
            work = sys.argv[sys.argv.index("--work") + 1]
            (Path(work) / "asleep").touch()
            time.sleep(60)
            return loss

        _at_forward(step, sleep)

    return spoil


# --- command line -------------------------------------------------------------------------------------------


def run(seeds: range, *, minutes: float = 1e9, only: str | None = None) -> Iterator[Row]:
    """Strike once per seed, until the time is over."""
    preload()
    adopt_orphans()
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder))
        for seed in seeds:
            if time.monotonic() > deadline:
                return
            yield campaign.strike(seed, only)


def main() -> int:
    """Run the campaign of the command line, print its table, and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop then, however many faults are left")
    parser.add_argument("--stage", choices=list(WEIGHTS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    started, rows = time.monotonic(), []
    first = arguments.seed * 1_000_000
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in run(range(first, first + arguments.faults), minutes=arguments.minutes, only=arguments.stage):
            rows.append(row)
            writer.writerow(asdict(row))
            file.flush()
            if row.problem:
                print(f"seed {row.seed}: {row.stage}: {row.fault}: {row.problem}", flush=True)
    seconds = time.monotonic() - started
    by_stage = sums_by(map(asdict, rows), "stage", ("injected", "survived", "lost"))
    print(f"seed {arguments.seed}, {seconds:.0f} s")
    print(f"{'stage':18}{'faults':>8}{'injected':>10}{'survived':>10}{'lost':>6}")
    for stage in (one for one in (*STAGES, "one file", "all") if one in by_stage):
        cells = zip(by_stage[stage].values(), (8, 10, 10, 6), strict=True)
        print(f"{stage:18}" + "".join(f"{count:>{width}}" for count, width in cells))
    record(arguments.output, seed=arguments.seed, seconds=seconds, sums={"by_stage": by_stage})
    kinds = Counter(re.sub(r" \(.*| (stage|worker)$", "", row.fault) for row in rows)
    print("by fault: " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
    return 0 if all(row.survived for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
