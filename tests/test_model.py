import copy

import pytest
import torch
from torch import nn

from clframe.errors import UsageError
from clframe.model import IncrementalNet, PerTask, class_mask, evaluating, freeze, masked, snapshot, thaw


class Doubling(nn.Module):
    """Features are twice the input, through a dropout and a norm that have modes."""

    width = 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.norm = nn.BatchNorm1d(3, affine=False)

    def features(self, x):
        return self.scale * x


def test_the_head_grows_by_blocks_and_keeps_the_old_ones():
    net = IncrementalNet(Doubling(), blocks=[2])
    first = net.head[0].weight
    before = first.detach().clone()
    added = net.grow(3)
    assert (net.blocks, net.n_classes) == ([2, 3], 5)
    assert net.head[0].weight is first
    assert torch.equal(first, before)
    assert added is net.head[1]
    assert added.weight.shape == (3, 3)


def test_the_column_of_a_logit_is_its_label_and_head_k_gives_the_block():
    net = IncrementalNet(Doubling(), blocks=[2, 1, 3])
    x = torch.randn(4, 3)
    outputs = net(x)
    assert torch.equal(outputs.features, 2 * x)
    assert outputs.logits.shape == (4, 6)
    for k, columns in enumerate((slice(0, 2), slice(2, 3), slice(3, 6))):
        assert torch.equal(outputs.head(k), outputs.logits[:, columns])
        assert torch.equal(outputs.head(k), net.head[k](2 * x))


def test_a_new_block_has_the_dtype_of_the_backbone():
    net = IncrementalNet(Doubling().double())
    assert net.grow(2).weight.dtype == torch.float64


@pytest.mark.parametrize("missing", ["features", "width"])
def test_a_backbone_that_lacks_something_is_refused_by_name(missing):
    class Half(nn.Module):
        if missing == "width":

            def features(self, x):
                return x

        else:
            width = 3

    with pytest.raises(UsageError, match=r"`Half` cannot be a backbone: .*`features\(x\)`.*`width`"):
        IncrementalNet(Half())


def test_class_mask_marks_classes_that_the_head_has():
    assert class_mask([1, 3, 7], 4).tolist() == [False, True, False, True]
    assert class_mask([], 2).tolist() == [False, False]


def test_masked_logits_take_no_part_in_a_softmax():
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    assert masked(logits, None) is logits
    one = masked(logits, torch.tensor([True, False, True]))
    assert one[:, 1].tolist() == [-torch.inf, -torch.inf]
    assert torch.equal(one[:, [0, 2]], logits[:, [0, 2]])
    each = masked(logits, torch.tensor([[True, False, False], [True, True, False]]))
    torch.testing.assert_close(each.softmax(1), torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))


def test_a_snapshot_is_equal_frozen_in_eval_mode_and_its_own():
    net = IncrementalNet(Doubling(), blocks=[2, 3])
    x = torch.randn(4, 3)
    net(x).logits.sum().backward()
    copied = snapshot(net)
    assert torch.equal(copied(x).logits, net(x).logits)
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert all(parameter.grad is None for parameter in copied.parameters())
    assert not any(module.training for module in copied.modules())
    assert net.training
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in net.parameters())
    kept = copied(x).logits.clone()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert torch.equal(copied(x).logits, kept)


def test_a_snapshot_has_no_hooks_and_does_not_copy_what_they_hold():
    class Holder:
        calls = 0

        def note(self, *_):
            self.calls += 1

        def __deepcopy__(self, memo):
            raise RuntimeError("what a hook belongs to must not be copied")

    holder, net = Holder(), IncrementalNet(Doubling(), blocks=[2])
    block = net.head[0]
    block.register_forward_hook(holder.note)
    block.register_forward_hook(holder.note, with_kwargs=True, always_call=True)
    block.register_forward_pre_hook(holder.note)
    block.register_full_backward_hook(holder.note)
    block.register_full_backward_pre_hook(holder.note)
    copied = snapshot(net)
    copied(torch.randn(1, 3, requires_grad=True)).logits.sum().backward()
    assert holder.calls == 0
    net(torch.randn(1, 3)).logits.sum().backward()
    assert holder.calls == 5


