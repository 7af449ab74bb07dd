"""Preparing datasets: every source, the choice of rows, test rows kept out of training, and messages that help."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tunemap.config import DatasetConfig
from tunemap.data.locate import source_files
from tunemap.data.rows import normalised, read_rows
from tunemap.data.sources import prepare, read_records
from tunemap.data.tasks import TASKS
from tunemap.errors import UserError
from tunemap.files import sha256_of
from tunemap.run import TASK_KINDS


def prepared(
    destination: Path, data_root: Path | None = None, **keys: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    prepare(DatasetConfig(**keys), destination, data_root=data_root)
    manifest = json.loads((destination / "dataset.json").read_text())
    return read_rows(destination / "train.jsonl"), read_rows(destination / "test.jsonl"), manifest


def write_lines(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_task_kinds_are_those_of_a_run() -> None:
    assert {name: task.kind for name, task in TASKS.items()} == TASK_KINDS


# --- made -------------------------------------------------------------------------------------------------


def test_made_arithmetic_has_the_form_of_gsm8k(tmp_path: Path) -> None:
    train, test, manifest = prepared(tmp_path, task="arithmetic", source="made", train_rows=50, test_rows=20)
    assert (len(train), len(test)) == (50, 20)
    assert set(train[0]) == {"id", "prompt", "answer"}
    assert train[0]["id"] == "arithmetic-train-0"
    assert "#### " in train[0]["answer"]
    assert manifest["task_kind"] == "generation"
    assert manifest["rows"] == {"train": 50, "test": 20}
    assert manifest["sha256"]["train"] == sha256_of(tmp_path / "train.jsonl")


def test_made_reviews_have_two_classes(tmp_path: Path) -> None:
    train, test, manifest = prepared(tmp_path, task="sst2", source="made", train_rows=100, test_rows=40)
    assert Counter(row["label_name"] for row in train).keys() == {"negative", "positive"}
    assert all(manifest["label_names"][row["label"]] == row["label_name"] for row in test)
    assert manifest["num_labels"] == 2


@pytest.mark.parametrize("task", ["arithmetic", "sst2"])
def test_made_test_rows_are_unique_held_out_and_independent_of_the_training_rows(tmp_path: Path, task: str) -> None:
    train, test, manifest = prepared(tmp_path / "a", task=task, source="made", train_rows=3000, test_rows=200)
    _, again, _ = prepared(tmp_path / "b", task=task, source="made", train_rows=10, test_rows=200)
    prompts = {normalised(row["prompt"]) for row in test}
    assert test == again
    assert len(prompts) == 200
    assert not prompts & {normalised(row["prompt"]) for row in train}
    assert manifest["overlap"]["remaining_rows"] == 0


def test_made_data_follow_their_seed(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"task": "arithmetic", "source": "made", "train_rows": 30, "test_rows": 10}
    one, again, other = (
        prepared(tmp_path / name, **keys, seed=seed)[:2] for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == again != other


def test_only_some_tasks_are_made_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task gsm8k is not made here; allowed: arithmetic, sst2"):
        prepared(tmp_path, task="gsm8k", source="made")


def test_more_different_test_rows_than_can_be_made_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tunemap.data.made.review", lambda rng: {"text": f"film {rng.randrange(5)}", "label": 0})
    with pytest.raises(UserError, match="test_rows: 6 different rows cannot be made; at most about 5"):
        prepared(tmp_path, task="sst2", source="made", test_rows=6)


# --- real data --------------------------------------------------------------------------------------------


def test_gsm8k_is_whole_and_disjoint(shared_data: Path, tmp_path: Path) -> None:
    train, test, manifest = prepared(tmp_path, shared_data, task="gsm8k", source="local", path="gsm8k")
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0]["prompt"].startswith("Natalia sold clips to 48")
    assert train[17]["id"] == "gsm8k-train-17"
    assert manifest["splits"] == {"train": "train", "test": "test"}
    assert manifest["overlap"]["removed_rows"] == manifest["overlap"]["remaining_rows"] == 0


def test_sst2_is_tested_on_its_dev_split_and_training_phrases_equal_to_test_rows_are_left_out(
    shared_data: Path, tmp_path: Path
) -> None:
    train, test, manifest = prepared(tmp_path, shared_data, task="sst2", source="local", path="sst2")
    held_out = {normalised(row["prompt"]) for row in test}
    source = read_records(shared_data / "sst2" / "train.tsv")
    assert "cool" in held_out  # "cool ?" is a test row, and the phrases "cool " and "cool . " are training rows
    repeated = [i for i, record in enumerate(source) if normalised(record["sentence"]) in held_out]
    assert len(test) == 872
    assert test[0]["id"] == "sst2-dev-0"
    assert manifest["splits"]["test"] == "dev"
    assert manifest["available_rows"]["train"] == len(source) == 67349
    assert len(train) == 67349 - len(repeated)
    assert manifest["overlap"]["removed_rows"] == len(repeated) == 5
    assert manifest["overlap"]["removed"][0]["id"] == f"sst2-train-{repeated[0]}"
    assert not held_out & {normalised(row["prompt"]) for row in train}
    assert train[0] == {
        "id": "sst2-train-0",
        "prompt": "hide new secretions from the parental units",
        "label": 0,
        "label_name": "negative",
    }


def test_rows_are_chosen_by_seed_and_nest(shared_data: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"task": "gsm8k", "source": "local", "path": "gsm8k", "test_rows": 5}
    small, large, other = (
        {row["id"] for row in prepared(tmp_path / name, shared_data, **keys, train_rows=rows, seed=seed)[0]}
        for name, rows, seed in (("a", 50, 0), ("b", 400, 0), ("c", 50, 1))
    )
    assert (len(small), len(large)) == (50, 400)
    assert small < large
    assert small != other


def test_more_rows_than_there_are_is_refused(shared_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_rows: 9000 rows asked for, but only 7473 can be used"):
        prepared(tmp_path, shared_data, task="gsm8k", source="local", path="gsm8k", train_rows=9000)


# --- a folder in the hub's layout -------------------------------------------------------------------------


def hub_folder(folder: Path) -> Path:
    """A repository as openai/gsm8k is: parquet files per configuration, named in the card."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    card = ["---", "configs:"]
    for subset in ("main", "socratic"):
        (folder / subset).mkdir(parents=True)
        card += [f"- config_name: {subset}", "  data_files:"]
        for split, count in (("train", 6), ("test", 3)):
            rows = [{"question": f"{subset} {split} {i}?", "answer": f"#### {i}"} for i in range(count)]
            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / subset / f"{split}-00000-of-00001.parquet")
            card += [f"  - split: {split}", f"    path: {subset}/{split}-*"]
    write_lines(folder / "README.md", *card, "---")
    return folder


