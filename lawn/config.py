"""The whole configuration as dataclasses: every key a user can set, validated once after Hydra has composed it.

A field that is None does not apply to the chosen member of its group (SGD has no betas); the YAML files under
conf/ give the values. Units: epochs are passes over the training set; E_free and E_warmup may be fractions.
"""

import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from lawn.errors import ConfigError


@dataclass
class DatasetConfig:
    name: str = MISSING
    seed: int = 0  # draws the validation split, the subset and the candidates: the same for every run seed
    limit: int | None = None  # images: train on that many, drawn at random
    val_fraction: float | None = None  # images: share of the training set held out by eval.split=val
    image_size: int | None = None  # ImageNet: side of the training and evaluation crop, pixels
    workers: int | None = None  # ImageNet: decoding processes
    loader: str | None = None  # ImageNet: torch (the default) or dali, which decodes on the GPU
    shards: str | None = None  # ImageNet: folder or URL of shards (scripts/make_shards.py) to stream; null: folders
    prefix: str | None = None  # recommenders: read three files of this name (He et al. 2017); null: GroupLens' file
    negatives: int | None = None  # recommenders: fresh negatives per positive and epoch
    candidates: int | None = None  # recommenders: items that the held-out one is ranked against


@dataclass
class ModelConfig:
    name: str = MISSING
    widths: list[int] | None = None  # mlp: hidden widths
    batch_norm: bool | None = None  # vgg19
    bias: bool | None = None  # vgg19, ncf_mlp: false, and no batch norm, makes the network fully homogeneous
    factors: int | None = None  # ncf_mlp: width of the last hidden layer ("predictive factors")
    layers: int | None = None  # ncf_mlp: hidden layers
    init: str | None = None  # ncf_mlp: he2017 or torch


@dataclass
class OptimConfig:
    name: str = MISSING
    lr: float = MISSING  # peak learning rate
    betas: list[float] | None = None
    eps: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    weight_decay: float | None = None  # on weights with two or more dimensions
    free_epochs: float | None = None  # LAWN: E_free
    scope: str | None = None  # LAWN: all weights (the default), or those of the final_homogeneous sub-network
    include_bias: bool | None = None  # LAWN: a layer's bias shares the norm of its weight
    fused: bool | None = None  # false: torch's plain step, and of LAWN too; null: a fused one where there is one


@dataclass
class LossConfig:
    name: str = MISSING
    smoothing: float | None = None  # label_smoothing: share of the target that is spread over all classes
    gamma: float | None = None  # focal
    level: float | None = None  # flooding: the training loss to stay at, nats


@dataclass
class ScheduleConfig:
    name: str = MISSING
    warmup_epochs: float = MISSING  # E_warmup


@dataclass
class TrainConfig:
    epochs: int = MISSING  # E_total
    batch_size: int = MISSING  # of all ranks together; recommenders count positives and negatives
    micro_batch_size: int | None = None  # at most so many samples at once on a rank; their gradients are added up
    devices: int | None = None  # ranks on this machine, each with its own GPU or its share of the CPU; null: 1
    vectorize: int | None = None  # train so many runs of a multirun at once as one batched model, where they allow it
    sync_batchnorm: bool | None = None  # batch norm over the parts of all ranks; else over each part by itself
    precision: str | None = None  # fp32, tf32 or bf16; this and the next two: null chooses by device and model
    channels_last: bool | None = None  # layout of images and convolutions
    compile: str | None = None  # off, default or reduce-overhead (CUDA graphs): modes of torch.compile
    logit_scale: float | None = None  # LAWN: multiply the output layer by this at the switch (Figure 1)
    checkpoint_seconds: float = 30.0  # at most one checkpoint in that time, and one at the end


@dataclass
class EvalConfig:
    split: str = "test"  # test, or val: the held-out part of the training set
    every: int = 1  # epochs between evaluations; the last epoch is always evaluated


@dataclass
class LoggerConfig:
    name: str = "csv"
    project: str | None = None
    mode: str | None = None  # wandb: online, offline or disabled


@dataclass
class Config:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = 0  # initialization, order, augmentation, negatives
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    data_dir: str = "data"  # holds one folder for each dataset
    runs_dir: str = "runs"  # holds the run directories
    run_dir: str | None = None  # this run's directory, instead of one named after its hash


GROUPS = ("dataset", "model", "optim", "loss", "schedule", "logger")
# What a run gives does not depend on these, so its identity does not either.
_NOT_IDENTITY = ("logger", "device", "data_dir", "runs_dir", "run_dir")
_SPEED = {
    "dataset": ("shards", "workers"),
    "optim": ("fused",),
    "train": ("channels_last", "checkpoint_seconds", "compile", "devices", "vectorize"),
}


