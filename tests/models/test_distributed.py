"""Two processes on a CPU: DDP, FSDP2 and tensor parallelism beside one process, and what they send.

`distributed_worker` does it all in one run of torchrun; each test looks at what one scenario gave.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

pytest.importorskip("transformers")
pytest.importorskip("peft")
if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed part", allow_module_level=True)

from distributed_layers import LAYERS
from distributed_training import STEPS, llama, load_checkpoint, optimizer_of, run_example, train

from fused_lowrank import load_adapter

ROOT = Path(__file__).parents[2]
SECONDS = 240
CURVE = 1e-9  # relative: float64, summed in another order
# The example's loss is transformers': a sum of 8 · 15 positive terms in float32, on either side.
CURVE_OF_EXAMPLE = 2 * 8 * 15 * 2**-24
TRAINED = 14 * 25 * 4  # bytes of the Llama's cores
PADDED = 14 * 30 * 4  # 5 rows are 6 on 2 ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One for all the workers of a run by pytest-xdist."""
    if run := os.environ.get("PYTEST_XDIST_TESTRUNUID"):
        path = tmp_path_factory.getbasetemp().parent / f"distributed-{run}"
        path.mkdir(exist_ok=True)
        return path
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def both(folder) -> list[dict[str, Any]]:
    """Each rank's results by scenario."""
    files = [folder / f"rank{rank}.pt" for rank in (0, 1)]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(file.exists() for file in files):
            torchrun(folder)
    return [torch.load(file, weights_only=False) for file in files]


def torchrun(folder: Path) -> None:
    """Run the worker in two processes; fail with what they said if that fails."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
    }
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                *command,
                str(ROOT / "tests/support/distributed_worker.py"),
                str(folder),
            ],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = f"none after {SECONDS} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code != 0:
        said = (folder / "output").read_text()[-8000:]
        pytest.fail(f"the processes' exit code: {code}. They said:\n{said}")


@pytest.fixture(scope="module")
def results(both):
    """A function: the scenario's result on the first rank, when neither failed in it."""

    def of(name: str) -> Any:
        for rank, own in enumerate(both):
            if isinstance(own[name], str):
                pytest.fail(f"rank {rank}:\n{own[name]}")
        return both[0][name]

    return of


def assert_same_losses(got: list[float], expected: list[float], relative: float = CURVE) -> None:
    losses = (torch.tensor(each, dtype=torch.float64) for each in (got, expected))
    torch.testing.assert_close(*losses, rtol=relative, atol=0)


def assert_same_curve(got: list[float], expected: list[float], relative: float = CURVE) -> None:
    assert abs(expected[0] - expected[-1]) > 0.1  # something was learned
    assert_same_losses(got, expected, relative)