@pytest.mark.parametrize("source", ["local", "hub"])
def test_a_folder_in_hub_layout_is_read_by_the_datasets_library(tmp_path: Path, source: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = hub_folder(tmp_path / "repository")
    where = {"path": "repository"} if source == "local" else {"id": str(folder)}
    monkeypatch.setattr("tunemap.data.sources._check_hub_id", lambda _: None)  # refuses a folder, which stands in here
    train, test, _ = prepared(tmp_path / "out", tmp_path, task="gsm8k", source=source, subset="main", **where)
    assert [row["prompt"] for row in train] == [f"main train {i}?" for i in range(6)]
    assert test[2] == {"id": "gsm8k-test-2", "prompt": "main test 2?", "answer": "#### 2"}


def test_the_files_of_a_hub_folder_are_known_without_reading_them(tmp_path: Path) -> None:
    hub_folder(tmp_path / "repository")
    files = source_files(DatasetConfig(task="gsm8k", source="local", path="repository", subset="main"), tmp_path)
    assert {path.name for path in files} == {
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
        "README.md",
    }


def test_a_hub_dataset_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    hub_folder(tmp_path / "repository")
    with pytest.raises(UserError, match="repository, subset other: cannot be read"):
        prepared(tmp_path / "out", tmp_path, task="gsm8k", source="local", path="repository", subset="other")


def test_a_hub_that_cannot_be_reached_is_no_traceback(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="dataset openai/gsm8k, subset main: cannot be read"):
        prepared(tmp_path, task="gsm8k", source="hub", id="openai/gsm8k", subset="main")


@pytest.mark.parametrize("name", ["/etc", "../elsewhere", "a/b/c", "someone/..", "owner/na me", "$(id)"])
def test_an_id_that_is_no_repository_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^id: .* no repository of the form owner/name"):
        prepared(tmp_path, task="gsm8k", source="hub", id=name)


def test_a_folder_is_not_taken_for_a_repository_of_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    hub_folder(tmp_path / "openai" / "gsm8k")
    with pytest.raises(UserError, match="id: openai/gsm8k: a folder of this name lies here; use source local"):
        prepared(tmp_path / "out", task="gsm8k", source="hub", id="openai/gsm8k", subset="main")


def test_a_hub_dataset_needs_an_id(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="source hub: id is missing"):
        prepared(tmp_path, task="gsm8k", source="hub")


# --- files of one's own -----------------------------------------------------------------------------------


def test_own_csv_files_for_generation(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.csv", "ask,reply", '"What, now?","Paris, ""France"""', "Who?,Ann")
    write_lines(tmp_path / "test.csv", "ask,reply", "who?,Ben", "Where?,There")
    train, test, manifest = prepared(
        tmp_path / "out", tmp_path, task="generation", source="file", train_file="train.csv", test_file="test.csv",
        prompt_field="ask", answer_field="reply",
    )  # fmt: skip
    assert train == [{"id": "generation-train-0", "prompt": "What, now?", "answer": 'Paris, "France"'}]
    assert [row["answer"] for row in test] == ["Ben", "There"]
    assert manifest["overlap"]["removed"] == [{"id": "generation-train-1", "prompt": "Who?"}]


def test_own_labels_are_found_and_sorted(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", *(json.dumps({"text": f"text {i}", "stars": i % 3 * 5}) for i in range(6)))
    write_lines(tmp_path / "b.tsv", "text\tstars", 'say "no\t10')
    train, test, manifest = prepared(
        tmp_path / "out", tmp_path, task="classification", source="file", train_file="a.jsonl", test_file="b.tsv",
        prompt_field="text", answer_field="stars",
    )  # fmt: skip
    assert manifest["label_names"] == ["0", "5", "10"]
    assert [row["label"] for row in train] == [0, 1, 2, 0, 1, 2]
    assert test[0] == {"id": "classification-test-0", "prompt": 'say "no', "label": 2, "label_name": "10"}


@pytest.mark.parametrize("unseen", [0, 3, 6])
def test_a_number_that_no_training_row_has_is_no_index_of_another_class(tmp_path: Path, unseen: int) -> None:
    write_lines(tmp_path / "a.jsonl", *(json.dumps({"text": f"text {i}", "stars": i}) for i in (1, 2, 4, 5)))
    write_lines(tmp_path / "b.jsonl", '{"text": "seen", "stars": 4}', json.dumps({"text": "new", "stars": unseen}))
    message = rf"b\.jsonl, line 2: classification-test-1: stars is '{unseen}'; expected a label .*: 1, 2, 4, 5$"
    with pytest.raises(UserError, match=message):
        prepared(
            tmp_path / "out", tmp_path, task="classification", source="file", train_file="a.jsonl",
            test_file="b.jsonl", prompt_field="text", answer_field="stars",
        )  # fmt: skip


def own(**changes: Any) -> dict[str, Any]:
    keys = {
        "task": "generation",
        "source": "file",
        "train_file": "train.jsonl",
        "test_file": "test.jsonl",
        "prompt_field": "ask",
        "answer_field": "reply",
    }
    return {key: value for key, value in (keys | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (own(train_file=None), "source file: train_file is missing"),
        (own(train_file="absent.jsonl"), r"train_file: .*absent\.jsonl: no such file"),
        (own(train_file="train.xlsx"), r"train_file: .*train\.xlsx is no \.jsonl, \.csv, \.tsv file"),
        (own(prompt_field=None), "task generation: prompt_field is missing"),
        (own(answer_field=None), "task generation: answer_field is missing"),
        (own(prompt_field="asked"), "no field 'asked'; it has ask, reply"),
        (own(train_file="broken.jsonl"), r"broken\.jsonl, line 2: not JSON"),
        (own(train_file="list.jsonl"), r"list\.jsonl, line 1: expected an object .* found list"),
        (own(train_file="ragged.csv"), r"ragged\.csv, line 3: 3 cells, but the header has 2"),
        (own(train_file="empty.csv"), r"empty\.csv: empty; expected a header line"),
        (own(train_file="blank.jsonl"), "generation-train-0: field 'reply' is ' '; expected text or a number"),
        (own(task="classification"), r"train\.jsonl: every training row has the label 'a'; classes need two or more"),
        (own(task="classification", train_file="two.csv"), "reply is 'c'; expected a label .*: 0, b$"),
        ({"task": "gsm8k", "source": "local"}, "source local: path is missing"),
        ({"task": "gsm8k", "source": "local", "path": "nowhere"}, "nowhere is no folder"),
        ({"task": "gsm8k", "source": "local", "path": "bare"}, "bare holds no data; expected train and test files"),
    ],
)
def test_each_mistake_has_its_message(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    write_lines(tmp_path / "train.jsonl", '{"ask": "x?", "reply": "a"}')
    write_lines(tmp_path / "test.jsonl", '{"ask": "y?", "reply": "c"}')
    write_lines(tmp_path / "broken.jsonl", '{"ask": "x?", "reply": "a"}', "{")
    write_lines(tmp_path / "list.jsonl", "[1]")
    write_lines(tmp_path / "ragged.csv", "ask,reply", "x,a", "x,a,b")
    write_lines(tmp_path / "empty.csv")
    write_lines(tmp_path / "two.csv", "ask,reply", "x,0", "z,b")
    write_lines(tmp_path / "blank.jsonl", '{"ask": "x?", "reply": " "}')
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=message):
        prepared(tmp_path / "out", tmp_path, **keys)


def test_planning_learns_the_files_without_heavy_imports(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", "{}")
    write_lines(tmp_path / "dev.jsonl", "{}")
    program = (
        "import sys; from pathlib import Path; from tunemap.config import DatasetConfig\n"
        "from tunemap.data.locate import source_files\n"
        f"d = DatasetConfig(task='gsm8k', source='local', path={str(tmp_path)!r})\n"
        "print([p.name for p in source_files(d, None)])\n"
        "print(sorted({'torch', 'numpy', 'datasets', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["['dev.jsonl', 'train.jsonl']", "[]"]


@pytest.mark.parametrize("source", ["made", "hub"])
def test_made_and_hub_data_have_no_local_files(source: str) -> None:
    assert source_files(DatasetConfig(task="arithmetic", source=source, id="a/b"), None) == []


def test_the_published_split_of_gsm8k(shared_data, tmp_path):
    """7,099 rows to train on and 374 held out, the ones that `datasets.train_test_split(0.05, seed=42)` chooses."""
    from datasets import Dataset

    dataset = DatasetConfig(task="gsm8k", source="local", path=str(shared_data / "gsm8k"), held_out_share=0.05, seed=42)
    prepare(dataset, tmp_path, data_root=None)
    manifest = json.loads((tmp_path / "dataset.json").read_text())
    assert manifest["rows"] == {"train": 7099, "test": 374}
    assert manifest["splits"]["test"] == "train-held-out"
    questions = [json.loads(line)["question"] for line in (shared_data / "gsm8k" / "train.jsonl").open()]
    expected = Dataset.from_dict({"question": questions}).train_test_split(test_size=0.05, seed=42)["test"]["question"]
    held_out = [json.loads(line)["prompt"] for line in (tmp_path / "test.jsonl").open()]
    assert sorted(held_out) == sorted(expected)


def test_rows_are_held_out_of_made_ones(tmp_path):
    dataset = DatasetConfig(task="arithmetic", source="made", train_rows=400, held_out_share=0.05, seed=42)
    prepare(dataset, tmp_path, data_root=None)
    manifest = json.loads((tmp_path / "dataset.json").read_text())
    assert manifest["rows"] == {"train": 380 - manifest["overlap"]["removed_rows"], "test": 20}
    assert manifest["overlap"]["remaining_rows"] == 0
