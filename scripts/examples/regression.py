"""A small network fits a smooth function of four variables from noisy samples that it makes itself."""

import torch
from common import arguments, optimizer_for, verdict
from torch import nn

args = arguments(__doc__, steps=400, lr=1e-2)


def target(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(3 * x[:, 0]) * x[:, 1] + x[:, 2].square() - 0.5 * x[:, 3]


def sample(count: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    x = 2 * torch.rand(count, 4) - 1
    y = target(x)
    return x, (y + noise * torch.randn(count))[:, None]


train_x, train_y = sample(4096, noise=0.1)
test_x, test_y = sample(1024, noise=0.0)
model = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
optimizer = optimizer_for(model, args)


@torch.no_grad()
def error() -> float:
    """Root mean square error over the target's standard deviation: 1 is as good as guessing the mean."""
    return ((model(test_x) - test_y).square().mean().sqrt() / test_y.std()).item()


before = error()
for _ in range(args.steps):
    batch = torch.randint(len(train_x), (256,))
    loss = nn.functional.mse_loss(model(train_x[batch]), train_y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
after = error()
verdict("relative test error", before, after, learned=after < 0.2)
