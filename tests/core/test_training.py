"""Steps of Adam against PyTorch's own."""

import torch

from lowbit.core.training import adam_, adam_scalars, follow_

FORGET = (0.9, 0.99)


def test_steps_equal_pytorchs_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, 7, generator=generator)
    gradients = [torch.randn(40, 7, generator=generator) for _ in range(6)]
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.01, betas=FORGET, eps=1e-8)
    ours, moments = start.clone(), (torch.zeros(40, 7), torch.zeros(40, 7))
    on_device, places = start.clone(), (torch.zeros(40, 7), torch.zeros(40, 7))
    for step, gradient in enumerate(gradients, start=1):
        theirs.grad = gradient.clone()
        optimizer.step()
        adam_(ours, gradient, moments, step, 0.01, FORGET)
        follow_(on_device, gradient, *places, *torch.tensor(adam_scalars(step, 0.01, FORGET)).unbind(), FORGET)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(on_device, ours, rtol=1e-5, atol=1e-6)
