"""A Lightning module trained in a federation: each epoch is a round."""

import inspect
import logging

import pytest
from blindsum.client.testing import Federation

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning")
from blindsum.client.learning import lightning_callback  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

pytestmark = pytest.mark.torch


class Line(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)

    def training_step(self, batch, _index):
        inputs, wanted = batch
        loss = torch.nn.functional.mse_loss(self.layer(inputs), wanted)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def test_three_members_train_a_lightning_module_together():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with Federation(3, model=Line().state_dict(), rounds=3, metrics={"loss": (0.0, 100.0)}) as federation:

        def app(member):
            stream = torch.Generator().manual_seed(int(member.name[-1]))
            inputs = torch.randn((32, 2), generator=stream)
            data = TensorDataset(inputs, inputs @ torch.tensor([[1.0], [-2.0]]))
            module = Line()
            trainer = lightning.Trainer(
                callbacks=[lightning_callback.FederatedRounds(member, examples=len(data))],
                max_epochs=-1,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, DataLoader(data, batch_size=16))
            return [receipt.metrics["loss"] for receipt in member.receipts()], member.latest_state()

        found = federation.run(app)
    losses, final = found["member-1"]
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2]
    assert final["layer.weight"].flatten().tolist() == pytest.approx([1.0, -2.0], abs=0.5)
    for _, other in found.values():
        assert torch.equal(other["layer.weight"], final["layer.weight"])


def test_the_callback_is_small():
    lines = inspect.getsource(lightning_callback.FederatedRounds).splitlines()
    assert len(lines) <= 40
