"""YAML -> frozen, typed, validated configurations, one for every run of a sweep.

Every key of a configuration file is a field in `engine/config/schema.py`. A value comes from, in
rising order: the default, the file named by `extends:`, the file itself, the command line's
`key.path=value`. `sweep:` maps key paths to lists; the product of the lists is the set of
runs. Everything is checked once, here: a `Config` is always a possible one.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from engine.config.kinds import FLOAT32_MAX, Kind, nearest
from engine.config.schema import Config, impossible
from engine.errors import UserError

COMMAND_LINE = "command line"
MOST_RUNS = 10_000
USUAL_NAMES = {  # of other programs
    "data.noise": "data.noise_rate",
    "train.lr": "train.peak_lr",
    "train.learning_rate": "train.peak_lr",
}


# ---------------------------------------------------------------- keys


def schema(section: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Map every key path of the configuration, in declaration order, to its field."""
    keys = {}
    for field in dataclasses.fields(section):
        if "kind" in field.metadata:
            keys[prefix + field.name] = field
        else:
            keys |= schema(field.default_factory, f"{prefix}{field.name}.")
    return keys


SCHEMA = schema()
TRAINED = ("data", "model", "train", "dropout")  # sections with keys that decide a training
SECTIONS = sorted({key.rpartition(".")[0] for key in SCHEMA} - {""})


def flatten(config: Config) -> dict[str, object]:
    """Map every key path to its value."""

    def value_of(key: str) -> object:
        value: object = config
        for part in key.split("."):
            value = getattr(value, part)
        return value

    return {key: value_of(key) for key in SCHEMA}


def defaults() -> dict[str, object]:
    return {key: field.default for key, field in SCHEMA.items()}


def describe_keys() -> list[tuple[str, str, str, str]]:
    """List key, default, allowed values and meaning of every key."""

    def written(value: object) -> str:
        if value is None:
            return "null"
        if isinstance(value, tuple):
            return f"[{', '.join(map(str, value))}]"
        return str(value).lower() if isinstance(value, bool) else str(value)

    return [
        (key, written(f.default), f.metadata["kind"].allowed, f.metadata["meaning"])
        for key, f in SCHEMA.items()
    ]


def _build(flat: Mapping[str, object], section: type = Config, prefix: str = "") -> Config:
    values = {}
    for field in dataclasses.fields(section):
        key = prefix + field.name
        values[field.name] = (
            flat[key] if key in SCHEMA else _build(flat, field.default_factory, key + ".")
        )
    return section(**values)


