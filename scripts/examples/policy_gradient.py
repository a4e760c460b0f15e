"""REINFORCE learns to keep a stick upright by pushing its foot left or right, in a small world of its own."""

import torch
from common import arguments, optimizer_for, verdict
from torch import nn

LIMIT = 100  # an episode's longest length, in time steps of 0.02 s


class Stick:
    """Many sticks at once, each an angle (rad), its speed (rad/s), a foot's place (m) and its speed (m/s)."""

    def __init__(self, count: int) -> None:
        self.state = 0.1 * torch.rand(count, 4) - 0.05

    def push(self, right: torch.Tensor) -> torch.Tensor:
        """Accelerate each foot by ±10 m/s² for one time step; true where a stick still stands."""
        angle, spin, _, speed = self.state.unbind(1)
        push = 20.0 * right - 10.0
        turn = (9.8 * angle.sin() - push * angle.cos()) / 0.67  # a uniform stick of 1 m
        self.state = self.state + 0.02 * torch.stack([spin, turn, speed, push], dim=1)
        return (self.state[:, 0].abs() < 0.2) & (self.state[:, 2].abs() < 2.4)


args = arguments(__doc__, steps=60, lr=1e-2)
policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = optimizer_for(policy, args)


def play(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the pushes made, and where a stick still stood; both (LIMIT, count)."""
    world, standing = Stick(count), torch.ones(count, dtype=torch.bool)
    log_probabilities, stood = [], []
    for _ in range(LIMIT):
        choice = torch.distributions.Bernoulli(logits=policy(world.state)[:, 0], validate_args=False)
        right = choice.sample()
        log_probabilities.append(choice.log_prob(right))
        stood.append(standing)
        standing = standing & world.push(right)
    return torch.stack(log_probabilities), torch.stack(stood).float()


@torch.no_grad()
def length() -> float:
    return play(256)[1].sum(0).mean().item()


before = length()
for _ in range(args.steps):
    log_probabilities, stood = play(32)
    to_go = stood.flip(0).cumsum(0).flip(0)  # time steps it stands from here on
    mean = to_go.mean(1, keepdim=True)
    advantage = (to_go - mean) / (to_go.std() + 1e-6)
    loss = -(log_probabilities * advantage * stood).sum() / stood.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
after = length()
verdict(f"time steps upright, of {LIMIT}", before, after, learned=after > 80)
