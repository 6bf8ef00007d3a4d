import torch
import torchopt

from adaptive_bilevel_torchopt import LowerStep, UpperStep

torch.manual_seed(0)
X, X_val = torch.randn(40, 20), torch.randn(40, 20)  # 5 of 20 features matter
t, t_val = X[:, :5].sum(1) + torch.randn(40), X_val[:, :5].sum(1) + torch.randn(40)


class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=torchopt.linear_solve.solve_cg()):
    def __init__(self, decay: torch.Tensor) -> None:
        super().__init__()
        self.decay, self.net, self.lower = decay, torch.nn.Linear(20, 1), LowerStep(self)

    def objective(self) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(X)[:, 0], t) + (self.decay.exp() * self.net.weight**2).sum() / 2

    def solve(self) -> None:
        step = self.lower.attach()
        for _ in range(10):
            step(lambda: self.objective())


inner = Inner(decay := torch.full((20,), -4.0, requires_grad=True))  # log weight decay of each feature
meta = UpperStep([decay], lower=inner.lower, direction="adam")
for _ in range(31):
    inner.solve()
    loss = meta.step(lambda: torch.nn.functional.mse_loss(inner.net(X_val)[:, 0], t_val))
print(f"step 30: validation loss {loss:.3f}")