def assert_same_training(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """The losses, and what has been learned at the end."""
    assert_same_curve(got["losses"], expected["losses"])
    assert_same_values(got["trained"], expected["trained"])


def assert_same_values(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """What has been learned, in float64; an optimiser's step may magnify a gradient's rounding."""
    assert {tensor.dtype for tensor in expected} == {torch.float64}
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def assert_pairs(pairs: dict[str, Any], **tolerance: float) -> None:
    """Each of the results is what is expected, and none is nothing."""
    for name, (got, expected) in pairs.items():
        assert expected.abs().max() > 1e-3, name
        torch.testing.assert_close(got, expected, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# --- one process's training ---


@pytest.mark.parametrize("name", ["ddp", "ddp_buffers", "fsdp", "fsdp_frozen_whole", "tp"])
def test_training_is_that_of_one_process(results, name):
    assert_same_training(results(name), results("single"))


def test_restart_under_ddp(results, both):
    """All ranks have the first one's new factors, of which up is zero, and learn on alike; sharded
    weights are refused.
    """
    first, second = results("restart"), both[1]["restart"]
    torch.testing.assert_close(first["after"], first["before"], rtol=1e-10, atol=0)
    assert any(factor.any() for factor in first["begun"])
    assert any(not factor.any() for factor in first["begun"])
    for name in ("begun", "trained"):
        for own, other in zip(first[name], second[name], strict=True):
            assert torch.equal(own, other)
    assert first["losses"][-1] < first["losses"][0]
    assert "cannot merge and restart under fully_shard" in first["said"]
    assert first["groups"] == {"factors": 14, "output_factors": 14}


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_model_of_peft(results, how):
    """The same curve, and nothing sent but the gradients of what is trained."""
    got = results("peft")
    assert_same_training(got[how], got["single"])
    reduced = [size for name, size in got[how]["sent"][-1] if name != "allgather_base"]
    assert sum(reduced) == (TRAINED if how == "ddp" else PADDED)


def test_mini_by_tensor_parallelism(results):
    got = results("tp_mini")
    assert_same_training(got["tp"], got["single"])


def test_fsdp_over_tensor_parallelism(results):
    for got in results("mesh_2d"):
        assert_same_training(got, results("single"))
        assert "cannot merge under fully_shard" in got["merge"]


def test_fsdp_with_a_bfloat16_base_and_float32_cores(results):
    """Bit by bit DDP's: nothing is cast on the way."""
    got = results("fsdp_mixed")
    assert got["fsdp"]["losses"] == got["ddp"]["losses"]
    for ours, theirs in zip(got["fsdp"]["trained"], got["ddp"]["trained"], strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


# --- bytes of a step ---


def test_ddp_sends_what_is_trained(results):
    steps = results("ddp")["sent"]
    assert steps[0] == steps[2] == steps[-1] == [("allreduce", TRAINED)]
    # Once, DDP tells the ranks the order of its bucket's 14 tensors.
    assert sum(size for name, size in steps[1] if name == "broadcast") <= 64
    assert [step for step in steps[1] if step[0] != "broadcast"] == [("allreduce", TRAINED)]


def test_ddp_broadcasts_no_buffer_of_ours(results):
    got = results("ddp_buffers")
    assert 0 < got["buffers"] <= 64
    assert got["sent"][-1] == [("broadcast", got["buffers"]), ("allreduce", TRAINED)]


def test_fsdp_reduces_what_is_trained(results):
    for step in results("fsdp")["sent"]:
        assert {name for name, _ in step} == {"allgather_base", "reduce_scatter_base"}
        assert sum(size for name, size in step if name == "reduce_scatter_base") == PADDED


def test_fsdp_gathers_nothing_frozen_that_it_ignores(results):
    for step in results("fsdp_frozen_whole")["sent"]:
        assert sum(size for name, size in step if name == "reduce_scatter_base") == PADDED
        gathered = sum(size for name, size in step if name == "allgather_base")
        assert gathered == 2 * PADDED  # forward and backward
        assert sum(size for _, size in step) == 3 * PADDED


def test_tensor_parallelism_adds_the_cores_gradients(results):
    bare, ours = (sorted(size for _, size in step) for step in results("tp_bare"))
    assert ours == sorted(bare + [100] * 14)
    for step in results("tp_bare"):
        assert {name for name, _ in step} == {"all_reduce"}


# --- checkpoints ---


def test_checkpoints_are_resharded(results):
    for losses in results("checkpoint").values():
        assert_same_curve(losses, results("single")["losses"])


@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_checkpoint_of_two_processes_continues_at_one(results, folder, kind):
    expected = results("single")
    results("checkpoint")
    model = load_adapter(llama(), folder / "start.safetensors", progress=False)
    optimizer = optimizer_of(model)
    load_checkpoint(model, optimizer, folder / kind)
    got = train(model, optimizer, range(3, STEPS))
    assert_same_losses(got["losses"], expected["losses"][3:])
    assert_same_values(got["trained"], expected["trained"])


def test_example_continues_at_one_process(results, tmp_path, folder):
    """The example's runs of three steps are alike, and one process takes them up."""
    runs = results("example")
    expected = run_example(tmp_path, 6)
    for how, losses in runs.items():
        got = losses + run_example(folder / how, 6)
        assert_same_curve(got, expected, CURVE_OF_EXAMPLE)


@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_files_of_a_sharded_model(results, kind):
    """Those of save_adapter bit by bit; those of export_lora are products."""
    files = results("files")
    for file, expected_file in zip(files[kind], files["whole"], strict=True):
        got, expected = load(file), load(expected_file)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            if "lora_" in name:
                torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-9)
            else:
                assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_factors_of_weights_that_are_sharded(results, both, kind):
    got = results("deferred")[kind]
    assert got["pending"], "loading the weights alone must not pass for loading the factors"
    assert_pairs(got["pairs"], rtol=0, atol=0)
    for ours, theirs in zip(got["cores"], both[1]["deferred"][kind]["cores"], strict=True):
        assert 0 < ours.abs().max() < 1e-4
        assert torch.equal(ours, theirs)


# --- layers ---


@pytest.mark.parametrize("case", LAYERS)
def test_layers(results, case):
    """Results and gradients; merged, disabled and unloaded too."""
    got = results("layers")[case]
    assert_pairs(got["pairs"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("case", "extra"),
    [
        ("xs", [16, 16]),
        ("xs, all", [48, 16, 16, 48]),  # down of the first, up of the second
        ("mini", [10, 12, 10, 12]),
        ("lora", [36, 36]),
    ],
)
def test_layers_send_gradients_of_what_is_replicated(results, case, extra):
    sent = sorted(size // 8 for _, size in results("layers")[case]["sent"])
    assert sent == sorted([*extra, 180, 180])  # and y of the second layer, dx of the first


@pytest.mark.parametrize("name", ["kernels", "compiled", "copies", "layouts"])
def test_other_ways_to_compute_them(results, name):
    assert_pairs(results(name)["pairs"], rtol=1e-10, atol=1e-10)


def test_compiled_is_one_graph(results):
    assert results("compiled")["graphs"] == 1


def test_layout_of_the_output(results):
    assert results("layouts")["sharded"]


@pytest.mark.parametrize("kind", ["colwise", "rowwise"])
@pytest.mark.parametrize("fused", [True, False])
def test_dropout(results, kind, fused):
    """Colwise has one mask on all ranks; rowwise has another for each rank's slice."""
    got = results("dropout")[kind, fused]
    assert_pairs(got, rtol=1e-10, atol=1e-10)
    assert (got["y"][1] - got["eval"][1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("case", "message"),
    {
        "plain": "TypeError: LowRankColwiseParallel is for adapted layers, not for a Linear",
        "plain, rowwise": "use torch's RowwiseParallel",
        "merged": "ValueError: the layer is merged: unmerge it",
        "banked": "ValueError: the layer is in a bank",
        "small, colwise": "ValueError: out_features is 1: too small for 2 ranks",
        "small, rowwise": "ValueError: in_features is 1: too small for 2 ranks",
        "bank of sharded": "ValueError: a is sharded",
        "load": "ValueError: the model is sharded: load an adapter before",
        "adapt": "TypeError: a has its weight sharded: adapt before",
        "merge, fsdp": "RuntimeError: cannot merge under fully_shard",
        "unload, fsdp": "RuntimeError: cannot unload under fully_shard",
        "layer.merge, fsdp": "RuntimeError: cannot merge under fully_shard",
        "disable, fsdp": "RuntimeError: cannot disable modules trained whole under fully_shard",
        "disable, fsdp, no head": "nothing was raised",
    }.items(),
)
def test_errors(results, case, message):
    assert message in results("errors")[case]


# --- FullyShardedDataParallel ---


@pytest.mark.parametrize("name", ["fsdp1", "fsdp1_peft"])
def test_fsdp1(results, name):
    """The curve of one process, and files that give the same logits."""
    got = results(name)
    assert_same_curve(*got["losses"])
    assert_pairs(got["pairs"], rtol=1e-9, atol=1e-9)


def test_fsdp1_of_pefts_policy(results):
    assert_same_curve(*results("fsdp1_peft")["losses, their policy"])


def test_fsdp1_files_of_peft_have_fingerprints(results):
    """With which a file without its frozen factors can be loaded; one for each of four layers."""
    assert results("fsdp1_peft")["prints"] == [4, 4]


@pytest.mark.parametrize(
    ("name", "case", "message"),
    [
        ("fsdp1", "merge", "RuntimeError: cannot merge under FullyShardedDataParallel"),
        ("fsdp1", "merge, summoned", "RuntimeError: cannot merge under FullyShardedDataParallel"),
        ("fsdp1", "unload", "RuntimeError: cannot unload under FullyShardedDataParallel"),
        ("fsdp1", "layer.merge", "RuntimeError: cannot merge under FullyShardedDataParallel"),
        ("fsdp1", "bank", "is sharded by FullyShardedDataParallel: a bank's layers are whole"),
        ("fsdp1", "load", "load an adapter before FullyShardedDataParallel"),
        ("fsdp1", "load, plain", "load an adapter before FullyShardedDataParallel"),
        ("fsdp1", "adapt", "sharded by FullyShardedDataParallel: adapt before"),
        ("fsdp1", "disable", "cannot disable modules trained whole under FullyShardedDataParallel"),
        ("fsdp1", "explain", "sharded by FullyShardedDataParallel: explain it before"),
        ("fsdp1", "flat", "use_orig_params=False"),
        ("fsdp1_peft", "save, not gathered", "give save_pretrained the gathered state_dict"),
        ("fsdp1_peft", "merge", "RuntimeError: cannot merge under FullyShardedDataParallel"),
        ("fsdp1_peft", "unload", "cannot merge or unload under FullyShardedDataParallel"),
        ("fsdp1_peft", "load", "cannot add or load an adapter under FullyShardedDataParallel"),
        ("fsdp1_peft", "add", "has its weight sharded by FullyShardedDataParallel: adapt before"),
        ("fsdp1_peft", "flat", "use_orig_params=False"),
        ("fsdp1_peft", "leaves", "cannot be put into a FullyShardedDataParallel"),
    ],
)
def test_fsdp1_errors(results, name, case, message):
    assert message in results(name)["errors"][case]


def test_4_bit_bases_under_fsdp(results):
    """Packed into any dtype, the weights are sharded, and gathered where they are called."""
    pytest.importorskip("bitsandbytes")
    got = results("bases")
    assert "TypeError: a Linear4bit whose weight was packed into torch.bfloat16" in got.pop("cast")
    saved, disabled, again = got.pop("saved"), got.pop("disabled"), got.pop("adapted again")
    for found, expected in (saved, disabled):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert "first has its weight sharded: adapt before fully_shard" in again
    assert len(got) == 5
    for pairs in got.values():
        assert len(pairs) > 2
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
