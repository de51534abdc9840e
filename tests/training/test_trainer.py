import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import diffusion
from training.commands import train
from training.config import OptimizerConfig, load_config
from training.ema import EMA
from training.runlog import Meter, RunLog
from training.state import StateError, find_state, save_state
from training.trainer import Trainer, learning_rate


def run(config_file: Path, folder: Path, *overrides: str, resume: bool = False) -> Trainer:
    trainer = Trainer(load_config(config_file, overrides), folder, progress=False)
    if resume:
        trainer.resume()
    trainer.run()
    return trainer


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "state" / "state.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_learning_rate_warms_up_stays_and_decays_to_zero() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, decay_steps=5)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:16] == [1.0] * 12
    assert rates[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_ema_is_the_recursion() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    ema = EMA([parameter], decay=0.5)
    expected = 1.0
    for n in range(1, 12):
        with torch.no_grad():
            parameter.fill_(float(n))
        ema.update(n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert float(ema.shadow[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(
    config_file: Path, tmp_path: Path, dropout: float
) -> None:
    option = f"network.dropout={dropout}"
    run(config_file, tmp_path / "whole", option)
    run(config_file, tmp_path / "cut", option, "steps=3")
    assert not same(state(tmp_path / "whole"), state(tmp_path / "cut"))
    run(config_file, tmp_path / "cut", option, resume=True)
    assert same(state(tmp_path / "whole"), state(tmp_path / "cut"))
    logs = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("whole", "cut")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_accumulation_matches_one_large_batch(
    config_file: Path, tmp_path: Path, dropout: float
) -> None:
    option = f"network.dropout={dropout}"
    run(config_file, tmp_path / "one", option)
    run(config_file, tmp_path / "parts", option, "accumulate=2")
    one, parts = state(tmp_path / "one"), state(tmp_path / "parts")
    for name in one:
        if name.startswith("weights."):
            # Adam's first steps divide rounding noise by itself where a gradient is zero.
            assert torch.allclose(one[name], parts[name], atol=2e-3)


def test_the_loss_falls_and_the_checkpoint_samples(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(
        config_file,
        folder,
        "steps=150",
        "optimizer.learning_rate=5e-3",
        "sample_every=150",
        "sample_images=4",
        "sample_steps=5",
        "checkpoint_every=150",
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert sum(losses[-30:]) < 0.7 * sum(losses[:30])
    model = diffusion.load(folder)
    assert model.config.class_names == ("dark", "light")
    images = diffusion.sample(model, 2, steps=5, class_label=[0, 1], dtype=torch.float32)
    assert images.shape == (2, 1, 8, 8)
    assert (folder / "samples" / "step-0000150.png").is_file()
    assert list((folder / "tensorboard").iterdir())


def test_starting_from_a_checkpoint_keeps_its_weights(config_file: Path, tmp_path: Path) -> None:
    run(config_file, tmp_path / "first")
    started = Trainer(load_config(config_file), tmp_path / "second", init=tmp_path / "first")
    weights = load_file(tmp_path / "first" / "model.safetensors")
    assert all(torch.equal(p, weights[n]) for n, p in started.network.named_parameters())
    with pytest.raises(StateError, match="does not fit the configured network"):
        Trainer(
            load_config(config_file, ["network.res_blocks=2"]),
            tmp_path / "third",
            init=tmp_path / "first",
        )


WILD = ["optimizer.learning_rate=1e20", "optimizer.warmup_steps=0"]


def test_a_diverged_loss_stops_the_run(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"the loss is nan: the run has diverged; .* Lower "):
        run(config_file, tmp_path / "run", *WILD, "checkpoint_every=100")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "metrics.jsonl",
        "tensorboard",
        "train.json",
    ]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(math.isfinite(json.loads(line)["loss"]) for line in lines)


@pytest.mark.slow
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    config_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(config_file, folder, "steps=4")
    kept = {name: (folder / name).read_bytes() for name in KEPT}
    rarely = ["log_every=1000", "checkpoint_every=1", "sample_every=1", "steps=40"]
    out, err = ended(start(config_file, folder, "--resume", *WILD, *rarely), code=1)
    assert "the run has diverged; the checkpoint of step" in err
    assert "Lower optimizer.learning_rate = 1e+20, raise optimizer.warmup_steps = 0" in err
    assert "and go on with --resume" in err and "Traceback" not in err
    # Step 5 was made of a finite loss, and left finite weights of 1e20: no checkpoint either.
    assert "the checkpoint of step 4 is kept" in err
    assert kept == {name: (folder / name).read_bytes() for name in KEPT}
    calm = ["optimizer.learning_rate=1e-4", "optimizer.warmup_steps=0", "steps=6"]
    out, err = ended(start(config_file, folder, "--resume", *calm), code=0)
    assert "at step 4 of 6" in err and "step 6 of 6" in out


KEPT = ["model.safetensors", "config.json", "state/state.safetensors", "state/progress.json"]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("weights", "the loss is inf"),
        ("ema", r"ema\.\S+ is not finite"),
        ("exp_avg_sq", r"exp_avg_sq\.\S+ is not finite"),
    ],
)
def test_nothing_is_saved_while_any_part_is_not_finite(
    config_file: Path, tmp_path: Path, kind: str, says: str
) -> None:
    folder = tmp_path / "run"
    trainer = run(config_file, folder, "steps=2")
    kept = {name: (folder / name).read_bytes() for name in KEPT}
    p = trainer.network.conv_out.bias
    moment = trainer.optimizer.state[p]["exp_avg_sq"]
    parts = {"weights": p, "ema": trainer.ema.shadow[-1], "exp_avg_sq": moment}
    with torch.no_grad():
        parts[kind].view(-1)[0] = float("inf")
    trainer.step = 3
    with pytest.raises(StateError, match=rf"{says}: .* of step 2 is kept"):
        trainer.save()
    assert kept == {name: (folder / name).read_bytes() for name in KEPT}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("prediction=v", "prediction = 'v' (was 'epsilon')"),
        ("schedule.T=30", "schedule.T = 30 (was 20)"),
        ("schedule.beta_end=0.1", "schedule.beta_end = 0.1 (was 0.02)"),
        ("objective=vlb", "objective = 'vlb' (was 'simple')"),
        ("batch_size=2", "batch_size = 2 (was 4)"),
        ("seed=1", "seed = 1 (was 0)"),
        ("data.source=other", "data.source = 'other' (was '"),
        ("network.num_classes=3", "network.num_classes = 3 (was 2)"),
        ("network.channels=[8,16]", "network.channels = [8, 16] (was [8, 8])"),
    ],
)
def test_another_configuration_is_not_resumed(
    config_file: Path, tmp_path: Path, override: str, says: str
) -> None:
    folder = tmp_path / "run"
    Trainer(load_config(config_file), folder, progress=False).save()
    before = (folder / "train.json").read_bytes()
    for first in (str(config_file), str(folder)):  # a configuration, or the run itself
        arguments = [first, "--resume", "--quiet", "--out", str(folder), override, "steps=9"]
        result = CliRunner().invoke(train, arguments)
        assert result.exit_code == 1 and says in result.output, result.output
        assert "what may change is accumulate, checkpoint_every" in result.output
        assert "steps = 9" not in result.output
    assert (folder / "train.json").read_bytes() == before


def test_a_run_folder_is_all_that_resuming_needs(config_file: Path, tmp_path: Path) -> None:
    run(config_file, tmp_path / "whole")
    run(config_file, tmp_path / "cut", "steps=3")
    stored = json.loads((tmp_path / "cut" / "train.json").read_text())
    stored["sigma"] = stored.pop("variance")  # as a run of an older version has it
    (tmp_path / "cut" / "train.json").write_text(json.dumps(stored))
    result = CliRunner().invoke(train, ["--resume", str(tmp_path / "cut"), "steps=6", "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("the key sigma is now called variance") == 1
    assert f"resuming {tmp_path / 'cut'} at step 3 of 6" in result.stderr
    assert same(state(tmp_path / "whole"), state(tmp_path / "cut"))
    written = json.loads((tmp_path / "cut" / "train.json").read_text())
    assert written["steps"] == 6 and written["variance"] == "large" and "sigma" not in written


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("state/progress.json", b"{", "state/progress.json: damaged: "),
        ("state/progress.json", b"[]", "state/progress.json: damaged: must be a table with step"),
        ("state/progress.json", b'{"step": "4"}', "damaged: must be a table with step"),
        ("state/progress.json", b'{"step": null}', "damaged: must be a table with step"),
        ("state/progress.json", b"\xff", "state/progress.json: damaged: "),
        ("state/state.safetensors", b"", "state: broken state: "),
        ("train.json", b"{", "train.json: damaged: "),
        ("train.json", b"[]", "train.json: damaged: not a table"),
        ("train.json", b"{}", "train.json: data: missing; this version cannot go on with the run"),
        ("train.json", None, "no run to resume"),
    ],
)
def test_a_damaged_run_is_one_sentence(
    config_file: Path, tmp_path: Path, file: str, content: bytes | None, says: str
) -> None:
    folder = tmp_path / "run"
    Trainer(load_config(config_file), folder, progress=False).save()
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    result = CliRunner().invoke(train, ["--resume", str(folder), "--quiet"])
    assert result.exit_code == 1 and says in result.output
    assert "Traceback" not in result.output and len(result.output.strip().splitlines()) == 1


def test_a_log_that_was_cut_off_is_no_obstacle(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(config_file, folder, "steps=2")
    with (folder / "metrics.jsonl").open("ab") as log:
        log.write(b'{"step": 3, "loss"\n{}\nnull\n\xff}\n')
    run(config_file, folder, "steps=4", resume=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def start(config_file: Path, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "ddpm", "train", str(config_file), "--out", str(folder)]
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: "subprocess.Popen[str]", code: int) -> tuple[str, str]:
    """What a process printed, once it has ended with this code."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def saved_step(folder: Path) -> int:
    try:
        return int(json.loads((folder / "state" / "progress.json").read_text())["step"])
    except FileNotFoundError:  # none yet, or the instant between two renames
        return 0


def wait_for_checkpoint(folder: Path, after: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while saved_step(folder) <= after:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.05)


def logged_steps(folder: Path) -> int:
    return (folder / "metrics.jsonl").read_text().count("}\n")


@pytest.mark.slow
def test_kill_loses_one_interval_at_most_and_ctrl_c_nothing(
    config_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    endless = ["steps=100000", "checkpoint_every=10"]
    process = start(config_file, folder, *endless)
    wait_for_checkpoint(folder, 10, process)
    process.kill()
    process.communicate()
    saved = saved_step(folder)
    assert saved % 10 == 0
    assert logged_steps(folder) - 10 <= saved <= logged_steps(folder)

    process = start(config_file, folder, "--resume", *endless)
    wait_for_checkpoint(folder, saved, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"resuming {folder} at step {saved}" in err
    assert f"step {saved_step(folder)} of 100000" in out
    assert saved_step(folder) == logged_steps(folder)

    process = start(config_file, folder)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "holds a run already; --resume goes on" in err


def test_a_full_disk_keeps_the_previous_checkpoint(
    config_file: Path, tmp_path: Path, small_disk: Path
) -> None:
    trainer = Trainer(load_config(config_file), small_disk / "run")
    trainer.save()
    before = state(small_disk / "run")
    (small_disk / "filler").write_bytes(b"0" * (os.statvfs(small_disk).f_bavail * 4096 - 8192))
    trainer.step = 1
    with pytest.raises(StateError, match="the disk is full; the previous one is kept"):
        trainer.save()
    assert same(before, state(small_disk / "run"))


def test_the_only_state_outlives_a_full_disk(
    config_file: Path, tmp_path: Path, small_disk: Path
) -> None:
    """That a kill between the two renames left as state.old."""
    run = small_disk / "run"
    trainer = Trainer(load_config(config_file), run)
    trainer.save()
    before = state(run)
    (run / "state").rename(run / "state.old")
    (small_disk / "filler").write_bytes(b"0" * (os.statvfs(small_disk).f_bavail * 4096 - 8192))
    with pytest.raises(StateError, match="the disk is full; the previous one is kept"):
        save_state(run, before, step=1)
    assert find_state(run) == run / "state" and same(before, state(run))


def test_a_log_is_shortened_whole_or_not_at_all(tmp_path: Path, small_disk: Path) -> None:
    log = small_disk / "metrics.jsonl"
    lines = "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(5000))
    log.write_text(lines)
    (small_disk / "filler").write_bytes(b"0" * os.statvfs(small_disk).f_bavail * 4096)
    with pytest.raises(OSError, match="No space left"):
        RunLog(small_disk, 4000)
    assert log.read_text() == lines


def test_the_loss_is_the_mean_since_the_last_reading_whatever_paused_the_clock() -> None:
    meter = Meter(batch_size=1)
    for step in range(4):
        meter.add(torch.tensor(float(step)))
        if step == 1:
            with meter.paused():
                time.sleep(0.2)
    values = meter.read()
    assert values["loss"] == 1.5 and values["images_s"] > 4 / 0.2


def test_passes_of_all_processes_are_of_different_images(config_file: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_config(config_file, ["batch_size=16", "accumulate=4"]), tmp_path / "r")
    starts = []
    for process in range(2):
        trainer.accelerator = SimpleNamespace(num_processes=2, process_index=process)
        starts += [trainer._first(part) for part in range(4)]
    assert sorted(starts) == [*range(0, 16, 2)] and trainer._micro() == 2


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(
            ["network.dropout=0.2", "timesteps=importance", "accumulate=2"], marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_train_as_one(config_file: Path, tmp_path: Path, options: list[str]) -> None:
    run(config_file, tmp_path / "one", *options)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ddpm"]
    launch += ["train", str(config_file), "--out", str(tmp_path / "two"), "--quiet", *options]
    parts = 4 if "accumulate=2" in options else 2
    odd = [*launch, f"batch_size={3 * parts // 2}"]
    refused = subprocess.run(odd, capture_output=True, text=True).stderr
    assert f"must be a multiple of processes × accumulate = {parts}" in refused, "there are two"
    subprocess.run(launch, check=True)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for name in one:
        if name.startswith("weights."):
            assert torch.allclose(one[name], two[name], atol=2e-3)


def test_quiet_shows_no_bar_and_without_it_all_of_them(config_file: Path, tmp_path: Path) -> None:
    shown = {}
    for name, options in {"loud": [], "quiet": ["--quiet"]}.items():
        arguments = [str(config_file), "--out", str(tmp_path / name), *options]
        result = CliRunner().invoke(train, arguments)
        assert result.exit_code == 0, result.output
        shown[name] = result.stderr
    assert "decoding" in shown["loud"] and "step/s" in shown["loud"]
    assert "%|" not in shown["quiet"]


def test_few_steps_on_the_way_are_warned_of_once_in_words(
    config_file: Path, tmp_path: Path
) -> None:
    options = ["steps=2", "sample_every=1", "sample_steps=1", "sample_images=2"]
    arguments = [str(config_file), *options, "--out", str(tmp_path / "r"), "--quiet"]
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if "few for ddim" in line]
    assert len(told) == 1 and told[0].startswith("warning: 1 evaluation is few"), result.stderr
    assert ".py" not in result.stderr


def test_groups_of_one_channel_are_warned_of(config_file: Path, tmp_path: Path) -> None:
    said = {}
    for groups in (4, 8):
        options = [f"network.groups={groups}", "--out", str(tmp_path / str(groups)), "--quiet"]
        result = CliRunner().invoke(train, [str(config_file), *options])
        assert result.exit_code == 0, result.output
        said[groups] = result.stderr
    assert "warning" not in said[4]
    assert "network.groups = 8 makes each of the 8 channels of level 1" in said[8]
