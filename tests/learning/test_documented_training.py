"""The code on the pages about training runs as it stands there."""

from pathlib import Path

import pytest
from blindsum.client.testing import Federation

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.torch
PAGES = Path(__file__).parents[2] / "docs" / "edge"


def code_of(page):
    (code,) = [part.split("```")[0] for part in (PAGES / page).read_text().split("```python\n")[1:]]
    return code


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body, head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
        return Net(body, head)


class Net(torch.nn.Module):
    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, inputs):
        return self.head(torch.relu(self.body(inputs)))


def examples(seed, count=64):
    inputs = torch.randn((count, 4), generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs[:, 0] > inputs[:, 1]).long()


def test_the_page_on_training_together():
    page = {}
    exec(compile(code_of("training-together.md"), "training-together.md", "exec"), page)
    with Federation(3) as federation:
        page["start"](federation.owner, network())

        def app(member):
            inputs, labels = examples(int(member.name[-1]))
            batches = list(zip(inputs.split(8), labels.split(8), strict=True))
            return page["take_part"](member, network(), batches, examples(50))

        found = federation.run(app)
    reports = [report for _, report in found.values()]
    assert reports[0] == reports[1] == reports[2]
    assert 0.5 < reports[0].mean <= 1
    heads = [state["head.weight"] for state, _ in found.values()]
    assert not torch.equal(heads[0], heads[1])


def test_the_page_on_training_at_the_edge():
    page = {}
    exec(compile(code_of("training-at-the-edge.md"), "training-at-the-edge.md", "exec"), page)
    model, validation = network(), examples(9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = page["train_here"](model, examples(1), validation, steps=60)
    kept = page["best_of"](network(), before, trained, validation)
    assert torch.equal(kept["head.weight"], trained["head.weight"])


@pytest.mark.parametrize("page", ["training-together.md", "training-at-the-edge.md"])
def test_the_code_of_a_page_is_short(page):
    lines = [line for line in code_of(page).splitlines() if line.strip()]
    assert len(lines) <= 30
