"""A small convolutional network reads the 8 × 8 handwritten digits that scikit-learn ships."""

import torch
from common import arguments, optimizer_for, verdict
from torch import nn

from shardopt.errors import MissingExtraError

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise MissingExtraError("scikit-learn", "dev") from error

args = arguments(__doc__, steps=300, lr=3e-3)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:1437], order[1437:]

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 4 * 4, 10),
)
optimizer = optimizer_for(model, args)


@torch.no_grad()
def accuracy() -> float:
    return (model(images[test]).argmax(1) == labels[test]).float().mean().item()


before = accuracy()
for _ in range(args.steps):
    batch = train[torch.randint(len(train), (128,))]
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
after = accuracy()
verdict("test accuracy", before, after, learned=after > 0.95)
