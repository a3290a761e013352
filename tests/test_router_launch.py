"""Launching a route only queues work on the device; reading it is one copy to the host."""

from __future__ import annotations

import pytest
import torch
from routers import EARLY, INT8, LATE, LAYERS, make_router, on_a_line
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels.route.nearest_anchor as nearest_module
import kernels.route.pool_states as pool_module
from kernels.ops import TORCH
from kernels.ops_gpu import TRITON
from kernels.route.nearest_anchor import Nearest
from models.llama import precision_table

BOTH = pytest.mark.parametrize("ops", [TRITON, TORCH], ids=lambda ops: ops.name)
UNWRITTEN = 255  # no precision of a sub-layer
# The result, or its shape, is known only where the values are: `item`, `nonzero` and their like.
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Waits(Exception):
    """The host would have to wait for the device."""


class NeverWait(TorchDispatchMode):
    """Raises where the host reads a value, or one goes from a device to another, host included."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # torch.tensor makes values of the host into a tensor, and then calls lift_fresh.
        if WAITING & set(func.tags) or "lift_fresh" in str(func):
            raise Waits(str(func))
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor)]
        if "copy" in str(func) and len({tensor.device for tensor in tensors}) > 1:
            raise Waits(str(func))
        return out


@pytest.mark.parametrize(
    "look",
    [
        torch.Tensor.item,
        bool,
        int,
        float,
        torch.Tensor.nonzero,
        torch.Tensor.cpu,
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        lambda x: x.to("cpu", torch.float64),
        lambda x: torch.zeros(1).copy_(x),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
    ],
)
def test_a_tensor_without_memory_gives_nothing_away(look):
    """What the tests below rest on: on the device "meta" there is nothing that could be read."""
    x = torch.ones(1, device="meta")
    with pytest.raises((Waits, NotImplementedError, RuntimeError, TypeError)), NeverWait():
        look(x)


def test_making_a_tensor_of_values_of_the_host_is_seen(device):
    with pytest.raises(Waits), NeverWait():
        torch.tensor([1.0], device=device)


def random_router(ops, device, dtype=torch.float32):
    anchors = torch.nn.functional.normalize(torch.randn(20, 40), dim=-1)
    return make_router(ops, device, anchors, [2, 3, 4, 3] * 5, dtype=dtype, min_ratio=1.1)


def random_states(device, dtype=torch.float32, num_tokens=300):
    return (torch.randn(40) + 3 * torch.randn(num_tokens, 40)).to(device, dtype)


def test_the_references_need_no_memory_to_launch():
    device = torch.device("meta")
    router, states = random_router(TORCH, device), torch.empty(300, 40, device=device)
    row = torch.empty(1, 2 * LAYERS + 1, dtype=torch.uint8, device=device)
    with NeverWait():
        pending = router.launch(states, row)
    assert pending.record.shape == (1, len(Nearest._fields)) and pending.state_sum.shape == (40,)


def test_the_launchers_need_no_memory_to_launch(monkeypatch):
    """The kernels aside, which run on the device."""
    launched = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(self.name)

    names = ["_token_scales_kernel", "_pool_states_kernel", "_nearest_anchor_kernel"]
    for module, name in zip((pool_module, pool_module, nearest_module), names, strict=True):
        monkeypatch.setattr(module, name, Recorder(name))
    device = torch.device("meta")
    router, states = random_router(TRITON, device), torch.empty(300, 40, device=device)
    row = torch.empty(1, 2 * LAYERS + 1, dtype=torch.uint8, device=device)
    with NeverWait():
        pending = router.launch(states, row)
    assert pending.record.shape == (1, len(Nearest._fields)) and pending.state_sum.shape == (40,)
    assert launched == names


@BOTH
def test_launching_waits_for_nothing(ops, device):
    """On real memory, and what was launched is what `route` says."""
    router = random_router(ops, device)
    row = torch.full((1, 2 * LAYERS + 1), UNWRITTEN, dtype=torch.uint8, device=device)
    seen = set()
    for _ in range(20):
        states = random_states(device)
        router.launch(states, row)  # compiles, for which a GPU's compiler may look at tensors
        with NeverWait():
            pending = router.launch(states, row)
        route = router.read(pending)
        assert route == router.route(states)
        assert torch.equal(route.state_sum, router.route(states).state_sum)
        seen.add(route.plan.name)
    assert len(seen) > 2


@BOTH
def test_reading_copies_once(ops, device, monkeypatch):
    copies, copy = [], torch.Tensor.cpu
    router = random_router(ops, device)
    pending = router.launch(random_states(device), router._precisions)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copies.append(x) or copy(x))
    route = router.read(pending)
    assert len(copies) == 1 and copies[0] is pending.record
    assert route.state_sum is pending.state_sum


@BOTH
def test_the_plan_is_written_into_its_row_of_the_table(ops, device):
    """Of a table with a row for every slot of the cache; the others' rows stay."""
    rows = {plan.name: precision_table([plan], device)[0] for plan in (INT8, EARLY, LATE)}
    for cosines, plan in (([1.0, 0.0, -1.0], INT8), ([0.0, 1.0, 0.5], EARLY), ([0, 0, 1.0], LATE)):
        router, states = on_a_line(ops, device, cosines, [2, 3, 4])
        for slot in range(4):
            table = torch.full((4, 2 * LAYERS + 1), UNWRITTEN, dtype=torch.uint8, device=device)
            pending = router.launch(states, table[slot : slot + 1])
            assert torch.equal(table[slot], rows[plan.name])
            others = [other for other in range(4) if other != slot]
            assert (table[others] == UNWRITTEN).all()
            assert router.read(pending).plan == plan


