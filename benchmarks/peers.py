"""Training throughput side by side with what people use today, at equal settings.

    make peers-install                               # once: each peer in an environment of its own, from PyPI
    python benchmarks/peers.py                       # CPU; about an hour; prints the table
    python benchmarks/peers.py --peers trl --sizes small --rounds 5 --output benchmarks/results/peers-cpu.json
    python benchmarks/peers.py --device cuda --minutes 5 --output benchmarks/results/peers-cuda.json

Everybody trains the same model with the same optimizer settings, dtype and number of threads; every row is as long as
every other, so no padding and no way to count tokens can blur the comparison. The Trainer and TRL have our rows and
labels in our order; optimum-benchmark makes random rows of its own, PEFT's loop learns the tokens of the prompt too.
Each is started as its users start it: our launcher sets two variables of the allocator, which `--our-allocator` gives
to everybody, to show what of the difference they are. A peer that is not installed is one that did not run; the others
race.
On a CPU all train at the same time, in turns of a few steps: one runs while the others rest, so that a machine that is
slower for a minute is slower for all. On a GPU, whose memory they could not share, one trains after the other; nobody
sees a second GPU. A stopwatch of ours takes the time. A round starts everybody anew; its ratio is the median of those
of turns that followed each other, and the interval is a t interval of its logarithm over the rounds. What a contestant
calls its own throughput is compared with the stopwatch of the same run, in a round without rests. Every method has its
first round before one has its second, and the output is written after each, so that a limit leaves something of each.
MFU is the mathematics' FLOPs (those of frozen weights' gradients left out) beside what a matrix product reaches on
this device, measured at the start. Losses are compared where the data are the same: equal work, or no comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from contestants.workload import Workload
from paired import TimeLimit, in_own_process, mean_of_rounds, shown, time_left
from race import CONTESTANTS, OWN, RECOMMENDED, install, one_gpu, orders, race
from transformers import AutoConfig

from tunemap import corpora, models
from tunemap.config import DatasetConfig, Factors, LocalModel, RandomModel
from tunemap.data import sources, tokens
from tunemap.distributed.world import World
from tunemap.files import write_json
from tunemap.measure.ceiling import measure_ceiling
from tunemap.measure.environment import environment
from tunemap.measure.flops import Trained, model_shape, step_flops
from tunemap.run import Run
from tunemap.training.batches import micro_batches, schedule_of

HERE = Path(__file__).resolve().parent


def architecture(hidden: int, layers: int, vocabulary: int, **others: Any) -> dict[str, Any]:
    """config.json of a Qwen2 of that size."""
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    } | others


def published(hidden: int, layers: int, intermediate: int, key_value_heads: int, **others: Any) -> dict[str, Any]:
    """config.json of a Qwen2.5 as its makers publish it, in bfloat16; the weights are drawn here."""
    sizes = {"intermediate_size": intermediate, "num_key_value_heads": key_value_heads, "rope_theta": 1000000.0}
    heads = {"num_attention_heads": hidden // (64 if hidden < 1000 else 128), "max_position_embeddings": 32768}
    return architecture(hidden, layers, 151936, **sizes, **heads, dtype="bfloat16", **others)


@dataclass(frozen=True)
class Size:
    """An architecture, and what a step of it trains on."""

    config: dict[str, Any]
    rows: int
    length: int
    dtype: str = "float32"


SIZES = {
    "cpu": {  # about 1, 5 and 25 million parameters
        "small": Size(architecture(128, 4, 8192), 8, 64),
        "medium": Size(architecture(256, 6, 8192), 4, 128),
        "large": Size(architecture(512, 8, 8192), 4, 128),
    },
    "cuda": {
        "qwen2.5-0.5b": Size(published(896, 24, 4864, 2), 8, 2048, "bfloat16"),
        "qwen2.5-1.5b": Size(published(1536, 28, 8960, 2), 4, 2048, "bfloat16"),
        "qwen2.5-7b": Size(
            published(3584, 28, 18944, 4, vocab_size=152064, tie_word_embeddings=False), 2, 2048, "bfloat16"
        ),
    },
}
# What we would change of the equal settings for speed alone. Rows here are all full and all labels, which leaves a CPU
# nothing to gain; benchmarks/waterfall.py has rows as they are.
RECOMMENDATIONS: dict[str, dict[str, Any]] = {"cuda": {"logits": "label_tokens", "compile": True}}
TURNS = {"cpu": 15, "cuda": 1}
AGREED = ("steps", "turns", "threads", "our_allocator_for_all")  # by all rows of a table
PRECISIONS = {"float32": "fp32", "bfloat16": "pure_bf16"}  # of a dtype, in the words of a study


def run_of(work: Workload) -> Run:
    """The workload as a run, without a checkpoint before its end, which nobody else keeps.

    One a minute, as by default, would fall into our turns alone: the minute goes on while we rest.
    """
    lora = {"kind": "lora", "rank": work.lora_rank, "alpha": work.lora_alpha}
    return Run.model_validate(
        {
            "id": "peers",
            "model_name": work.size,
            "model": LocalModel(source="local", path="model"),
            "dataset_name": "rows",
            "dataset": DatasetConfig(task="generation", source="local", path="dataset", accept_truncation=True),
            "method_name": work.method,
            "method": lora if work.method == "lora" else {"kind": "full"},
            "prompt_template": None,
            "factors": Factors(
                per_device_batch_size=work.rows,
                max_length=work.length,
                max_steps=work.steps,
                checkpoint_steps=work.steps,
                epochs=None,
                precision=PRECISIONS[work.dtype],
                learning_rate=work.learning_rate,
                schedule="constant",
                threads_per_process=work.threads,
                measurement_warmup_steps=min(5, work.steps // 4),
            ),
        }
    )


def prepare(folder: Path, work: Workload) -> None:
    """Make model, rows and batches of a workload in `folder`, the same for all its methods.

    One thread draws the weights, however many there are: a billion of them takes a CPU about twenty seconds.
    """
    (folder / "architecture").mkdir(parents=True)
    (folder / "architecture" / "config.json").write_text(json.dumps(SIZES[work.device][work.size].config))
    corpora.build_arithmetic_tokenizer().save_pretrained(folder / "tokenizer")
    model = RandomModel(source="random", config="architecture", tokenizer="tokenizer")
    models.prepare(model, folder / "model", data_root=folder)
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"{a} plus {b} is", "answer": " ".join(map(str, rng.integers(0, 10, 2 * work.length)))}
        for a, b in rng.integers(0, 100, (work.steps * work.rows, 2))
    ]
    for name, some in (("train", rows), ("test", [{"prompt": "what is one and one", "answer": "2"}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    dataset = DatasetConfig(
        task="generation",
        source="file",
        train_file="train.jsonl",
        test_file="test.jsonl",
        prompt_field="prompt",
        answer_field="answer",
    )
    sources.prepare(dataset, folder / "dataset", data_root=folder)
    tokens.tokenize(
        folder / "dataset",
        folder / "model",
        folder / "tokens",
        max_length=work.length,
        prompt_template=None,
        system_prompt=None,
    )
    tokenized = tokens.load_tokens(folder / "tokens")
    world = World(0, 1, torch.device("cpu"))
    schedule = schedule_of(run_of(work).factors, tokenized, world)
    batches = list(micro_batches(tokenized, schedule, world, first_step=0))
    ids = np.stack([batch.inputs["input_ids"].numpy() for batch in batches])
    assert ids.shape == (work.steps, work.rows, work.length), "a row is shorter than the workload's length"
    ours = np.stack([batch.labels.numpy() for batch in batches])  # the next token at each place
    theirs = np.concatenate([np.full_like(ours[..., :1], -100), ours[..., :-1]], axis=-1)  # the token at each place
    np.savez(folder / "batches.npz", input_ids=ids, labels=theirs)


def settle(folder: Path, prepared: Path, work: Workload) -> None:
    """Make in `folder` the workload by one method, with what was `prepared` for all of them."""
    folder.mkdir(parents=True)
    for name in ("model", "dataset", "tokens", "batches.npz"):
        (folder / name).symlink_to(prepared / name)
    run = run_of(work)
    write_json(folder / "run.json", run.training_spec())
    if work.device in RECOMMENDATIONS:
        factors = run.factors.model_copy(update=RECOMMENDATIONS[work.device])
        write_json(folder / "recommended.json", run.model_copy(update={"factors": factors}).training_spec())
    work.save(folder)


def ceilings_flops_per_s(device: str, dtypes: list[str], threads: int) -> dict[str, float]:
    """The matmul ceiling of each dtype."""
    torch.set_num_threads(threads)
    return {dtype: measure_ceiling(device, dtype).flops_per_s for dtype in dtypes}


@contextmanager
def prepared(works: list[Workload]) -> Iterator[list[Path]]:
    """A folder for each of some workloads that differ by their method alone; model and rows are made once."""
    with tempfile.TemporaryDirectory() as scratch:
        common, folders = Path(scratch) / "prepared", [Path(scratch) / work.method for work in works]
        prepare(common, works[0])
        for folder, work in zip(folders, works, strict=True):
            settle(folder, common, work)
        yield folders


def flops_per_token(folder: Path, work: Workload) -> float:
    """FLOPs that the mathematics of a training step need for each token."""
    shape = model_shape(AutoConfig.from_pretrained(folder / "model"))
    adapted = {layer.name: work.lora_rank for layer in shape.linears if layer not in shape.head}
    trained = Trained(everything=True) if work.method == "full" else Trained(ranks=adapted)
    return step_flops(shape, trained, [(work.rows, work.length)]).model_flops / work.tokens_per_step


def compare(
    folder: Path, names: list[str], environments: Path, rounds: int, *, everywhere: bool
) -> Iterator[dict[str, Any]]:
    """All contestants on one workload, without rests, then `rounds` times in turns: what is known after each round.

    Who fails without rests does not race on; without us there is no race.
    """
    work = Workload.load(folder)
    replace(work, turns=1).save(folder)
    alone = race(names, folder, environments, everywhere=everywhere)
    for name, one in alone.items():
        print(f"    without rests  {name:18s} {_rate(one)}", flush=True)
    work.save(folder)
    results = [alone] if work.turns == 1 else []
    running = [name for name in names if "error" not in alone[name]]
    if results or OWN not in running:
        yield {name: _summary(name, alone, results) for name in names}
    if OWN not in running:
        return
    for order in orders(running, rounds - len(results)):
        results.append(race(order, folder, environments, everywhere=everywhere))
        for name in running:
            print(f"    round {len(results)}/{rounds}  {name:18s} {_rate(results[-1][name])}", flush=True)
        yield {name: _summary(name, alone, results) for name in names}


def _rate(result: dict[str, Any]) -> str:
    return f"{result['tokens_per_second']:9.0f} tokens/s" if "error" not in result else str(result["error"])


def _summary(name: str, alone: dict[str, dict[str, Any]], rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    if failed := [alone[who]["error"] for who in (name, OWN) if "error" in alone[who]]:
        return {"error": failed[0]}
    theirs, ours = ([results[who] for results in rounds] for who in (name, OWN))
    if failed := [run["error"] for run in [*theirs, *ours] if "error" in run]:
        return {"error": failed[0]}
    apart = None
    if CONTESTANTS[name].same_labels:
        mine, other = np.mean(ours[0]["losses"]), np.mean(theirs[0]["losses"])
        apart = float(abs(mine - other) / abs(other))
    return {
        "tokens_per_second": float(np.median(_values(theirs, "tokens_per_second"))),
        "own_tokens_per_second_to_measured": alone[name]["own_tokens_per_second"] / alone[name]["tokens_per_second"],
        "ratio": ratio_of_turns(_values(theirs, "wall_s"), _values(ours, "wall_s")),
        "cpu_time_ratio": ratio_of_turns(_values(theirs, "cpu_s"), _values(ours, "cpu_s")),
        "mean_loss_relative_difference": apart,
        "peak_allocated_bytes": theirs[0]["peak_allocated_bytes"],
        "versions": theirs[0]["versions"],
        "rounds": len(theirs),
    }


def _values(runs: list[dict[str, Any]], name: str) -> list[Any]:
    return [run[name] for run in runs]


def ratio_of_turns(
    above: list[npt.NDArray[np.float64]], below: list[npt.NDArray[np.float64]]
) -> dict[str, float | None]:
    """Geometric mean over the rounds of the median ratio of turns that followed each other, with its interval."""
    medians = [float(np.median(one / other)) for one, other in zip(above, below, strict=True)]
    return mean_of_rounds(medians)


def main() -> None:
    """Read the command line, race, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="make the peers' environments, then stop")
    parser.add_argument("--environments", type=Path, default=HERE / "environments", help="where they are")
    parser.add_argument("--peers", nargs="+", choices=list(CONTESTANTS)[2:], default=list(CONTESTANTS)[2:])
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--sizes", nargs="+", help=f"some of {', '.join(name for of in SIZES.values() for name in of)}")
    parser.add_argument("--methods", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="begin no round that is not done in so many (default: no limit)")
    parser.add_argument("--steps", type=int, default=40, help="a quarter of them is warm-up (default: %(default)s)")
    parser.add_argument("--turns", type=int, help=f"of a round, dividing what is not warm-up (default: {TURNS})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--our-allocator", action="store_true", help="let everybody keep freed memory, as our launcher's workers do"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="json file to keep the results in, with what it has of other sizes at the same settings",
    )
    parser.add_argument("--note", help="what a reader of the results must know of their making; kept with them")
    arguments = parser.parse_args()
    names = [OWN, *([RECOMMENDED] if arguments.device in RECOMMENDATIONS else []), *arguments.peers]
    if arguments.install:
        return install(arguments.environments, names)
    sizes = SIZES[arguments.device]
    turns = TURNS[arguments.device] if arguments.turns is None else arguments.turns
    if (arguments.steps - arguments.steps // 4) % turns:
        parser.error(f"--turns {turns}: does not divide the {arguments.steps - arguments.steps // 4} steps that count")
    if unknown := set(arguments.sizes or ()) - set(sizes):
        parser.error(f"--sizes {' '.join(sorted(unknown))}: on {arguments.device} there are {', '.join(sizes)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # leave no contestant resting for ever
    torch.set_num_threads(arguments.threads)
    limit = TimeLimit(arguments.minutes)
    if arguments.device == "cuda":
        os.environ.update(one_gpu(os.environ))  # the ceiling and the description are of the GPU that is raced on
    dtypes = sorted({size.dtype for size in sizes.values()})
    # In a process of its own: a context on the GPU and torch's cached matrices would stay there during the race.
    ceilings = in_own_process(ceilings_flops_per_s, arguments.device, dtypes, arguments.threads)
    described = environment(HERE.parent).as_dict()
    known = {"note": arguments.note, "environment": described}
    table: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name in arguments.sizes or sizes:
        if not limit.another():
            print(f"no time for {name}")
            break
        size = sizes[name]
        shape = (arguments.steps, size.rows, size.length)
        machine = (arguments.threads, arguments.device, size.dtype)
        works = [Workload(name, method, *shape, 1e-4, 16, 32, *machine, turns) for method in arguments.methods]
        for work, rows in measure(works, names, arguments, ceilings[size.dtype], limit):
            table[name, work.method] = rows
            if arguments.output:  # at once: the rest takes long, and may not come to its end
                kept = with_kept_rows(arguments.output, list(chain(*table.values())), described)
                write_json(arguments.output, {"rows": kept} | known)
    show(list(chain(*table.values())))
    return None


def with_kept_rows(output: Path, table: list[dict[str, Any]], machine: dict[str, Any]) -> list[dict[str, Any]]:
    """The table and, from an earlier output, the sizes and methods that it has not, if they can stand beside it.

    They can if the same `machine` measured them, and raced with the same settings.
    """
    if not output.exists():
        return table
    earlier = json.loads(output.read_text())
    before, now = map(_in_words, (earlier["environment"], machine))
    if before != now:
        print(f"{output} was measured by {before}, this is {now}: its rows are not kept", file=sys.stderr)
        return table
    order = {(size, method): at for at, (size, method) in enumerate(product(chain(*SIZES.values()), ("full", "lora")))}
    raced = {(row["size"], row["method"]) for row in table}
    others = [row for row in earlier["rows"] if (row["size"], row["method"]) not in raced]
    settings = {name: table[0][name] for name in AGREED}
    kept = [row for row in others if {name: row.get(name) for name in AGREED} == settings]
    if left_out := sorted({f"{row['size']}, {row['method']}" for row in others if row not in kept}):
        said = ", ".join(f"{name} {value}" for name, value in settings.items())
        print(f"{output}: not raced with {said}, and not kept: {'; '.join(left_out)}", file=sys.stderr)
    return sorted([*kept, *table], key=lambda row: order[row["size"], row["method"]])


def _in_words(machine: dict[str, Any]) -> str:
    """What decides the speed of a machine: its GPUs, its CPU, its torch."""
    gpus = [gpu["name"] for gpu in machine["gpus"]]
    return ", ".join([*gpus, machine["cpu"]["model"], f"torch {machine['packages']['torch']}"])


def measure(
    works: list[Workload],
    names: list[str],
    arguments: argparse.Namespace,
    ceiling_flops_per_s: float,
    limit: TimeLimit,
) -> Iterator[tuple[Workload, list[dict[str, Any]]]]:
    """Rows of the table for workloads that differ by their method alone, of one after each of its rounds.

    Every method has its first round before one has its second, so that a limit leaves something of each.
    """
    place, rounds = arguments.environments.resolve(), arguments.rounds
    with prepared(works) as folders:
        races = [compare(folder, names, place, rounds, everywhere=arguments.our_allocator) for folder in folders]
        parts = list(zip(works, folders, races, strict=True)) * rounds
        began = time.perf_counter()
        for done, (work, folder, raced) in enumerate(parts, start=1):
            if not limit.another():
                print(f"no time for {len(parts) + 1 - done} more rounds of {work.size}")
                return
            print(f"{work.size}, {work.method}", flush=True)
            found = next(raced, None)
            if found is None:  # we failed, and nobody is left to race against
                continue
            flops = flops_per_token(folder, work)
            setting = settings_of(work, ceiling_flops_per_s, everywhere=arguments.our_allocator)
            yield work, [_row(work, name, one, setting, flops) for name, one in found.items()]
            print(f"    {time_left(began, done, len(parts))} for this size", flush=True)


def settings_of(work: Workload, ceiling_flops_per_s: float, *, everywhere: bool) -> dict[str, Any]:
    """What a row was raced with, and the ceiling of its MFU; whoever has the same but the ceiling may be beside it."""
    settings = {"steps": work.steps, "turns": work.turns, "threads": work.threads, "our_allocator_for_all": everywhere}
    return settings | {"ceiling_flops_per_s": ceiling_flops_per_s}


def _row(
    work: Workload, name: str, found: dict[str, Any], settings: dict[str, Any], flops_of_a_token: float
) -> dict[str, Any]:
    """One contestant's."""
    row = {"size": work.size, "method": work.method, "contestant": name, **found, **settings}
    if "error" not in found:
        row["mfu"] = found["tokens_per_second"] * flops_of_a_token / settings["ceiling_flops_per_s"]
    return row


def show(table: list[dict[str, Any]]) -> None:
    """Print the table; a ratio over 1 says that TuneMap is faster."""
    columns = f"{'size':12s} {'method':6s} {'contestant':20s} {'tokens/s':>9s} {'its own':>7s} {'MFU':>5s}"
    print(f"\n{columns}  {'ours / its':21s}  {'in CPU time':21s}  loss apart")
    for row in table:
        start = f"{row['size']:12s} {row['method']:6s} {row['contestant']:20s}"
        if "error" in row:
            print(f"{start} did not run: {row['error']}")
            continue
        apart = "" if (loss := row["mean_loss_relative_difference"]) is None else f"{loss:.1e}"
        wall, cpu = (shown(row[name]) for name in ("ratio", "cpu_time_ratio"))
        own = row["own_tokens_per_second_to_measured"]
        rates = f"{row['tokens_per_second']:9.0f} {own:6.2f}x {row['mfu']:5.0%}"
        print(f"{start} {rates}  {wall:21s}  {cpu:21s}  {apart}")


if __name__ == "__main__":
    main()