def register() -> None:
    """Make the schema known to Hydra, and `scaled` to the YAML files; call before composing.

    `${scaled:E,T}` is E epochs of a run of T epochs, in proportion to this run's train.epochs.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver(
        "scaled", lambda epochs, budget, *, _root_: epochs * _root_.train.epochs / budget, replace=True
    )


def validate(composed: DictConfig) -> Config:
    """Resolve a composed config and check every value. Raises ConfigError with one line that names the key."""
    _refuse_unknown_keys(composed, Config, "")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(config, Config)
    for problem in _problems(config):
        raise ConfigError(problem)
    return config


def _refuse_unknown_keys(node: DictConfig, schema: type, prefix: str) -> None:
    """Hydra's `+key=value` adds to a dataclass what it does not have."""
    for key in map(str, node):
        section = next((f for f in fields(schema) if f.name == key), None)
        if section is None:
            raise ConfigError(f"{prefix}{key}: no such key; {_takes(prefix.rstrip('.'))}")
        if is_dataclass(section.default_factory):
            _refuse_unknown_keys(node[key], section.default_factory, f"{key}.")


def _takes(section: str) -> str:
    """The keys of a section of the config; of the config itself for any other word."""
    default = Config()
    owner = getattr(default, section, None)
    name, owner = (section, owner) if is_dataclass(owner) else ("the config", default)
    return f"{name} takes {', '.join(vars(owner))}"


