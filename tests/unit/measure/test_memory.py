"""The live-storage tracker against two accounts of torch itself, byte for byte, and the counts of host and driver."""

import contextlib
import json

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile

from tunemap.measure import memory
from tunemap.measure.memory import (
    CATEGORIES,
    host_rss_peak_bytes,
    memory_record,
    memory_snapshot,
    peaks_until_now,
    reset_host_rss_peak,
    reset_peaks,
    track_live_storage,
)

torch.set_num_threads(1)
NO_MASK = {"full_attention": None}  # a prepared mask: real and fake runs then take the same attention path


class Adapted(torch.nn.Module):
    """A frozen linear layer with a low-rank update beside it."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Linear(base.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def tiny_model(kind, dtype=torch.float32):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = Qwen2ForCausalLM(config)
    if dtype != torch.float32:  # fake tensors cannot be converted in place
        model = model.to(dtype)
    if "adapter" in kind:
        model.requires_grad_(False)
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, child in list(block.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        setattr(block, name, Adapted(child, 4))
    if "checkpointed" in kind:
        # The saved state of the random generator is made outside the dispatcher: 5056 bytes a block unless off.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        model.enable_input_require_grads()
    return model.train()


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, foreach=False)


def one_step(model, optimizer, ids, tracker=None):
    phase = tracker.phase if tracker else lambda name: contextlib.nullcontext()
    with phase("forward"):
        loss = model(input_ids=ids, labels=ids, attention_mask=NO_MASK).loss
    with phase("backward"):
        loss.backward()
    with phase("optimizer"):
        optimizer.step()
        optimizer.zero_grad()


def profiled_peak_above_start(step, path):
    """The profiler's running sum of allocations during `step`, at its highest: an account from inside the allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        current += event["args"]["Bytes"]
        peak = max(peak, current)
    return peak


@pytest.mark.parametrize("kind", ["full", "adapter", "full checkpointed", "adapter checkpointed"])
def test_peak_equals_the_profilers_allocations_to_the_byte(kind, tmp_path):
    model = tiny_model(kind)
    optimizer = optimizer_of(model)
    ids = torch.randint(0, 320, (4, 64))
    one_step(model, optimizer, ids)
    with track_live_storage(model, optimizer) as tracker:
        one_step(model, optimizer, ids, tracker)
    above_start = profiled_peak_above_start(lambda: one_step(model, optimizer, ids), tmp_path / "trace.json")
    assert tracker.peak_allocated_bytes == tracker.end_allocated_bytes + above_start


@pytest.mark.parametrize("kind", ["full", "full checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_equals_mem_tracker_to_the_byte(kind, dtype):
    model = tiny_model(kind, dtype)
    optimizer = optimizer_of(model)
    ids = torch.randint(0, 320, (4, 64))
    one_step(model, optimizer, ids)
    with track_live_storage(model, optimizer) as tracker:
        one_step(model, optimizer, ids, tracker)
    oracle = MemTracker()
    oracle.track_external(model, optimizer, ids)
    with oracle:
        one_step(model, optimizer, ids)
    peak = oracle.get_tracker_snapshot("peak")[torch.device("cpu")]
    assert tracker.peak_allocated_bytes == peak["Total"]


@pytest.mark.parametrize("kind", ["full", "adapter checkpointed"])
def test_fake_tensors_give_the_same_account_as_real_ones(kind):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def account(mode):
        with mode:
            model = tiny_model(kind)
            optimizer = optimizer_of(model)
            ids = torch.randint(0, 320, (4, 64))
            one_step(model, optimizer, ids)
            with track_live_storage(model, optimizer) as tracker:
                one_step(model, optimizer, ids, tracker)
        return tracker.peak_allocated_bytes, tracker.breakdown_bytes, tracker.end_allocated_bytes, tracker.peak_phase

    assert account(FakeTensorMode(allow_non_fake_inputs=True)) == account(contextlib.nullcontext())


def test_categories_follow_their_closed_forms_and_sum_to_the_peak():
    width, rows = 64, 5
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, width))
    model.register_buffer("scale", torch.ones(3))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    batch = torch.randn(rows, width)

    def step(tracker):
        with tracker.phase("forward"):
            loss = model(batch).sum()
        with tracker.phase("backward"):
            loss.backward()
        del loss
        tracker.reset_peak()
        with tracker.phase("optimizer"):
            optimizer.step()

    with track_live_storage(model, optimizer) as first:
        step(first)
    with track_live_storage(model, optimizer) as second:
        step(second)
    weights = 4 * 2 * (width * width + width)
    for tracker in (first, second):
        breakdown = tracker.breakdown_bytes
        assert tuple(breakdown) == CATEGORIES
        assert breakdown["parameters"] == weights + 3 * 4
        assert breakdown["gradients"] == weights
        assert breakdown["activations"] == 0
        assert sum(breakdown.values()) == tracker.peak_allocated_bytes
        assert tracker.peak_phase == "optimizer"
    assert second.breakdown_bytes["other"] == 4 * rows * width
    moments = 2 * weights + 4 * 4  # and a step count for each of the four parameters
    largest_temporary = 4 * width * width
    assert moments <= second.breakdown_bytes["optimizer"] <= moments + 3 * largest_temporary
    assert second.end_allocated_bytes == 2 * weights + 12 + moments + 4 * rows * width


