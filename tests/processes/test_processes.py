"""Several processes of torchrun: the same bits as one, and one sentence when one of them ends."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from advkd import device, processes
from advkd.config import Config, override
from advkd.parallel import Workers, evenly_cut
from advkd.run.folder import _differing

from .launching import STAGES, ended, launched, left_by, prepared

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepared(tmp_path_factory.mktemp("processes"))


def run_of(options: list[str], name: str) -> Path:
    return Path(options[options.index("--runs") + 1]) / name


@pytest.fixture(scope="module")
def expected(options: list[str]) -> dict[str, str]:
    """What one process leaves, by three threads."""
    own = ["--name", "one", "--threads", "3", "--set", "run.shares=8"]
    code, said = ended(launched(0, [str(STAGES), *options, *own]))
    assert code == 0, said
    return left_by(run_of(options, "one"))


def test_two_processes_leave_the_same_bits_as_one(
    options: list[str], expected: dict[str, str]
) -> None:
    code, said = ended(launched(2, [str(STAGES), *options, "--name", "two"]))
    assert code == 0, said
    assert [line for line in said if re.search(r"2 of 2 processes .* threads", line)] == said[:1]
    assert left_by(run_of(options, "two")) == expected
    names = {name.partition("/")[0] for name in expected}
    assert names >= {"teacher", "trajectories", "student", "metrics.jsonl", "data.json"}
    assert not [*run_of(options, "two").rglob("*.claim"), *run_of(options, "two").rglob("*.tmp")]


def test_a_run_goes_on_with_other_numbers_of_processes_after_a_stop_and_a_death(
    options: list[str], expected: dict[str, str]
) -> None:
    command = [str(STAGES), *options, "--name", "cut"]
    run = run_of(options, "cut")
    stop = {"MOMENT": f"teacher:4:1:{int(signal.SIGTERM)}"}
    code, said = ended(launched(2, command, environment=stop))
    assert code != 0
    assert "stopped at step 5 of 8 of stage teacher; the same command goes on from there" in said
    assert (run / "checkpoints" / "teacher-00000005.json").is_file()

    death = {"MOMENT": f"distill:5:2:{int(signal.SIGKILL)}"}
    code, said = ended(launched(3, command, environment=death))
    assert code != 0
    assert "process 2 of 0 to 2 died, or cannot be reached" in said
    assert (run / "checkpoints" / "distill-00000004.json").is_file()

    code, said = ended(launched(0, command))
    assert code == 0, said
    assert left_by(run) == expected


def test_torchrun_starts_them_again_and_they_go_on(
    options: list[str], expected: dict[str, str]
) -> None:
    death = {"MOMENT": f"distill:5:1:{int(signal.SIGKILL)}"}
    node = ("--standalone", "--max-restarts=1")
    command = [str(STAGES), *options, "--name", "again"]
    code, said = ended(launched(2, command, node, death))
    assert code == 0, said
    assert "process 1 of 0 to 1 died, or cannot be reached" in said
    assert left_by(run_of(options, "again")) == expected


def test_one_all_reduce_gives_nearly_the_exact_sums(options: list[str]) -> None:
    weights = []
    for reduce in ("exact", "fast"):
        own = ["--name", reduce, "--stage", "teacher", "--set", f'run.reduce="{reduce}"']
        own += ["--set", "unet.dropout=0"]  # whose numbers are those of the parts
        code, said = ended(launched(2, [str(STAGES), *options, *own]))
        assert code == 0, said
        (file,) = (run_of(options, reduce) / "teacher").rglob("*.safetensors")
        weights.append(load_file(file))
    exact, fast = weights
    assert any(not torch.equal(fast[name], exact[name]) for name in exact)
    apart, whole = (
        torch.cat([x.flatten() for x in values]).norm()
        for values in ([fast[n] - exact[n] for n in exact], exact.values())
    )
    assert apart < 1e-3 * whole


def test_a_process_with_another_configuration_is_refused_by_name(options: list[str]) -> None:
    other = {"ALONE": "1 --set distill.lr=0.5"}
    code, said = ended(launched(2, [str(STAGES), *options, "--name", "no"], environment=other))
    assert code == 1
    assert "process 1 was started with another distill.lr than process 0" in said
    assert not run_of(options, "no").exists()


# One process, with shares.


@pytest.mark.parametrize("count", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("part", [slice(0, 1), slice(0, 8), slice(3, 14)])
def test_a_slice_is_cut_evenly_and_in_order(part: slice, count: int) -> None:
    found = evenly_cut(part, count)
    lengths = [piece.stop - piece.start for piece in found]
    assert [i for piece in found for i in range(20)[piece]] == list(range(20)[part])
    assert len(found) == min(count, part.stop - part.start)
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fixed_shares_give_the_same_bits_for_any_number_of_threads(accumulate: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 3))
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, target = torch.randn(7, 2, 6, 6), torch.randn(7, 1, 2, 2)
    parameters = list(net.parameters())

    def gradients_of(share: slice) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        loss = (net(x[share]) - target[share]).square().mean()
        return torch.autograd.grad(loss, parameters), {"loss": loss.detach(), "one": torch.ones(())}

    found = []
    for threads in (1, 2, 3):
        with Workers(threads, CPU, accumulate, shares=4) as workers:
            logged = workers.gradients(gradients_of, len(x), iter(parameters))
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
        assert all(g.stride() == p.stride() for g, p in zip(gradients, parameters, strict=True))
        found.append([*gradients, *logged.values()])
    whole, logged = gradients_of(slice(None))
    for numbers in found:
        assert all(map(torch.equal, numbers, found[0]))
        torch.testing.assert_close(numbers, [*whole, *logged.values()], rtol=1e-5, atol=1e-6)


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with processes.joined(CPU):
        assert (processes.count(), processes.rank(), processes.is_first()) == (1, 0, True)
        assert processes.exchange("text") == ["text"]
        assert [processes.any_of(flag) for flag in (True, False)] == [True, False]
        assert processes.share_of([1, 2, 3]) == [1, 2, 3]
        assert processes.in_turn(lambda: 7) == 7
    assert not torch.distributed.is_initialized()


def test_processes_that_cannot_meet_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(processes.ProcessError, match="the 2 processes could not meet: port"),
        processes.joined(CPU),
    ):
        raise AssertionError


@pytest.mark.parametrize(
    ("name", "local_rank", "found"),
    [("cuda", "1", "cuda:1"), ("auto", "0", "cuda:0"), ("cuda", "2", None), ("cuda:1", "1", None)],
)
def test_each_process_of_a_machine_takes_its_own_gpu(
    name: str, local_rank: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # of the fixture that keeps "auto" on the CPU
    values = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": "4"}
    for key, value in values.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if found is None:
        with pytest.raises(ValueError, match=r"does not exist|one GPU for 4 processes"):
            device.resolve(name)
    else:
        assert device.resolve(name) == torch.device(found)


def test_threads_may_differ_from_call_to_call_where_shares_are_fixed() -> None:
    a, b = (override(Config(), [f"run.threads={n}"]) for n in (1, 2))
    assert _differing(a, b, ("run",)) == ["run.threads"]
    a, b = (override(config, ["run.shares=8"]) for config in (a, b))
    assert _differing(a, b, ("run",)) == []