def _problems(c: Config) -> Iterator[str]:
    """What is wrong, a line each, in the order to be reported."""
    lower_bounds: dict[str, tuple[float, bool]] = {  # key: bound, whether the bound itself is allowed
        "train.epochs": (0, False),  # first: the defaults of others are in proportion to it
        "dataset.limit": (0, False),
        "dataset.val_fraction": (0, False),
        "dataset.image_size": (0, False),
        "dataset.workers": (0, True),
        "dataset.negatives": (0, False),
        "dataset.candidates": (0, False),
        "model.factors": (0, False),
        "model.layers": (0, False),
        "optim.lr": (0, False),
        "optim.eps": (0, True),
        "optim.momentum": (0, True),
        "optim.weight_decay": (0, True),
        "optim.free_epochs": (0, True),
        "loss.smoothing": (0, True),
        "loss.gamma": (0, True),
        "loss.level": (0, True),
        "schedule.warmup_epochs": (0, True),
        "train.batch_size": (0, False),
        "train.micro_batch_size": (0, False),
        "train.devices": (0, False),
        "train.vectorize": (0, False),
        "train.checkpoint_seconds": (0, True),
        "eval.every": (0, False),
        "dataset.seed": (0, True),
        "seed": (0, True),
    }
    for key, (bound, inclusive) in lower_bounds.items():
        value = _get(c, key)
        if value is None:
            continue
        if not (math.isfinite(value) and (value > bound or (inclusive and value == bound))):
            yield f"{key}={value}: must be a finite number {'at least' if inclusive else 'above'} {bound:g}"
    for key in ("dataset.val_fraction", "loss.smoothing", "optim.momentum"):
        value = _get(c, key)
        if value is not None and value >= 1:
            yield f"{key}={value}: must be below 1"
    choices = {
        "model.init": ("he2017", "torch"),
        "eval.split": ("test", "val"),
        "optim.scope": ("all", "final_homogeneous"),
        "schedule.name": ("linear", "constant"),
        "logger.mode": ("online", "offline", "disabled"),
        "dataset.loader": ("torch", "dali"),
        "train.precision": ("fp32", "tf32", "bf16"),
        "train.compile": ("off", "default", "reduce-overhead"),
    }
    for key, allowed in choices.items():
        value = _get(c, key)
        if value is not None and value not in allowed:
            yield f"{key}={value}: must be one of {', '.join(allowed)}"
    if c.optim.betas is not None and (len(c.optim.betas) != 2 or not all(0 <= b < 1 for b in c.optim.betas)):
        yield f"optim.betas={c.optim.betas}: must be two numbers in [0, 1)"
    if c.model.widths is not None and not all(width > 0 for width in c.model.widths):
        yield f"model.widths={c.model.widths}: must be positive"
    if c.optim.free_epochs is not None and c.optim.free_epochs >= c.train.epochs:
        yield (
            f"optim.free_epochs={c.optim.free_epochs:g}: must be below train.epochs={c.train.epochs}, "
            "or the constrained phase never begins"
        )
    if c.train.logit_scale is not None and not 1e-6 <= c.train.logit_scale <= 1:
        yield f"train.logit_scale={c.train.logit_scale:g}: must be from 1e-6 to 1"
    if c.train.logit_scale is not None and c.optim.free_epochs is None:
        yield f"train.logit_scale={c.train.logit_scale:g}: needs a LAWN optimizer, whose switch it happens at"
    if (c.train.devices or 1) > c.train.batch_size:
        yield f"train.devices={c.train.devices}: must be at most train.batch_size={c.train.batch_size}"
    if c.dataset.shards is not None and c.dataset.limit is not None:
        yield f"dataset.limit={c.dataset.limit}: needs folders; dataset.shards are read whole"
    if c.dataset.shards is not None and c.dataset.loader == "dali":
        yield "dataset.loader=dali: reads folders; dataset.shards needs dataset.loader=torch"
    if c.train.compile == "reduce-overhead" and c.train.micro_batch_size is not None:
        yield "train.compile=reduce-overhead: does not go with train.micro_batch_size; choose default or off"
    if c.train.compile not in (None, "off") and c.train.sync_batchnorm:
        yield f"train.compile={c.train.compile}: does not go with train.sync_batchnorm; choose off"
    if c.dataset.prefix is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", c.dataset.prefix):
        yield f"dataset.prefix={c.dataset.prefix!r}: must be a plain name of letters, digits, '_', '-' and '.'"
    if c.optim.nesterov and not c.optim.momentum:
        yield "optim.nesterov=True: needs optim.momentum above 0"
    for key, bound in (("seed", 2**63), ("dataset.seed", 2**32)):
        if _get(c, key) >= bound:
            yield f"{key}={_get(c, key)}: must be below {bound}"
    if c.schedule.warmup_epochs >= c.train.epochs:
        yield f"schedule.warmup_epochs={c.schedule.warmup_epochs:g}: must be below train.epochs={c.train.epochs}"


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def arguments(group: str, section: Any, builder: Callable[..., Any], renamed: dict[str, str] | None = None) -> dict:
    """The keyword-only arguments that `section` sets for `builder`, without `name` and the fields that are None.

    `renamed` maps a field to the builder's own word for it. Raises ConfigError for a field that the builder does
    not take, and for one that it needs and does not get.
    """
    words = renamed or {}
    given = {words.get(k, k): (k, v) for k, v in asdict(section).items() if v is not None and k != "name"}
    accepted = {
        p.name: p.default is p.empty for p in inspect.signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    keys = {word: k for k, word in words.items()}
    for word, (key, value) in given.items():
        if word not in accepted:
            known = ", ".join(keys.get(name, name) for name in accepted) or "no keys"
            raise ConfigError(f"{group}.{key}={value}: does not apply to {group}={section.name}, which takes {known}")
    for word, required in accepted.items():
        if required and word not in given:
            raise ConfigError(f"{group}.{keys.get(word, word)}: {group}={section.name} needs a value")
    return {word: value for word, (_, value) in given.items()}


def identity(config: Config) -> dict[str, Any]:
    """What defines the run: the config without where things live, where and how fast they run and who is told.

    Fields that are None are left out, so that a field added later does not rename the runs of today.
    """
    tree: dict[str, Any] = {key: value for key, value in asdict(config).items() if key not in _NOT_IDENTITY}
    for group, names in _SPEED.items():
        for name in names:
            del tree[group][name]
    return {
        key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for key, value in tree.items()
    }


def config_hash(config: Config) -> str:
    """The first 12 hex digits of the SHA-256 of the identity, as sorted JSON."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:12]


def run_name(config: Config) -> str:
    return f"{config.dataset.name}-{config.model.name}-{config.optim.name}-s{config.seed}-{config_hash(config)}"


def explain(error: BaseException) -> str:
    """One line for an exception of Hydra or OmegaConf: the key first, then what is allowed there."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, member = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={member}: no such {group}; choose from {', '.join(sorted(error.options))}"
    if isinstance(error.__cause__, OmegaConfBaseException):
        error = error.__cause__
    key = str(getattr(error, "full_key", None) or "")
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and key:
        return f"{key}: no such key; {_takes(key.rpartition('.')[0])}"
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: needs a value"
    text = " ".join(line.strip() for line in str(error).splitlines())
    text = text.split(" full_key:")[0].split(" See https:")[0]
    return f"{key}: {text}" if key else text
