import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch.nn.functional import mse_loss

from adaptive_bilevel_betty import AutoSLS, BiSLS, bind


class Outer(ImplicitProblem):
    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return mse_loss(self.inner(batch[0])[:, 0], batch[1])


class Inner(ImplicitProblem):
    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return mse_loss(self(batch[0])[:, 0], batch[1]) + (self.outer.module[0].exp() * self.module.weight**2).sum() / 2


torch.manual_seed(0)
X, X_val = torch.randn(40, 20), torch.randn(40, 20)  # 5 of 20 features matter
t, t_val = X[:, :5].sum(1) + torch.randn(40), X_val[:, :5].sum(1) + torch.randn(40)
decay, model = torch.nn.ParameterList([torch.full((20,), -4.0)]), torch.nn.Linear(20, 1)
outer = Outer("outer", Config(), decay, BiSLS(decay.parameters(), direction="adam"), None, [(X_val, t_val)])
inner = Inner("inner", Config("adaptive_cg", unroll_steps=10), model, AutoSLS(model.parameters()), None, [(X, t)])
links = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
engine = bind(Engine([outer, inner], EngineConfig(train_iters=310), links))
print(f"before: validation loss {outer.training_step((X_val, t_val)):.3f}")
engine.run()
print(f"after:  validation loss {outer.training_step((X_val, t_val)):.3f}")
