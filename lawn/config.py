"""The whole configuration as dataclasses: every key a user can set. lawn/validation.py checks the values.

A field that is None does not apply to the chosen member of its group (SGD has no betas); the YAML files under
conf/ give the values. Units: epochs are passes over the training set; E_free and E_warmup may be fractions.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

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
    path: str | None = None  # movielens: file of ratings, below data_dir
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
    free_epochs: Any = None  # LAWN: E_free, a float; or auto: until the onset of loss flattening
    warm_start_epochs: float | None = None  # adam_cpr: epochs before the norms are bounded
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
    deterministic: bool | None = None  # true: only operations that give the same bits again; slower on a GPU
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
class DiagnosticsConfig:
    name: str = "off"  # off or on: measure the updates of every weight, and the quantiles of the margins
    updates: int | None = None  # of an epoch that are measured; no more than about a tenth of all, but one at least
    samples: int | None = None  # of the training set, to estimate curvature and noise of the loss on when evaluating


@dataclass
class LoggerConfig:
    name: str = "csv"
    project: str | None = None  # wandb: WANDB_PROJECT, or lawn, if it is not given
    mode: str | None = None  # wandb: online, offline or disabled; null: what WANDB_MODE or `wandb offline` has set


@dataclass
class Config:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = 0  # initialization, order, augmentation, negatives
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    data_dir: str = "data"  # holds one folder for each dataset
    runs_dir: str = "runs"  # holds the run directories
    run_dir: str | None = None  # this run's directory, instead of one named after its hash


GROUPS = ("dataset", "model", "optim", "loss", "schedule", "diagnostics", "logger")
# What a run gives does not depend on these, so its identity does not either.
_NOT_IDENTITY = ("logger", "device", "data_dir", "runs_dir", "run_dir")
_SPEED = {
    "dataset": ("shards", "workers"),
    "optim": ("fused",),
    "train": ("channels_last", "checkpoint_seconds", "compile", "deterministic", "devices", "vectorize"),
}


@cache
def register() -> None:
    """Make the schema known to Hydra, and `scaled` to the YAML files; call before composing.

    `${scaled:E,T}` is E epochs of a run of T epochs, in proportion to this run's train.epochs.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver(
        "scaled", lambda epochs, budget, *, _root_: epochs * _root_.train.epochs / budget, replace=True
    )


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
    if config.diagnostics.name == "off":
        del tree["diagnostics"]
    return {
        key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for key, value in tree.items()
    }


def config_hash(config: Config) -> str:
    """What a run is known by."""
    return identity_hash(identity(config))


def identity_hash(tree: dict[str, Any]) -> str:
    """The first 12 hex digits of the SHA-256 of an identity, as sorted JSON."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def run_name(config: Config) -> str:
    return f"{config.dataset.name}-{config.model.name}-{config.optim.name}-s{config.seed}-{config_hash(config)}"