def test_views_are_counted_once():
    model = torch.nn.Linear(8, 8, bias=False)
    with track_live_storage(model) as tracker, torch.no_grad():
        made = torch.zeros(1000)
        views = [made.view(10, 100), made[5:], made.detach()]
    assert tracker.end_allocated_bytes == 4 * (64 + 1000)
    assert len(views) == 3


def test_a_storage_from_before_the_step_raises_the_earlier_peak():
    model = torch.nn.Linear(8, 8, bias=False)
    bucket = torch.zeros(50)
    with track_live_storage(model) as tracker, torch.no_grad():
        with tracker.phase("forward"):
            temporary = torch.zeros(1000)
            del temporary
        with tracker.phase("backward"):
            bucket.add_(1)
    assert tracker.peak_allocated_bytes == 4 * (64 + 1000 + 50)
    assert tracker.peak_phase == "forward"
    assert tracker.breakdown_bytes["other"] == 4 * 50
    assert tracker.phase_peak_bytes["forward"] == tracker.peak_allocated_bytes


def test_resized_storages_are_followed_down_and_up():
    model = torch.nn.Linear(8, 8, bias=False)
    gathered = torch.zeros(100)
    gathered.untyped_storage().resize_(0)
    with track_live_storage(model) as tracker:
        gathered.untyped_storage().resize_(400)
        gathered.untyped_storage().resize_(0)
    assert tracker.breakdown_bytes["parameters"] == 4 * 64 + 400
    assert tracker.end_allocated_bytes == 4 * 64


def test_block_rounding_counts_whole_blocks():
    model = torch.nn.Linear(1, 1)
    with track_live_storage(model, block_bytes=512) as tracker:
        pass
    assert tracker.peak_allocated_bytes == 2 * 512


def test_leaving_restores_torch_even_after_an_error():
    model = torch.nn.Linear(2, 2)
    before = torch.UntypedStorage.resize_
    with contextlib.suppress(KeyError), track_live_storage(model):
        raise KeyError
    assert torch.UntypedStorage.resize_ is before
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_an_unknown_phase_is_refused():
    with (
        track_live_storage(torch.nn.Linear(2, 2)) as tracker,
        pytest.raises(ValueError, match="forward, backward, optimizer"),
        tracker.phase("lunch"),
    ):
        pass


def test_four_bit_weights_count_with_their_scales():
    import bitsandbytes as bnb

    rows, columns = 128, 256
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, compress_statistics=True, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(rows, columns), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu")
    state = layer.weight.quant_state
    with track_live_storage(layer) as tracker:
        pass
    weights = rows * columns
    packed, absmax, nested_absmax = weights // 2, weights // 64, 4 * -(-(weights // 64) // 256)
    tables = sum(t.untyped_storage().nbytes() for t in (state.code, state.state2.code, state.offset))
    assert tracker.breakdown_bytes["parameters"] == packed + absmax + nested_absmax + tables


@pytest.fixture
def fake_ranks():
    """A process group of two ranks of which only this one exists; its collectives move nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_fsdp_holds_half_the_parameters_and_gathers_one_block_at_a_time(fake_ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    width, layers = 64, 4
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    batch = torch.randn(2, width)

    def step(tracker):
        with tracker.phase("forward"):
            loss = model(batch).sum()
        with tracker.phase("backward"):
            loss.backward()
        with tracker.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    trackers = []
    for _ in range(2):
        with track_live_storage(model, optimizer) as tracker:
            step(tracker)
        trackers.append(tracker)
    tracker = trackers[-1]
    one_layer, shard = 4 * width * width, 4 * width * width // 2
    assert tracker.end_allocated_bytes == pytest.approx(3 * layers * shard, rel=0.02)
    gathered = tracker.breakdown_bytes["parameters"] - layers * shard
    assert one_layer <= gathered <= 3 * one_layer
    assert tracker.peak_allocated_bytes < 3 * layers * shard + layers * one_layer + 4 * one_layer


@pytest.fixture
def single_rank(tmp_path):
    """A real gloo process group of one."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["ddp", "ddp with bucket views", "fsdp"])
