"""The processes of a run without torchrun, forked as tests/forked tells.

What runs in them is the worker that the launcher starts, with the variables that torchrun would set. A world of
processes stays from run to run, because what torch does once in a process takes longer than a tiny run. Where a rank
shall die, its processes are new.
"""

import faulthandler
import gc
import json
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from tests.forked import fork
from tunemap.config import DatasetConfig, Factors, RandomModel
from tunemap.run import Run
from tunemap.training import finished, steps
from tunemap.training.launch import Paths

ARCHITECTURE = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
MODEL = RandomModel(source="random", config="config.json", tokenizer="tokenizer", seed=1)
DATASET = DatasetConfig(task="arithmetic", source="made", train_rows=64, test_rows=8)
METHODS = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4},
    "qlora": {"kind": "qlora", "rank": 4},
    "gora": {"kind": "gora", "reference_rank": 4, "estimation_batches": 4, "estimation_batch_size": 4},
    "adalora": {"kind": "peft", "type": "ADALORA", "parameters": {"init_r": 4, "target_r": 2}},
}
LEARNING_RATES = {"full": 3e-3, "gora": 1e-3}  # GoRA's B learns 16 times as fast as its A
GLOBAL_BATCH = 8
WAIT_SECONDS = 120


def make_run(
    method: str, strategy: str = "single", world_size: int = 1, parameters: dict[str, Any] | None = None, **factors: Any
) -> Run:
    """A run of six steps on global batches of eight examples, however many processes share them.

    `parameters` are the method's, such as dropout.
    """
    accumulation = factors.get("gradient_accumulation", 1)
    chosen = {
        "strategy": strategy,
        "gpus": world_size,
        "per_device_batch_size": GLOBAL_BATCH // world_size // accumulation,
        "max_length": 128,
        "max_steps": 6,
        "epochs": None,
        "learning_rate": LEARNING_RATES.get(method, 3e-2),
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "logging_steps": 2,
        "measurement_warmup_steps": 1,
    }
    return Run(
        id=f"{method}.{strategy}-{world_size}",
        model_name="small",
        model=MODEL,
        dataset_name="arithmetic",
        dataset=DATASET,
        method_name=method,
        method=METHODS[method] | (parameters or {}),
        prompt_template=None,
        factors=Factors(**(chosen | factors)),
    )


@dataclass(frozen=True)
class Material:
    """Prepared model, rows and tokens."""

    model: Path
    dataset: Path
    tokens: Path


def prepare_material(folder: Path) -> Material:
    """Make the tiny model and its data, in a process of the server."""
    material = Material(folder / "model", folder / "dataset", folder / "tokens")
    process = fork(_prepare, folder, material)
    process.join(WAIT_SECONDS)
    assert process.exitcode == 0
    return material


def _prepare(folder: Path, material: Material) -> None:
    from tunemap import corpora, data, models

    corpora.build_arithmetic_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps(ARCHITECTURE))
    models.prepare(MODEL, material.model, data_root=folder)
    data.sources.prepare(DATASET, material.dataset, data_root=None)
    data.tokens.tokenize(
        material.dataset,
        material.model,
        material.tokens,
        max_length=128,
        prompt_template=None,
        system_prompt=None,
    )


@dataclass(frozen=True)
class Finished:
    """What the processes of a run left behind."""

    work: Path
    weights: Path
    exit_codes: list[int | None]

    @property
    def log(self) -> str:
        """Output of all ranks."""
        return "".join(path.read_text() for path in sorted(self.work.glob("rank*.log")))

    @property
    def result(self) -> dict[str, Any]:
        """result.json of rank 0; fails with the log where there is none."""
        assert (self.work / "result.json").exists(), self.log
        return json.loads((self.work / "result.json").read_text())

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.work.glob("failure.rank*.json"))]

    @property
    def records(self) -> list[steps.StepRecord]:
        return steps.merge(self.work)

    def column(self, name: str, rank: int = 0) -> list[Any]:
        """A column of one rank's step records."""
        assert self.exit_codes == [0] * len(self.exit_codes), self.log
        return [getattr(record, name) for record in self.records if record.rank == rank]


