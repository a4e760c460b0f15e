"""An autoencoder squeezes windows of a noisy three-channel time series, made here, into six numbers."""

import torch
from common import arguments, optimizer_for, verdict
from torch import nn

WINDOW, CHANNELS = 48, 3
args = arguments(__doc__, steps=400, lr=3e-3)


def windows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy and clean windows, (count, CHANNELS, WINDOW): waves on a drift, by sensors with a lag."""
    time = torch.arange(WINDOW) / WINDOW
    frequency = 1 + torch.rand(count, 1, 1)
    phase = 6.28 * torch.rand(count, 1, 1)
    lag = torch.tensor([0.0, 0.7, 1.9])[:, None]
    height = 0.5 + torch.rand(count, 1, 1)
    clean = height * torch.sin(6.28 * frequency * time + phase + lag) + torch.randn(count, 1, 1) * time
    return clean + 0.1 * torch.randn_like(clean), clean


model = nn.Sequential(
    nn.Conv1d(CHANNELS, 16, 5, stride=2, padding=2),
    nn.SiLU(),
    nn.Flatten(),
    nn.Linear(16 * WINDOW // 2, 64),
    nn.SiLU(),
    nn.Linear(64, 6),  # the code
    nn.Linear(6, 128),
    nn.SiLU(),
    nn.Linear(128, CHANNELS * WINDOW),
    nn.Unflatten(1, (CHANNELS, WINDOW)),
)
optimizer = optimizer_for(model, args)
test_noisy, test_clean = windows(1024)


@torch.no_grad()
def lost() -> float:
    """Share of the clean signal's variance that the reconstruction misses."""
    return ((model(test_noisy) - test_clean).square().mean() / test_clean.var()).item()


before = lost()
for _ in range(args.steps):
    noisy, _ = windows(128)
    loss = nn.functional.mse_loss(model(noisy), noisy)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
after = lost()
verdict("share of variance lost", before, after, learned=after < 0.05)
