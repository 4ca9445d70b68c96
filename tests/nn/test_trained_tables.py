"""Tables in training: only the rows that are read are rounded, with the results of rounding the whole table."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.nn.trained_tables import train_embedding, train_embedding_bag

QCONFIGS = {"rows": fxquant.float_qparams_weight_only_qconfig, "uint4": fxquant.uint4_weight_only_qconfig}


class Counting(nn.Module):
    """Rounds as another module does, and remembers of how many rows."""

    def __init__(self, rounding):
        super().__init__()
        self.rounding, self.counts = rounding, []

    def forward(self, weight, rows=None):
        self.counts.append(len(weight))
        return self.rounding(weight, rows)


@pytest.mark.parametrize("qconfig", QCONFIGS.values(), ids=QCONFIGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "sum", "padding_idx": 3}, {"padding_idx": 7}, {"mode": "max"}, {"scale_grad_by_freq": True}],
    ids=str,
)
def test_a_bag_of_the_rows_that_it_reads_is_that_of_the_whole_table(options, qconfig):
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(50, 6, **options)
    trained = train_embedding_bag(bag, qconfig)
    trained.weight_rounding = Counting(trained.weight_rounding)
    words, offsets = torch.tensor([3, 9, 3, 40, 9, 2]), torch.tensor([0, 2, 2])
    trained(words, offsets).pow(2).sum().backward()
    assert trained.weight_rounding.counts == [4]
    got, bag.weight.grad = bag.weight.grad, None
    table = trained.weight_rounding.rounding(bag.weight)
    more = {name: options[name] for name in ("padding_idx", "scale_grad_by_freq") if name in options}
    expected = F.embedding_bag(words, table, offsets, mode=options.get("mode", "mean"), **more)
    expected.pow(2).sum().backward()
    assert torch.equal(trained(words, offsets), expected)
    assert torch.equal(got, bag.weight.grad)


def test_bags_may_be_empty_and_rectangular():
    trained = train_embedding_bag(nn.EmbeddingBag(50, 6), fxquant.uint4_weight_only_qconfig)
    table = trained.weight_rounding(trained.weight)
    words = torch.randint(50, (3, 4), dtype=torch.int32)
    assert torch.equal(trained(words), F.embedding_bag(words, table))
    nothing = torch.zeros(0, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    assert torch.equal(trained(*nothing), torch.zeros(2, 6))


@pytest.mark.parametrize("qconfig", QCONFIGS.values(), ids=QCONFIGS)
def test_an_embedding_rounds_what_it_reads(qconfig):
    trained = train_embedding(nn.Embedding(50, 6), qconfig)
    trained.weight_rounding = Counting(trained.weight_rounding)
    words = torch.tensor([[3, 9], [9, 1]])
    assert torch.equal(trained(words), trained.weight_rounding.rounding(trained.weight)[words])
    assert trained.weight_rounding.counts == [4]
