"""The configuration as dataclasses: every key that a user can set, with its bounds.

A field that is None does not apply to the chosen member of its group (SGD has no betas); the YAML files under conf/
give the values. Units: epochs are passes over the training set; E_free and E_warmup may be fractions.
lawn/validation.py checks the values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf


@dataclass(frozen=True)
class Rule:
    """The description of a key, the bounds of its value, and whether it is part of the run's identity."""

    description: str = ""
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    path: bool = False  # ~ and environment variables are expanded
    identity: bool = True  # whether the result of the run depends on it


def key(default: Any, description: str = "", **rule: Any) -> Any:
    """A field with a rule."""
    return field(default=default, metadata={"rule": Rule(description, **rule)})


@dataclass
class DatasetConfig:
    name: str = MISSING
    seed: int = key(
        0,
        "draws the validation split, the subset and the candidates, whatever the seed of the run",
        at_least=0,
        below=2**32,
    )
    limit: int | None = key(None, "images: train on so many, drawn at random", above=0)
    val_fraction: float | None = key(
        None, "images: share of the training set held out by eval.split=val", above=0, below=1
    )
    image_size: int | None = key(
        None, "ImageNet: side of the training and evaluation crop, pixels", above=0, below=2**16
    )
    workers: int | None = key(None, "ImageNet: decoding processes", at_least=0, below=2**10, identity=False)
    loader: str | None = key(
        None, "ImageNet: torch (the default), or dali, which decodes on the GPU", choices=("torch", "dali")
    )
    shards: str | None = key(
        None,
        "ImageNet: folder or URL of shards (scripts/make_shards.py); null: folders of images",
        identity=False,
        path=True,
    )
    prefix: str | None = key(
        None, "recommenders: read the three files of this name (He et al. 2017); null: GroupLens' file"
    )
    path: str | None = key(None, "movielens: file of ratings, below data_dir")
    negatives: int | None = key(None, "recommenders: fresh negatives per positive and epoch", above=0)
    candidates: int | None = key(None, "recommenders: items that the held-out item is ranked against", above=0)


@dataclass
class ModelConfig:
    name: str = MISSING
    widths: list[int] | None = key(None, "mlp: hidden widths", below=2**16)
    batch_norm: bool | None = key(None, "vgg19: batch norm after each convolution")
    bias: bool | None = key(
        None, "vgg19, ncf_mlp: biases; without them and batch norm the network is fully homogeneous"
    )
    factors: int | None = key(
        None,
        "ncf_mlp: width of the last hidden layer (predictive factors); mf: dimensions of an embedding",
        above=0,
        below=2**16,
    )
    layers: int | None = key(None, "ncf_mlp: hidden layers", above=0, below=2**5)
    init: str | None = key(None, "ncf_mlp: initialization of He et al. 2017 or of torch", choices=("he2017", "torch"))
    init_std: float | None = key(None, "mf: standard deviation of the initial embeddings", above=0)
    regularization: float | None = key(
        None, "mf: coefficient of half the squared norm of the parameters that a sample uses", at_least=0
    )


@dataclass
class OptimConfig:
    name: str = MISSING
    lr: float = key(MISSING, "peak learning rate", above=0)
    betas: list[float] | None = key(None, "Adam, LAMB: decay rates of the two moments")
    eps: float | None = key(None, "Adam, LAMB: added to the root of the second moment", at_least=0)
    momentum: float | None = key(None, "sgd, sgd_lawn, muon: momentum", at_least=0, below=1)
    nesterov: bool | None = key(None, "sgd: Nesterov's momentum")
    weight_decay: float | None = key(None, "weight decay of the parameters with two or more dimensions", at_least=0)
    free_epochs: Any = key(None, "LAWN: E_free; auto: until the onset of loss flattening", at_least=0)
    warm_start_epochs: float | None = key(None, "adam_cpr: epochs before the norms are bounded", above=0)
    scope: str | None = key(
        None,
        "LAWN: constrain all weights (the default) or those of the final homogeneous sub-network",
        choices=("all", "final_homogeneous"),
    )
    include_bias: bool | None = key(None, "LAWN: the bias of a layer shares the norm of its weight")
    granularity: str | None = key(
        None,
        "LAWN: one norm per weight (the default), or per output row, filter or embedding vector",
        choices=("tensor", "row"),
    )
    fused: bool | None = key(
        None, "false: plain torch operations; null: fused kernels if there are any", identity=False
    )