@BOTH
@pytest.mark.parametrize("plan_id", [0, 1])
def test_a_plan_that_runs_no_cheaper_model_has_the_row_of_the_model(ops, plan_id, device):
    router, states = on_a_line(ops, device, [0.5], [plan_id])
    row = torch.full((1, 2 * LAYERS + 1), UNWRITTEN, dtype=torch.uint8, device=device)
    router.launch(states, row)
    assert (row == 16).all()


@BOTH
def test_routes_may_be_read_later_and_in_any_order(ops, device):
    """Nothing of a route is kept in the router."""
    router, prompts = random_router(ops, device), [random_states(device) for _ in range(6)]
    expected = [router.route(states) for states in prompts]
    table = torch.full((6, 2 * LAYERS + 1), UNWRITTEN, dtype=torch.uint8, device=device)
    pending = [router.launch(states, table[i : i + 1]) for i, states in enumerate(prompts)]
    for i in (5, 0, 3, 1, 4, 2):
        assert router.read(pending[i]) == expected[i]
        assert torch.equal(pending[i].state_sum, expected[i].state_sum)
    assert len({route.plan.name for route in expected}) > 1
    assert len({tuple(row) for row in table.tolist()}) > 1


@BOTH
def test_a_row_of_another_width_is_refused(ops, device):
    router, states = on_a_line(ops, device, [0.5], [2])
    row = torch.full((1, 2 * LAYERS), UNWRITTEN, dtype=torch.uint8, device=device)
    with pytest.raises((AssertionError, RuntimeError)):
        router.launch(states, row)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_captured_route_follows_its_states(dtype, device):
    """A capture refuses whatever makes the host wait; the graph writes the row by itself."""
    router, states = random_router(TRITON, device, dtype), random_states(device, dtype)
    table = torch.full((3, 2 * LAYERS + 1), UNWRITTEN, dtype=torch.uint8, device=device)
    router.launch(states, table[1:2])  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pending = router.launch(states, table[1:2])
    seen = set()
    for _ in range(20):
        states.copy_(random_states(device, dtype))
        table.fill_(UNWRITTEN)
        graph.replay()
        route, row = router.read(pending), torch.empty_like(table[1:2])
        expected = router.read(router.launch(states, row))
        assert route == expected and torch.equal(route.state_sum, expected.state_sum)
        assert torch.equal(table[1:2], row) and (table[[0, 2]] == UNWRITTEN).all()
        seen.add(route.plan.name)
    assert len(seen) > 1