def test_peak_of_a_distributed_step_equals_the_profilers_to_the_byte(single_rank, strategy, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = tiny_model("full")
    if strategy == "fsdp":
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model, gradient_as_bucket_view=strategy != "ddp")
    optimizer = optimizer_of(model)
    ids = torch.randint(0, 320, (4, 64))
    for _ in range(2):
        one_step(model, optimizer, ids)
    with track_live_storage(model, optimizer) as tracker:
        one_step(model, optimizer, ids, tracker)
    above_start = profiled_peak_above_start(lambda: one_step(model, optimizer, ids), tmp_path / "trace.json")
    assert tracker.peak_allocated_bytes == tracker.end_allocated_bytes + above_start
    if strategy != "fsdp":
        weights = sum(p.numel() * 4 for p in model.parameters())
        assert tracker.breakdown_bytes["other"] == weights + ids.numel() * 8  # the buckets and the batch


def test_the_copy_in_which_gloo_reduces_is_scratch_of_the_collective(single_rank):
    import torch.distributed as dist

    gradients, part, later = torch.ones(1000), torch.empty(1000), torch.ones(1000)
    with track_live_storage(torch.nn.Linear(1, 1)) as tracker:
        dist.reduce_scatter_tensor(part, gradients)
        assert tracker.live_bytes == tracker.peak_allocated_bytes == 2 * 4000 + 8
        later.add_(1)  # as large, and no scratch
    assert tracker.end_allocated_bytes == tracker.peak_allocated_bytes == 3 * 4000 + 8


def test_host_peak_rises_with_an_allocation_and_falls_on_reset():
    if not reset_host_rss_peak():
        pytest.skip("this kernel does not let a process reset its own peak")
    before = host_rss_peak_bytes()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    grown = host_rss_peak_bytes()
    del block
    assert grown - before > 50 * 2**20
    reset_peaks("cpu")
    assert host_rss_peak_bytes() < grown - 50 * 2**20


def test_host_peak_is_none_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    assert host_rss_peak_bytes() is None
    assert reset_host_rss_peak() is False


def test_a_cpu_record_has_no_allocator_and_no_driver_columns():
    model = torch.nn.Linear(8, 8, bias=False)
    with track_live_storage(model) as tracker:
        pass
    record = memory_record("cpu", tracker)
    assert record.peak_allocated_bytes == record.end_allocated_bytes == record.parameters_bytes == 256
    assert record.peak_reserved_bytes is None
    assert record.driver_process_bytes is None
    assert record.host_rss_peak_bytes > 0
    assert memory_record("cpu").activations_bytes is None


def test_a_cuda_record_takes_the_allocators_counts(monkeypatch):
    counts = {"memory_allocated": 3, "memory_reserved": 5, "max_memory_allocated": 7, "max_memory_reserved": 11}
    for name, value in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(memory, "driver_process_bytes", lambda device: 13)
    assert memory_snapshot("cuda:0") == memory.MemorySnapshot(3, 5, 7, 11)
    with track_live_storage(torch.nn.Linear(8, 8, bias=False)) as tracker:
        pass
    record = memory_record("cuda:0", tracker)
    assert (record.peak_allocated_bytes, record.peak_reserved_bytes, record.end_allocated_bytes) == (7, 11, 3)
    assert (record.driver_process_bytes, record.parameters_bytes) == (13, 256)


def test_peaks_of_a_resumed_run_are_those_of_all_its_processes(monkeypatch):
    counts = {"memory_allocated": 3, "memory_reserved": 5, "max_memory_allocated": 7, "max_memory_reserved": 11}
    for name, value in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert peaks_until_now("cuda", None) == {"peak_allocated_bytes": 7, "peak_reserved_bytes": 11}
    earlier = {"peak_allocated_bytes": 9, "peak_reserved_bytes": 9}
    assert peaks_until_now("cuda", earlier) == {"peak_allocated_bytes": 9, "peak_reserved_bytes": 11}
    tracked = {"peak_allocated_bytes": 5, "peak_phase": "forward"}
    assert peaks_until_now("cpu", tracked) == tracked