def train(
    run: Run,
    material: Material,
    folder: Path,
    *,
    world_size: int | None = None,
    sabotage: dict[str, Any] | None = None,
) -> Finished:
    """Run the workers of `run` in `folder` to their end; `sabotage` makes one of them fail, in new processes."""
    new = sabotage is not None or world_size is not None
    world_size = world_size or run.factors.gpus
    work, weights = folder / "work", folder / "weights"
    work.mkdir(parents=True, exist_ok=True)
    (work / "run.json").write_text(json.dumps(run.training_spec()))
    arguments = [
        "--run-file",
        str(work / "run.json"),
        "--device",
        "cpu",
        "--work",
        str(work),
        "--weights",
        str(weights),
    ]
    for name in ("model", "dataset", "tokens"):
        arguments += [f"--{name}", str(getattr(material, name))]
    inputs = Paths(**vars(material), work=work, weights=weights, steps=work, outcome=work).inputs
    arguments += ["--checkpoint-identity", finished.checkpoint_identity(run, inputs, device="cpu")]
    if not new:
        return Finished(work, weights, _world(run.factors.strategy != "single", world_size).run(arguments, work))
    processes = []
    for rank, environment in enumerate(_environments(world_size)):
        processes.append(fork(_rank, arguments, environment, work / f"rank{rank}.log", sabotage))
    for process in processes:
        process.join(WAIT_SECONDS)
        process.kill()
        process.join()
    return Finished(work, weights, [process.exitcode for process in processes])


def _environments(world_size: int) -> list[dict[str, int]]:
    """What torchrun would set, by rank."""
    port = free_port()
    return [
        {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port} for rank in range(world_size)
    ]


class _World:
    """Processes that run one worker after the other and stay in one group, as long as none of them fails."""

    def __init__(self, world_size: int) -> None:
        self._members = []
        for environment in _environments(world_size):
            ours, theirs = Pipe()
            fork(_member, theirs, environment)
            self._members.append(ours)

    def run(self, arguments: list[str], work: Path) -> list[int | None]:
        """Exit codes of a worker in each process; None for one that does not end, or not by itself."""
        for rank, member in enumerate(self._members):
            member.send((arguments, work / f"rank{rank}.log"))
        codes = [self._code(member) for member in self._members]
        if any(code != 0 for code in codes):
            _world.cache_clear()
        return codes

    def _code(self, member: Connection) -> int | None:
        try:
            return member.recv() if member.poll(WAIT_SECONDS) else None
        except EOFError:
            return None


@cache
def _world(grouped: bool, world_size: int) -> _World:
    """The world of a size; a run without a group has one of its own."""
    return _World(world_size)


def evaluate(runs: list[Run], weights: list[Path], material: Material, destination: Path) -> list[dict[str, Any]]:
    """Evaluate trained runs in one process of the server, each in as many shares as the run has devices."""
    process = fork(_evaluate, [run.evaluation_spec() for run in runs], weights, material, destination)
    process.join(WAIT_SECONDS)
    assert process.exitcode == 0
    return json.loads(destination.read_text())


def _evaluate(specs: list[dict[str, Any]], weights: list[Path], material: Material, destination: Path) -> None:
    from tunemap.data.tokens import load_tokens
    from tunemap.evaluate import evaluate_share
    from tunemap.predictions import combine

    evaluations = []
    for spec, folder in zip(specs, weights, strict=True):
        run = Run.from_json(json.dumps(spec))
        shares = [
            evaluate_share(
                run, material.model, folder, material.tokens, device="cpu", rank=rank, world_size=run.factors.gpus
            )
            for rank in range(run.factors.gpus)
        ]
        summary, predictions = combine(shares, load_tokens(material.tokens))
        evaluations.append({"n": summary["n"], "outputs": {one.id: one.output for one in predictions}})
    destination.write_text(json.dumps(evaluations))


def fresh(folder: Path) -> Path:
    """The folder, emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _rank(arguments: list[str], environment: dict[str, int], log: Path, sabotage: dict[str, Any] | None) -> None:
    _set_environment(environment)
    if sabotage:
        from tests.distributed.sabotage import sabotage as spoil

        spoil(**sabotage)
    _work(arguments, log)


def _member(orders: Connection, environment: dict[str, int]) -> None:
    """A process of a world: run the workers that are asked for, until the tests end."""
    import torch.distributed as dist

    _set_environment(environment)
    join, original_exit = dist.init_process_group, os._exit
    # torch remembers sharded tensors' layouts with their groups, so the first run's group must serve all.
    dist.init_process_group = lambda *args, **options: None if dist.is_initialized() else join(*args, **options)
    os._exit = _raise_ended
    while True:
        try:
            order = orders.recv()
        except EOFError:
            original_exit(0)
        try:
            _work(*order)
        except _Ended as ended:
            code = ended.code
        faulthandler.cancel_dump_traceback_later()
        gc.collect()  # or a model would live on in the memory of the next run
        orders.send(code)
        if code:
            original_exit(code)  # the group is broken, and the others must notice


class _Ended(BaseException):
    """A worker has called os._exit."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _raise_ended(code: int) -> NoReturn:
    raise _Ended(code)


def _set_environment(environment: dict[str, int]) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _work(arguments: list[str], log: Path) -> None:
    """Be the worker with these arguments, writing to `log`."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(WAIT_SECONDS / 2)  # a rank that hangs says where
    from tunemap.training import worker

    worker._environment = lambda *_: {}  # asks git and the package index for 0.4 s, in vain here
    sys.argv = ["worker", *arguments]
    worker.main()
