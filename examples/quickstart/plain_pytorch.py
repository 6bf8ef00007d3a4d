import torch
from torch.nn.functional import mse_loss

from adaptive_bilevel import AutoSLS, BiSLS
from adaptive_bilevel.hypergradient import assign, implicit

torch.manual_seed(0)
X, X_val = torch.randn(40, 20), torch.randn(40, 20)  # 5 of 20 features matter
t, t_val = X[:, :5].sum(1) + torch.randn(40), X_val[:, :5].sum(1) + torch.randn(40)
model = torch.nn.Linear(20, 1)  # lower variables
decay = torch.full((20,), -4.0, requires_grad=True)  # upper variables: log weight decay of each feature


def lower_loss() -> torch.Tensor:
    return mse_loss(model(X)[:, 0], t) + (decay.exp() * model.weight**2).sum() / 2


def upper_loss() -> torch.Tensor:
    return mse_loss(model(X_val)[:, 0], t_val)


inner = AutoSLS(model.parameters())
outer = BiSLS([decay], lower=inner, direction="adam")
for step in range(31):
    for _ in range(10):
        inner.step(lower_loss)
    assign([decay], implicit(upper_loss, lower_loss, [decay], model.parameters()))
    loss = outer.step(upper_loss)
    if step % 10 == 0:
        print(f"step {step:2}: validation loss {loss:.3f}")
