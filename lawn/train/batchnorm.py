"""Batch norm needs more than one value of a channel."""

from torch import nn

from lawn.data.batching import Batching
from lawn.errors import ConfigError
from lawn.task import Batch, Task
from lawn.train.throughput import to_meta


def refuse_single_values(task: Task, model: nn.Module, batch: Batch, batching: Batching) -> None:
    """Raise ConfigError if a micro-batch of the epoch is one sample and a batch norm of the model sees maps of 1 x 1.

    `batch` is any batch of the epoch, for its shapes; nothing is computed.
    """
    samples = task.dataset.num_train
    if batching.world_size > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return  # its statistics are those of all ranks
    if min(micro_batch.stop - micro_batch.start for micro_batch in batching.micro_batches(samples)) > 1:
        return
    shadow = to_meta(model).train()
    try:
        task.loss_and_margins(shadow, tuple(t[:1].to("meta") for t in batch))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        cut = batching.micro_batch_size is not None and batching.micro_batch_size < batching.batch_size
        micro = f", train.micro_batch_size={batching.micro_batch_size}" if cut else ""
        raise ConfigError(
            f"train.batch_size={batching.batch_size}{micro}: one of the {samples:,} samples of an epoch is left alone, "
            "and a batch norm that sees maps of 1 x 1 needs two; choose another, or a larger dataset.image_size"
        ) from error
