"""Configuration: what is read, what wins, and the one line that each mistake gets."""

import dataclasses

import pytest

from engine.config import SCHEMA, flatten, load_configs, to_yaml
from engine.errors import UserError
from engine.options import listed_epochs
from engine.settings import Config, impossible


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


# Content of the file, overrides, and what the line must say after the name of the file.
BAD = [
    ("data: {noise_rate: 1.2}", [], "data.noise_rate: 1.2 is not allowed: a number from 0 to 1"),
    ("data: {noise_rate: -0.1}", [], "data.noise_rate: -0.1 is not allowed"),
    ("data: {noise_rate: .nan}", [], "data.noise_rate: nan is not allowed"),
    ("data: {noise_rate: ten}", [], "data.noise_rate: 'ten' is not allowed: a number"),
    ("data: {noise_rate: true}", [], "data.noise_rate: True is not allowed: a number"),
    ("data: {noise_rate: null}", [], "data.noise_rate: None is not allowed"),
    ("data: {noise_rate: [0.1, 0.2]}", [], "to try several, write sweep: {data.noise_rate: [...]}"),
    ("train: {epochs: 0}", [], "train.epochs: 0 is not allowed: a whole number from 1 to 100000"),
    ("train: {epochs: 2.5}", [], "train.epochs: 2.5 is not allowed: a whole number"),
    ("train: {epochs: '20'}", [], "train.epochs: '20' is not allowed: a whole number"),
    ("train: {epochs: 5}", [], "train.peak_epoch: 10 is not allowed: at most train.epochs"),
    ("train: {peak_lr: 0}", [], "train.peak_lr: 0 is not allowed: a number above 0"),
    ("train: {peak_lr: .inf}", [], "train.peak_lr: inf is not allowed"),
    ("train: {batch_size: 1}", [], "train.batch_size: 1 is not allowed"),
    ("train: {schedule: triangel}", [], "did you mean triangle?"),
    ("train: {account_gradients: 1}", [], "1 is not allowed: true or false"),
    ("model: {name: resnet18}", [], "'resnet18' is not allowed: one of resnet9, resnet50"),
    ("model: {name: resnet-9}", [], "did you mean resnet9?"),
    ("model: {name: vit_small, width: 0.5}", [], "model.width: 0.5 is not allowed: only resnet9"),
    ("model: {depth: 3}", [], "model.depth: 3 is not allowed: only vit_small takes it"),
    ("data: {name: minst}", [], "did you mean mnist?"),
    ("data: {name: npz}", [], "data.path: null is not allowed: data.name npz needs"),
    ("data: {name: mnist, path: x.npz}", [], "only data.name npz takes a path"),
    ("data: {split: human, name: mnist}", [], "data.split: 'human' is not allowed"),
    ("data: {split: atypical, name: svhn}", [], "no scores are published for svhn"),
    ("data: {keep_memorized: true}", [], "data.keep_memorized: true is not allowed"),
    ("data: {train_size: 1}", [], "data.train_size: 1 is not allowed"),
    ("data: {human_labels: {column: worse}}", [], "did you mean worse_label?"),
    ("data: mnist", [], "data: 'mnist' is not a section with keys name, root"),
    ("data: {nois_rate: 0.1}", [], "data.nois_rate: unknown key; did you mean data.noise_rate?"),
    ("noise_rate: 0.1", [], "noise_rate: unknown key; did you mean data.noise_rate?"),
    ("trian: {epochs: 3}", [], "trian: unknown key; did you mean train?"),
    ("zzzzzz: 3", [], "zzzzzz: unknown key; allowed: name, output_dir"),
    ("1: 3", [], "1: unknown key"),
    ("seed: -1", [], "seed: -1 is not allowed"),
    ("seed: [0, 0]", [], "seed: 0 stands twice in the list"),
    ("seed: []", [], "seed: [] is not a list of values"),
    ("checkpoints: {keep: some}", [], "checkpoints.keep: 'some' is not allowed: all, or a list"),
    ("checkpoints: {keep: [0, 60]}", [], "checkpoints.keep: 60 is not allowed: at most"),
    ("checkpoints: {keep: [-1]}", [], "checkpoints.keep: [-1] is not allowed"),
    ("rewinding: {epochs: [0, 60]}", [], "rewinding.epochs: 60 is not allowed: at most"),
    ("rewinding: {epochs: [...]}", [], "is not allowed: all, or a list of epochs such as [0, 5"),
    ("rewinding: {epochs: [0, 5, 7, ...]}", [], "rewinding.epochs: [0, 5, 7, '...'] is not"),
    ("rewinding: {epochs: [5, 0, ...]}", [], "rewinding.epochs: [5, 0, '...'] is not allowed"),
    ("rewinding: {epochs: 5}", [], "rewinding.epochs: 5 is not allowed"),
    ("checkpoints: {keep: [0, 5, ...]}", [], "checkpoints.keep: [0, 5, '...'] is not allowed"),
    ("rewinding: {batchnorm: last}", [], "'last' is not allowed: one of final, checkpoint"),
    ("retraining: {epochs: 5}", [], "retraining.peak_epoch: 10 is not allowed: at most"),
    ("retraining: {patience: 0}", [], "retraining.patience: 0 is not allowed"),
    ("sweep: {data.noise_rate: 0.1}", [], "data.noise_rate: 0.1 is not a list of values"),
    ("sweep: {data.noise_rate: [0.1, 7]}", [], "data.noise_rate: 7 is not allowed"),
    ("sweep: {data.noise: [0.1]}", [], "data.noise: unknown key; did you mean data.noise_"),
    ("sweep: [seed]", [], "sweep: ['seed'] does not map key paths to lists"),
    ("sweep: {seed: [0], seed: [1]}", [], "seed stands twice"),
    ("sweep: {data.noise_rate: [0], data: {noise_rate: [1]}}", [], "swept a second time"),
    ("seed: 3\nsweep: {seed: [0, 1]}", [], "seed: is swept, and set"),
    ("seed: 3\nseed: 4", [], "seed stands twice"),
    ("train: {epochs: 20, epochs: 30}", [], "epochs stands twice"),
    ("data: {name: mnist", [], "not valid YAML (line 1"),
    ("a: b: c", [], "not valid YAML"),
    ("name: \tx\n\t- y", [], "not valid YAML"),
    ("name: !!python/object/apply:os.system ['true']", [], "not valid YAML"),
    ("date: 2023-99-99", [], "not valid YAML"),
    ("", [], "the file is empty"),
    ("# only a comment\n", [], "the file is empty"),
    ("- a\n- b", [], "a configuration is a mapping"),
    ("just text", [], "a configuration is a mapping"),
    ("extends: [a, b]", [], "extends: ['a', 'b'] is not the name of one file"),
    ("extends: nowhere.yaml", [], "nowhere.yaml: no such file"),
    ("extends: a.yaml", [], "goes round in a circle: a.yaml -> a.yaml"),
    ("name: ''", [], "name: '' is not allowed: text"),
    ("device: gpu", [], "device: 'gpu' is not allowed: one of auto, cpu, cuda"),
    ("precision: fp16", [], "precision: 'fp16' is not allowed: one of fp32, tf32, bf16"),
    ("name: x", ["train.epochs"], "'train.epochs' is not of the form key.path=value"),
    ("name: x", ["train.epoch=3"], "train.epoch: unknown key; did you mean train.epochs?"),
    ("name: x", ["train.epochs=many"], "command line: train.epochs: 'many' is not allowed"),
    ("name: x", ["train.epochs=[1"], "command line: train.epochs: not valid YAML"),
    ("name: x", ["seed=1", "seed=2"], "command line: seed: is set twice"),
    ("name: x", ["sweep.seed=[1]", "seed=2"], "command line: seed"),
    ("name: x", ["train.epochs=5"], "train.peak_epoch: 10 is not allowed"),
]


@pytest.mark.parametrize(("content", "overrides", "expected"), BAD)
def test_a_mistake_gets_one_line(write, content, overrides, expected):
    path = write(content)
    with pytest.raises(UserError) as caught:
        load_configs(path, overrides)
    line = str(caught.value)
    assert expected in line
    assert "\n" not in line
    assert line.startswith("command line" if overrides and "peak_epoch" not in line else str(path))


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
