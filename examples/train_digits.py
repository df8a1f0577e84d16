"""Adam and AdamLAWN on scikit-learn's digits, from data to figure: python examples/train_digits.py"""

import argparse
import copy
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lawn import AdamLAWN, LinearWarmupDecay
from lawn.diagnostics import multiclass_margin, weight_norm

EPOCHS = 100
FREE_EPOCHS = 10  # E_free: epochs before AdamLAWN fixes the norms
WARMUP_EPOCHS = 5
LEARNING_RATE = 1e-3
BATCH_SIZE = 128
WIDTH = 256
SEED = 0


def train(name, model, optimizer, train_set, test_set, epochs):
    """Train the model. Returns its test accuracy and the rows (loss, median margin, weight norm) of the epochs."""
    x, y = train_set
    updates = len(x) // BATCH_SIZE
    schedule = LinearWarmupDecay(optimizer, min(WARMUP_EPOCHS, epochs - 1) * updates, epochs * updates)
    rng = torch.Generator().manual_seed(SEED)  # both optimizers see the same batches
    rows = []
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(x), generator=rng)[: updates * BATCH_SIZE].split(BATCH_SIZE):
            loss = cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            logits = model(x)
            loss, margin = cross_entropy(logits, y), multiclass_margin(logits, y).median()
            accuracy = 100 * (model(test_set[0]).argmax(1) == test_set[1]).float().mean().item()
        rows.append((loss.item(), margin.item(), weight_norm(model).item()))
        if epoch % 10 == 0 or epoch == epochs:
            print(
                f"{name:8} epoch {epoch:3}: training loss {rows[-1][0]:.2e}, median margin {rows[-1][1]:5.2f}, "
                f"norm of all weights {rows[-1][2]:.2f}, test accuracy {accuracy:.2f} %"
            )
    return accuracy, rows


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", default="train_digits.png")
    given = parser.parse_args(arguments)
    if given.epochs < 1:
        parser.error(f"--epochs {given.epochs}: must be positive")
    if not Path(given.out).resolve().parent.is_dir():
        parser.error(f"--out {given.out}: no such folder")

    torch.manual_seed(SEED)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    train_set, test_set = (x[:1437], y[:1437]), (x[1437:], y[1437:])

    initial = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    free_steps = max(1, FREE_EPOCHS * given.epochs // EPOCHS) * (len(train_set[0]) // BATCH_SIZE)
    adam, lawn = copy.deepcopy(initial), copy.deepcopy(initial)
    runs = {
        "Adam": (adam, torch.optim.Adam(adam.parameters(), lr=LEARNING_RATE)),
        "AdamLAWN": (lawn, AdamLAWN(lawn.parameters(), lr=LEARNING_RATE, free_steps=free_steps)),
    }
    trained = {name: train(name, *run, train_set, test_set, given.epochs) for name, run in runs.items()}

    figure = Figure(figsize=(10, 3), layout="constrained")
    for place, title in enumerate(("training loss", "median margin", "norm of all weights")):
        axes = figure.add_subplot(1, 3, place + 1, xlabel="epoch", title=title)
        for name, (_, rows) in trained.items():
            axes.plot(range(1, given.epochs + 1), [row[place] for row in rows], label=name)
    figure.axes[0].set_yscale("log")
    figure.axes[0].legend()
    figure.savefig(given.out, dpi=150)
    for name, (accuracy, _) in trained.items():
        print(f"{name}: test accuracy {accuracy:.2f} %")
    print(f"figure: {given.out}")


if __name__ == "__main__":
    main()