@dataclass
class LossConfig:
    name: str = MISSING
    smoothing: float | None = key(
        None, "label_smoothing: share of the target spread over all classes", at_least=0, below=1
    )
    gamma: float | None = key(None, "focal: the exponent", at_least=0)
    level: float | None = key(None, "flooding: the flood level of the training loss, nats", at_least=0)


@dataclass
class ScheduleConfig:
    name: str = MISSING
    warmup_epochs: float = key(MISSING, "warmup epochs, E_warmup", at_least=0)


@dataclass
class TrainConfig:
    epochs: int = key(MISSING, "epochs of the run, E_total", above=0)
    batch_size: int = key(
        MISSING, "samples of an update over all ranks; recommenders count positives and negatives", above=0
    )
    micro_batch_size: int | None = key(
        None, "at most so many samples in a forward pass of a rank; gradients are accumulated", above=0
    )
    devices: int | None = key(
        None,
        "ranks on this machine, each with a GPU or a share of the CPU; null: 1",
        above=0,
        below=2**10,
        identity=False,
    )
    vectorize: int | None = key(
        None, "train up to so many compatible runs of a multirun as one batched model", above=0, identity=False
    )
    sync_batchnorm: bool | None = key(None, "batch norm over the micro-batches of all ranks instead of each by itself")
    deterministic: bool | None = key(
        None, "use only operations that give the same bits again; slower on a GPU", identity=False
    )
    precision: str | None = key(
        None,
        "fp32, tf32 or bf16; null here and for the next two: by device and model",
        choices=("fp32", "tf32", "bf16"),
    )
    channels_last: bool | None = key(None, "memory layout of images and convolutions", identity=False)
    compile: str | None = key(
        None,
        "off, or a mode of torch.compile: default or reduce-overhead (CUDA graphs)",
        choices=("off", "default", "reduce-overhead"),
        identity=False,
    )
    logit_scale: float | None = key(None, "LAWN: multiply the output layer by this factor at the switch (Figure 1)")
    checkpoint_seconds: float = key(
        30.0, "seconds between checkpoints; there is always one at the end", at_least=0, identity=False
    )


@dataclass
class EvalConfig:
    split: str = key("test", "test, or val: held out from the training set", choices=("test", "val"))
    every: int = key(1, "epochs between evaluations; the last epoch is always evaluated", above=0)
    candidates: str | None = key(
        None,
        "recommenders: all: at the end, rank the held-out item also among all items that its user is not trained on",
        choices=("all",),
    )


@dataclass
class DiagnosticsConfig:
    name: str = key(
        "off", "off, or on: measure the updates of every weight and the quantiles of the margins", choices=("off", "on")
    )
    updates: int | None = key(
        None, "measured updates of an epoch, at most about a tenth of all and at least one", above=0
    )
    samples: int | None = key(
        None, "training samples on which curvature and gradient noise are estimated at evaluations", above=1
    )


@dataclass
class LoggerConfig:
    name: str = key("csv", identity=False)
    project: str | None = key(None, "wandb: the project; null: WANDB_PROJECT, or lawn", identity=False)
    mode: str | None = key(
        None,
        "wandb: online, offline or disabled; null: by WANDB_MODE or `wandb offline`",
        choices=("online", "offline", "disabled"),
        identity=False,
    )


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
    seed: int = key(0, "seed of initialization, order, augmentation and negatives", at_least=0)
    device: str = key("auto", "auto, cpu, cuda or cuda:N", identity=False)
    data_dir: str = key("data", "folder that holds a folder for each dataset", identity=False, path=True)
    runs_dir: str = key("runs", "folder that holds the run directories", identity=False, path=True)
    run_dir: str | None = key(
        None, "directory of this run, instead of one named by its hash in runs_dir", identity=False, path=True
    )


GROUPS = ("dataset", "model", "optim", "loss", "schedule", "diagnostics", "logger")


def rules(schema: type = Config, prefix: str = "") -> Iterator[tuple[str, Rule]]:
    """Every key with its rule, in the order of the schema."""
    for entry in fields(schema):
        if is_dataclass(entry.default_factory):
            yield from rules(entry.default_factory, f"{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", entry.metadata.get("rule", Rule())


@cache
def register() -> None:
    """Register the schema with Hydra, and the resolver `scaled` with OmegaConf; call before composing.

    `${scaled:E,T}` is E epochs of a run of T epochs, in proportion to train.epochs.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver(
        "scaled", lambda epochs, budget, *, _root_: epochs * _root_.train.epochs / budget, replace=True
    )
