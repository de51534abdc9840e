from pathlib import Path

import pytest

from training.config import ConfigError, load_config

SHIPPED = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.toml"))


def test_overrides_replace_values_of_the_file(config_file: Path) -> None:
    overrides = ["steps=9", "--optimizer.learning_rate=5e-4", "network.channels=[8,16]"]
    config = load_config(config_file, overrides)
    assert (config.steps, config.optimizer.learning_rate) == (9, 5e-4)
    assert config.network.channels == (8, 16)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "stepz: unknown key"),
        ("steps=0", "steps = 0"),
        ("steps=many", "steps = 'many'"),
        ("network.chanels=[8]", "'chanels'; allowed: image_size"),
        ("network.channels=[9,8]", "multiples of groups = 4"),
        ("schedule.kind=sine", "'sine': must be one of linear, cosine, betas"),
        ("prediction=noise", "prediction = 'noise': must be one of epsilon"),
        ("accumulate=3", "batch_size = 4: must be a multiple of accumulate = 3"),
        ("steps", "must look like key=value"),
        ("steps.more=1", "steps is not a table"),
        ("sample_steps=21", "sample_steps = 21: must be 1..20"),
        ("schedule.beta_start=1.5", "beta_start = 1.5"),
        ("schedule.beta_start=nan", "beta_start = nan"),
        ("schedule.beta_start=0", "schedule: betas[0] = 0.0"),
        ("schedule.beta_end=abc", "beta_end = 'abc'"),
    ],
)
def test_a_bad_key_or_value_is_named(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(config_file, [override])
    assert message in str(error.value)


def test_a_schedule_of_one_step_is_not_learned(config_file: Path) -> None:
    learned = ["schedule.kind=learned", "objective=vlb", "schedule.T=1", "sample_steps=1"]
    with pytest.raises(ConfigError, match=r"schedule\.T = 1: must be 2 or more to be learned"):
        load_config(config_file, learned)


def test_a_bad_default_of_sampling_is_named_itself(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^sampling: steps = 50"):
        load_config(config_file, ["sampling.steps=50"]).model()


def test_the_old_name_of_variance_is_still_read(config_file: Path) -> None:
    with pytest.warns(FutureWarning, match=r"override 'sigma=small': the key sigma is now called"):
        assert load_config(config_file, ["sigma=small"]).variance == "small"
    config_file.write_text('sigma = "small"\n' + config_file.read_text())
    with pytest.warns(FutureWarning, match=r"tiny.toml: the key sigma is now called variance"):
        assert load_config(config_file).variance == "small"


def test_a_missing_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder; the names cifar10, mnist"):
        load_config(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(broken)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.steps >= 1
    assert config.model().network.image_size == 32