def test_evaluating_restores_the_mode_of_every_module_even_after_an_error():
    net = IncrementalNet(Doubling(), blocks=[2])
    net.backbone.norm.eval()
    other = nn.Dropout().eval()
    modes = [module.training for module in net.modules()]

    def fail():
        with evaluating(net, other):
            assert not any(module.training for module in net.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [module.training for module in net.modules()] == modes
    assert (net.training, net.backbone.norm.training, other.training) == (True, False, False)


def test_a_pass_while_evaluating_moves_no_running_statistics():
    backbone = Doubling()
    before = copy.deepcopy(backbone.norm.state_dict())
    with evaluating(backbone):
        backbone.norm(torch.randn(8, 3))
    assert all(torch.equal(before[name], value) for name, value in backbone.norm.state_dict().items())


@pytest.mark.parametrize(
    ("classes", "blocks"),
    [
        ([0], [0]),
        ([1], [0]),
        ([2], [1]),
        ([3, 5], [2]),
        ((1, 2), [0, 1]),
        ({5, 0}, [0, 2]),
        (range(6), [0, 1, 2]),
        ([6], []),
        ([], []),
    ],
)
def test_blocks_are_found_by_the_classes_that_they_have(classes, blocks):
    assert IncrementalNet(Doubling(), blocks=[2, 1, 3]).blocks_of(classes) == blocks


def test_freezing_takes_what_is_named_like_a_pattern_and_tells_what_it_took():
    net = IncrementalNet(Doubling(), blocks=[2] * 11)
    net.head[2].bias.requires_grad_(False)
    assert freeze(net, []) == []
    assert freeze(net, ["head.1.*", "head.2.*", "other"]) == ["head.1.weight", "head.1.bias", "head.2.weight"]
    assert freeze(net, ["head.1.*"]) == []  # they are frozen already, and another's to thaw
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {"head.1.weight", "head.1.bias", "head.2.weight", "head.2.bias"}  # not head.10
    assert freeze(net, (pattern for pattern in ["backbone.*", "*.10.bias"])) == ["backbone.scale", "head.10.bias"]


def test_thawing_gives_back_what_is_named_and_no_more():
    net = IncrementalNet(Doubling(), blocks=[2, 2])
    net.head[1].bias.requires_grad_(False)
    taken = freeze(net, ["head.*"])
    thaw(net, [*taken, "head.7.weight"])  # a name that is not there is none of its business
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["head.1.bias"]
    net.requires_grad_(False)
    thaw(net, [])
    assert not any(p.requires_grad for p in net.parameters())


class ByTask(PerTask):
    """Multiplies by the number of its task, from 1."""

    def forward(self, x):
        return (self.task + 1) * x


class Branching(nn.Module):
    """Features that differ by task, through two modules of which one is inside another."""

    width = 3

    def __init__(self):
        super().__init__()
        self.outer, self.inner = ByTask(), nn.Sequential(nn.Linear(3, 3), ByTask())
        self.calls = []

    def features(self, x):
        self.calls.append(len(x))
        return self.outer(x) + self.inner(x)


def branching(blocks=(2, 1)):
    net = IncrementalNet(Branching(), blocks)
    net.select(0)
    return net


def test_rows_of_several_tasks_are_answered_each_as_in_a_batch_of_its_own():
    """In the order that they came in, and with the gradient of all."""
    net = branching()
    x, task = torch.randn(7, 3), torch.tensor([2, 0, 1, 2, 0, 0, 5])
    outputs = net(x, task)
    assert net.backbone.calls == [3, 1, 2, 1]
    for i, t in enumerate(task.tolist()):
        alone = net(x[i : i + 1], task[i : i + 1])
        torch.testing.assert_close(outputs.features[i], (t + 1) * (x[i] + net.backbone.inner[0](x[i])))
        torch.testing.assert_close(outputs.logits[i : i + 1], alone.logits)
        torch.testing.assert_close(outputs.head(1)[i : i + 1], alone.head(1))
    weights = list(net.parameters())
    together = torch.autograd.grad(outputs.logits.square().sum(), weights)
    apart = torch.autograd.grad(
        sum(net(x[task == t], task[task == t]).logits.square().sum() for t in (0, 1, 2, 5)), weights
    )
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_of_one_task_are_one_pass_and_the_selection_stays():
    net = branching()
    net.select(3)
    x = torch.randn(4, 3)
    for task in (torch.full((4,), 1), torch.tensor([1, 0, 1, 4])):
        net.backbone.calls.clear()
        told = net(x, task)
        assert len(net.backbone.calls) == len(task.unique())
        assert torch.equal(net(x).logits, net(x, torch.full((4,), 3)).logits)
        assert not torch.equal(net(x).logits, told.logits)
        assert {m.task for m in net.modules() if isinstance(m, PerTask)} == {3}


def test_the_selection_stays_after_an_error():
    net = branching()
    net.select(1)
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 4), torch.tensor([0, 5]))
    assert {m.task for m in net.modules() if isinstance(m, PerTask)} == {1}


def test_a_snapshot_computes_for_the_task_that_was_selected():
    net = branching()
    net.select(2)
    copied = snapshot(net)
    net.select(0)
    x = torch.randn(4, 3)
    assert copied.selected == 2
    assert torch.equal(copied(x).logits, net(x, torch.full((4,), 2)).logits)
    assert torch.equal(copied(x, torch.tensor([0, 1, 0, 1])).logits, net(x, torch.tensor([0, 1, 0, 1])).logits)


def test_a_network_that_knows_no_tasks_does_not_ask_for_them():
    net = IncrementalNet(Doubling(), blocks=[2, 2])
    x = torch.randn(5, 3)

    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was asked for")

    assert net.selected is None
    assert torch.equal(net(x, Untouchable()).logits, net(x).logits)


def test_where_tasks_differ_an_answer_does_not_depend_on_later_blocks():
    """One product for all blocks may sum in another order as the head grows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = Branching()
        backbone.width, backbone.inner[0] = 37, nn.Linear(37, 37)
        net = IncrementalNet(backbone, [2])
        net.select(0)
        x = torch.randn(9, 37)
        before = net(x).head(0)
        for size in range(1, 12):
            net.grow(size)
            assert torch.equal(net(x).head(0), before)
