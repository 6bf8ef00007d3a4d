import torch
from pytorch_lightning import LightningModule, Trainer
from torch.nn.functional import mse_loss

from adaptive_bilevel import AutoSLS, BiSLS
from adaptive_bilevel.hypergradient import implicit


class TwoLevels(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.model = False, torch.nn.Linear(20, 1)
        self.decay = torch.nn.Parameter(torch.full((20,), -4.0))  # log weight decay of each feature

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        inner = AutoSLS(self.model.parameters())
        return [inner, BiSLS([self.decay], lower=inner, direction="adam", hypergradient=implicit)]

    def training_step(self, batch: list[torch.Tensor]) -> None:
        (X, t, X_val, t_val), (inner, outer) = batch, self.optimizers()
        for _ in range(10):
            inner.step(lambda: mse_loss(self.model(X)[:, 0], t) + (self.decay.exp() * self.model.weight**2).sum() / 2)
        self.log("loss", outer.step(lambda: mse_loss(self.model(X_val)[:, 0], t_val)))


torch.manual_seed(0)
data = [a for X in (torch.randn(40, 20), torch.randn(40, 20)) for a in (X, X[:, :5].sum(1) + torch.randn(40))]
trainer = Trainer(max_epochs=31, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(TwoLevels(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=40))
print(f"step 30: validation loss {trainer.callback_metrics['loss']:.3f}")