def to_yaml(config: Config) -> str:
    """Write the configuration as a file that any script takes."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------- reading YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key stands only once and 1e-3 is a number.

    Aliases are refused: a few lines of them can stand for more than a memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*) are not allowed", mark)
        return super().compose_node(parent, index)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = key_node.value
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key} stands twice", key_node.start_mark
            )
        seen.add(key if isinstance(key, str) else id(key_node))
    return yaml.SafeLoader.construct_mapping(loader, node)


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> object:
    """Construct a number; refuse the forms in which YAML 1.1 reads another one than is written."""
    tag = node.tag.rpartition(":")[2]
    octal = tag == "int" and re.fullmatch(r"[-+]?0[0-9_]+", node.value)
    if octal or ":" in node.value:
        problem = f"{node.value} is a number to the base {8 if octal else 60} in YAML"
        problem += "; write a decimal number, or put text into quotes"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return getattr(loader, f"construct_yaml_{tag}")(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
_Loader.add_constructor("tag:yaml.org,2002:float", _decimal)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+|\d*\.\d+|\d+\.)[eE][-+]?\d+$"),
    "-+.0123456789",
)


def _parse_yaml(source: str, content: str) -> object:
    try:
        return yaml.load(content, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UserError(f"{source}: not valid YAML{where}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or "nested too deeply"
        raise UserError(f"{source}: not valid YAML: {reason}") from None


@dataclass
class _Layer:
    """The content of one source: values and sweeps by key path."""

    source: str
    values: dict[str, object]
    sweeps: dict[str, list]
    extends: str | None = None


def _walk(source: str, tree: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield key paths and values of a nested mapping; refuse an unknown key."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in SCHEMA:
            yield key, value
        elif key in SECTIONS:
            if value is not None and not isinstance(value, Mapping):
                inner = ", ".join(
                    k.removeprefix(key + ".") for k in SCHEMA if k.startswith(key + ".")
                )
                raise UserError(f"{source}: {key}: {value!r} is not a section with keys {inner}")
            yield from _walk(source, value or {}, key + ".")
        else:
            raise UserError(f"{source}: {key}: unknown key{_spelling(key, prefix)}")


def _spelling(key: str, prefix: str = "") -> str:
    """Suggest the closest known key: by its whole path, else by its last part in any section."""
    known = [*SCHEMA, *SECTIONS, "extends", "sweep"]
    hint = f"; did you mean {USUAL_NAMES[key]}?" if key in USUAL_NAMES else nearest(key, known)
    if not hint:
        last = key.rpartition(".")[2]
        close = nearest(last, [k.rpartition(".")[2] for k in known])
        ending = close.removeprefix("; did you mean ").removesuffix("?")
        hint = next((f"; did you mean {k}?" for k in known if k.rpartition(".")[2] == ending), "")
    if not hint:
        here = [k for k in known if k.startswith(prefix)] if prefix else [*known]
        names = dict.fromkeys(k.removeprefix(prefix).partition(".")[0] for k in here)
        hint = "; allowed: " + ", ".join(names)
    return hint


def _read_layer(source: str, tree: object) -> _Layer:
    if tree is None:
        raise UserError(f"{source}: the file is empty; it needs at least one key, such as name:")
    if not isinstance(tree, Mapping):
        raise UserError(f"{source}: a configuration is a mapping 'key: value', not {tree!r:.60}")
    tree = dict(tree)
    extends, sweep = tree.pop("extends", None), tree.pop("sweep", None)
    if extends is not None and not isinstance(extends, str):
        raise UserError(f"{source}: extends: {extends!r} is not the name of one file")
    if sweep is not None and not isinstance(sweep, Mapping):
        raise UserError(f"{source}: sweep: {sweep!r} does not map key paths to lists of values")
    layer = _Layer(source, {}, {}, extends)
    for key, value in _walk(source, tree):
        _put(layer, key, value, swept=key == "seed" and isinstance(value, list))
    for key, value in _walk(source, sweep or {}):
        _put(layer, key, value, swept=True)
    return layer


def _put(layer: _Layer, key: str, value: object, swept: bool) -> None:
    """Enter one value after checking it; refuse a second one for its key in the same source."""
    if key in layer.sweeps or (swept and key in layer.values):
        raise UserError(f"{layer.source}: {key}: is swept, and set or swept a second time")
    if not swept:
        layer.values[key] = _checked(layer.source, key, value)
        return
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{layer.source}: sweep: {key}: {value!r} is not a list of values, such as "
            f"{key}: [{SCHEMA[key].default}]"
        )
    values = [_checked(layer.source, key, item) for item in value]
    if repeated := [item for i, item in enumerate(values) if item in values[:i]]:
        raise UserError(f"{layer.source}: sweep: {key}: {repeated[0]!r} stands twice in the list")
    layer.sweeps[key] = values


def _checked(source: str, key: str, value: object) -> object:
    kind: Kind = SCHEMA[key].metadata["kind"]
    try:
        return kind.parse(value)
    except (ValueError, OverflowError):
        large = isinstance(value, float) and FLOAT32_MAX < abs(value) < math.inf
        hint = f"; at most {FLOAT32_MAX:.2g}" if large else ""
        hint += nearest(value, kind.choices) if isinstance(value, str) else ""
        section = key.partition(".")[0]
        trained = section == key or section in TRAINED  # a measurement has one value at a time
        if isinstance(value, list) and key != "seed" and trained and not hint:
            hint = f"; to try several, write sweep: {{{key}: [...]}}"
        if key == "seed" and isinstance(value, str) and re.fullmatch(r"\d+(,\d+)+", value):
            hint = f"; for several seeds, write seed='[{value}]'"
        message = f"{source}: {key}: {_shown(value)} is not allowed: {kind.allowed}{hint}"
        raise UserError(message) from None


def _shown(value: object) -> str:
    """Format a value for a message; Python does not write numbers of thousands of digits."""
    try:
        return f"{value!r:.80}"
    except ValueError:
        return "a number that long"


def _file_layers(path: Path, chain: tuple[Path, ...] = ()) -> list[_Layer]:
    """Read the layers of a file, the extended one first."""
    try:
        if path.exists() and not path.is_file():  # opening a named pipe may never return
            raise UserError(f"{path}: cannot be read: it is not a regular file")
        content = path.read_text(encoding="utf-8")
        if path.resolve() in chain:
            names = " -> ".join(p.name for p in (*chain, path))
            raise UserError(f"{path}: extends: goes round in a circle: {names}")
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        asked = f"{chain[-1]}: extends: " if chain else ""
        raise UserError(f"{asked}{path}: no such file{nearest(path.name, beside)}") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    layer = _read_layer(str(path), _parse_yaml(str(path), content))
    if layer.extends is None:
        return [layer]
    return [*_file_layers(path.parent / layer.extends, (*chain, path.resolve())), layer]


def _override_layer(overrides: Sequence[str]) -> _Layer:
    layer = _Layer(COMMAND_LINE, {}, {})
    for override in overrides:
        path, equals, written = override.partition("=")
        if not equals or not path:
            raise UserError(f"{COMMAND_LINE}: {override!r} is not of the form key.path=value")
        key = path.removeprefix("sweep.")
        if key not in SCHEMA:
            raise UserError(f"{COMMAND_LINE}: {path}: unknown key{_spelling(key)}")
        value = _parse_yaml(f"{COMMAND_LINE}: {path}", written)
        if key in layer.values:
            raise UserError(f"{COMMAND_LINE}: {path}: is set twice")
        _put(layer, key, value, path != key or (key == "seed" and isinstance(value, list)))
    return layer


# ---------------------------------------------------------------- the configurations of a command


def load_configs(path: str | Path, overrides: Sequence[str] = ()) -> list[Config]:
    """List the runs that a file asks for, in the order of its sweep (last key fastest)."""
    values, sweeps, sources = {}, {}, {}
    for layer in [*_file_layers(Path(path)), _override_layer(overrides)]:
        # A later source's value replaces an earlier one's sweep of the same key, and vice versa.
        for key, value in layer.values.items():
            sweeps.pop(key, None)
            values[key], sources[key] = value, layer.source
        for key, value in layer.sweeps.items():
            values.pop(key, None)
            sweeps[key], sources[key] = value, layer.source
    if (count := math.prod(map(len, sweeps.values()))) > MOST_RUNS:
        raise UserError(
            f"{path}: sweep: asks for {count:,} runs; at most {MOST_RUNS:,} are allowed"
        )
    configs = []
    for combination in itertools.product(*sweeps.values()):
        config = _build(defaults() | values | dict(zip(sweeps, combination)))
        if problem := impossible(config):
            key, message = problem
            raise UserError(f"{sources.get(key, path)}: {key}: {message}")
        configs.append(config)
    return configs
