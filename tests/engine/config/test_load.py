"""Configuration: what is read, what wins, and the one line that each mistake gets."""

import dataclasses

import pytest

from engine.config.kinds import listed_epochs
from engine.config.load import SCHEMA, flatten, load_configs, to_yaml
from engine.config.schema import Config, impossible
from engine.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(content: str, name: str = "a.yaml"):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return path

    return write


def test_defaults_are_section_3_of_the_paper():
    config = Config()
    assert (config.train.epochs, config.train.batch_size) == (50, 512)
    assert (config.train.peak_lr, config.train.peak_epoch) == (0.1, 10)
    assert (config.data.noise_rate, config.data.augment) == (0.1, False)
    assert impossible(config) is None


def test_every_key_has_a_meaning_and_a_possible_default():
    for key, field in SCHEMA.items():
        assert field.metadata["meaning"], key
        assert field.metadata["kind"].parse(field.default) == field.default, key


def test_values_are_read_and_frozen(write):
    (config,) = load_configs(write("name: x\ntrain: {peak_lr: 1e-3, epochs: 20}\ndevice: cpu\n"))
    assert config.train.peak_lr == 1e-3  # PyYAML alone reads 1e-3 as text
    assert (config.name, config.train.epochs, config.device) == ("x", 20, "cpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.epochs = 3


def test_whole_numbers_serve_as_numbers(write):
    (config,) = load_configs(write("model: {width: 1}\ndata: {noise_rate: 0}\n"))
    assert (config.model.width, config.data.noise_rate) == (1.0, 0.0)


def test_an_empty_section_is_the_defaults(write):
    assert load_configs(write("name: x\ntrain:\n"))[0].train == Config().train


def test_extends_then_file_then_command_line(write, tmp_path):
    (tmp_path / "inner").mkdir()
    write("train: {epochs: 30, batch_size: 64, peak_lr: 0.5}\nseed: 1\n", "base.yaml")
    path = write("extends: ../base.yaml\ntrain: {epochs: 40, batch_size: 32}\n", "inner/b.yaml")
    (config,) = load_configs(path, ["train.epochs=45"])
    assert (config.train.epochs, config.train.batch_size, config.train.peak_lr) == (45, 32, 0.5)
    assert config.seed == 1


def test_sweep_is_the_product_and_the_last_key_varies_fastest(write):
    path = write("sweep:\n  data.noise_rate: [0.05, 0.1]\n  seed: [0, 1, 2]\n")
    found = [(c.data.noise_rate, c.seed) for c in load_configs(path)]
    assert found == [(0.05, 0), (0.05, 1), (0.05, 2), (0.1, 0), (0.1, 1), (0.1, 2)]


def test_sweep_keys_may_be_nested(write):
    path = write("sweep: {data: {noise_rate: [0.2, 0.3]}}\n")
    assert [c.data.noise_rate for c in load_configs(path)] == [0.2, 0.3]


def test_a_list_of_seeds_is_a_sweep(write):
    path = write("name: x\n")
    assert [c.seed for c in load_configs(path, ["seed=[3, 4]"])] == [3, 4]
    assert [c.seed for c in load_configs(write("seed: [5, 6]\n"))] == [5, 6]


def test_a_later_source_replaces_value_and_sweep_of_the_same_key(write):
    write("sweep: {data.noise_rate: [0.1, 0.2], seed: [0, 1]}\n", "base.yaml")
    path = write("extends: base.yaml\ndata: {noise_rate: 0.3}\n")
    assert [c.data.noise_rate for c in load_configs(path)] == [0.3, 0.3]
    assert len(load_configs(path, ["seed=7"])) == 1
    swept = load_configs(path, ["sweep.data.noise_rate=[0.4, 0.5, 0.6]", "seed=7"])
    assert [c.data.noise_rate for c in swept] == [0.4, 0.5, 0.6]


def test_keep_is_all_or_a_sorted_list(write):
    assert load_configs(write("name: x\n"))[0].checkpoints.keep == "all"
    (config,) = load_configs(write("checkpoints: {keep: [50, 0, 0]}\n"))
    assert config.checkpoints.keep == (0, 50)


@pytest.mark.parametrize(
    ("written", "last", "expected"),
    [
        ("all", 3, [0, 1, 2, 3]),
        ("[5, 0, 5]", 9, [0, 5]),
        ("[0, 5, ...]", 10, [0, 5, 10]),
        ("[0, 5, ...]", 12, [0, 5, 10, 12]),
        ("[1, 3, 5, ...]", 4, [1, 3, 4]),
        ("[0, 5, 10, ...]", 3, [0, 3]),
    ],
)
def test_a_list_of_epochs_may_go_on_to_the_last(write, written, last, expected):
    train = f"train: {{epochs: {last}, peak_epoch: 1}}\n"
    (config,) = load_configs(write(f"{train}rewinding: {{epochs: {written}}}\n"))
    assert listed_epochs(config.rewinding.epochs, last) == expected
    assert load_configs(write(to_yaml(config), "again.yaml")) == [config]


def test_a_resolved_configuration_can_be_read_again(write):
    content = "sweep: {seed: [1, 2]}\ncheckpoints: {keep: [0, 3]}\ntrain: {peak_lr: 1e-5}\n"
    for config in load_configs(write(content)):
        assert load_configs(write(to_yaml(config), "again.yaml")) == [config]


def test_a_circle_of_two_files_names_both(write):
    write("extends: b.yaml\nname: x\n", "a.yaml")
    path = write("extends: a.yaml\nname: y\n", "b.yaml")
    with pytest.raises(UserError, match=r"circle: b\.yaml -> a\.yaml -> b\.yaml"):
        load_configs(path)


def test_a_missing_file_gets_the_nearest_name(write, tmp_path):
    write("name: x\n", "quickstart.yaml")
    with pytest.raises(UserError, match=r"no such file; did you mean quickstart\.yaml\?"):
        load_configs(tmp_path / "quikstart.yaml")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00\x80" * 9)
    with pytest.raises(UserError, match="cannot be read"):
        load_configs(tmp_path / "a.yaml")


def test_the_mistake_of_an_extended_file_names_that_file(write):
    base = write("train: {epochs: 5}\n", "base.yaml")
    path = write("extends: base.yaml\ntrain: {peak_epoch: 7}\n")
    with pytest.raises(UserError) as caught:
        load_configs(path)
    assert str(caught.value).startswith(f"{path}: train.peak_epoch: 7")
    base.write_text("train: {epochs: none}\n")
    with pytest.raises(UserError) as caught:
        load_configs(path)
    assert "base.yaml: train.epochs: 'none' is not allowed" in str(caught.value)


def test_flatten_names_every_key():
    assert flatten(Config())["data.human_labels.column"] == "aggre_label"
    assert flatten(Config()).keys() == SCHEMA.keys()


def test_sweeping_is_advised_only_where_it_is_allowed(tiny):
    for key, advised in (("train.peak_lr", True), ("flipping.examples", False)):
        with pytest.raises(UserError) as error:
            tiny(f"{key}=[2,4]")
        assert ("sweep" in str(error.value)) is advised
