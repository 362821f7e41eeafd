"""The all_to_all family against its twins, and a whole expert-parallel layer with virtual ranks in one process."""

from __future__ import annotations

import itertools
from math import comb

import pytest
import torch
from torch import Tensor

import moe_ext
from cases import DTYPES, ROUTINGS, make_rows, make_topk_ids, make_topk_weights, non_contiguous
from compare import assert_deterministic, assert_matches_reference, relative_error
from moe_ext import A2APlan, reference

# (num_tokens, num_experts, topk, rank_expert_offsets): even, uneven, ranks without experts, one rank, no tokens.
WORLDS = [
    (0, 8, 2, [0, 4, 8]),
    (1, 4, 4, [0, 4]),
    (37, 11, 3, [0, 4, 4, 9, 11]),
    (64, 48, 8, [0, 6, 12, 18, 24, 30, 36, 42, 48]),
    (50, 8, 2, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    (300, 10, 6, [0, 0, 10]),
]


def make_world(world, routing: str, device: str) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts, topk, offsets = world
    ids = make_topk_ids(num_tokens, num_experts, topk, routing, device)
    return ids, torch.tensor(offsets, dtype=torch.int32, device=device)


def on(device: str | torch.device, plan: A2APlan) -> A2APlan:
    return A2APlan(*(f.to(device) if isinstance(f, Tensor) else f for f in plan))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("world", WORLDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_plan(world, routing, dtype, device):
    ids, offsets = make_world(world, routing, device)
    plan = moe_ext.a2a_plan(ids.to(dtype), offsets)
    expected = reference.a2a_plan(ids.cpu(), offsets.cpu())
    for name, got, wanted in zip(A2APlan._fields, plan, expected, strict=True):
        assert got == wanted if isinstance(got, int) else torch.equal(got.cpu(), wanted), name


def test_plan_of_many_tokens(device):
    """Several blocks; tokens in order inside each rank; each (token, rank) pair once."""
    ids = make_topk_ids(9000, 64, 6, "zipf", device)
    plan = moe_ext.a2a_plan(ids, moe_ext.even_rank_expert_offsets(64, 5, device))
    rank_of = torch.bucketize(ids.cpu(), plan.rank_expert_offsets.cpu(), right=True) - 1
    pairs = torch.zeros(9000, 5, dtype=torch.bool).scatter(1, rank_of, True)
    assert torch.equal(plan.send_counts.cpu().long(), pairs.sum(0))
    sent = plan.send_to_slot.cpu()[: int(pairs.sum())] // plan.slots_per_token
    assert torch.equal(sent.long(), torch.nonzero(pairs.T)[:, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_pack(world, routing, dtype, device):
    ids, offsets = make_world(world, routing, device)
    num_tokens, topk = ids.shape
    plan = reference.a2a_plan(ids.cpu(), offsets.cpu())
    hidden = make_rows(num_tokens, 24, dtype=dtype, device=device)
    weights = make_topk_weights(num_tokens, topk, device)
    num_rows = plan.send_to_slot.numel()
    grads = [
        make_rows(num_rows, 24, dtype=dtype, device=device, seed=5),
        make_rows(num_rows, topk, dtype=torch.float32, device=device, seed=6),
    ]

    def apply(family):
        return lambda h, w: family.a2a_pack(h, ids.to(h.device), w, on(h.device, plan))

    for rows in (hidden, non_contiguous(hidden)):
        assert_matches_reference(apply(moe_ext), apply(reference), (rows, weights), grads)
    assert_deterministic(apply(moe_ext), (hidden, weights), grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_alignment", [1, 8])
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_unpack(world, row_alignment, dtype, device):
    num_tokens, num_experts, topk, _ = world
    ids = make_topk_ids(num_tokens, num_experts, topk, "dropped", device)
    hidden = make_rows(num_tokens, 24, dtype=dtype, device=device)

    def apply(family):
        def run(rows):
            unpacked, plan = family.a2a_unpack(rows, ids.to(rows.device), num_experts, row_alignment=row_alignment)
            return unpacked, *plan

        return run

    bound = reference.routing_plan(ids, num_experts, row_alignment=row_alignment).permuted_to_slot.numel()
    grads = [make_rows(bound, 24, dtype=dtype, device=device, seed=7)]
    assert_matches_reference(apply(moe_ext), apply(reference), (hidden,), grads)
    assert_deterministic(apply(moe_ext), (hidden,), grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_combine(world, routing, dtype, device):
    ids, offsets = make_world(world, routing, device)
    plan = reference.a2a_plan(ids.cpu(), offsets.cpu())
    rows = make_rows(plan.send_to_slot.numel(), 24, dtype=dtype, device=device)
    grads = [make_rows(ids.shape[0], 24, dtype=dtype, device=device, seed=8)]

    def apply(family):
        return lambda r: family.a2a_combine(r, on(r.device, plan))

    assert_matches_reference(apply(moe_ext), apply(reference), (rows,), grads)
    assert_deterministic(apply(moe_ext), (rows,), grads)


# (payload, hidden_size, weighted): odd sizes, less than a scale block, one, several segments.
PACKED = [("native", 7, True), ("native", 1100, False), ("fp8", 7, True), ("fp8", 128, False), ("fp8", 1100, True)]


@pytest.mark.parametrize("payload, hidden_size, weighted", PACKED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_pack_rows(world, dtype, payload, hidden_size, weighted, device):
    """Every byte as the twin has it, there and back; non-contiguous rows too."""
    ids, offsets = make_world(world, "dropped", device)
    num_tokens, topk = ids.shape
    plan = reference.a2a_plan(ids.cpu(), offsets.cpu())
    hidden = make_rows(num_tokens, hidden_size, dtype=dtype, device=device)
    weights = make_topk_weights(num_tokens, topk, device) if weighted else None
    args = (ids, weights, on(device, plan))
    packed = moe_ext.a2a_pack_rows(hidden, *args, payload=payload)
    assert torch.equal(packed.cpu(), reference.a2a_pack_rows(hidden, *args, payload=payload).cpu())
    assert torch.equal(packed, moe_ext.a2a_pack_rows(non_contiguous(hidden), *args, payload=payload))
    unpacked = moe_ext.a2a_unpack_rows(packed, hidden_size, topk, dtype, payload=payload, weighted=weighted)
    expected = reference.a2a_unpack_rows(packed, hidden_size, topk, dtype, payload=payload, weighted=weighted)
    for got, wanted in zip(unpacked, expected, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got.cpu(), wanted.cpu())
    exact, local_ids, _ = reference.a2a_pack(hidden, ids, make_topk_weights(num_tokens, topk, device), on(device, plan))
    assert torch.equal(unpacked[1], local_ids)
    if payload == "native":
        assert torch.equal(unpacked[0], exact)
    elif exact.numel():
        # e4m3 keeps three bits after the first: half a step is 1/16 of a normal number.
        blocks = torch.nn.functional.pad(exact.float(), (0, -hidden_size % 128)).unflatten(1, (-1, 128))
        allowed = blocks.abs() / 16 + blocks.abs().amax(-1, keepdim=True) / 448 * 2**-9 + 1e-6
        allowed = allowed.flatten(1)[:, :hidden_size] + exact.float().abs() * 2 * torch.finfo(dtype).eps
        assert ((unpacked[0].float() - exact.float()).abs() <= allowed).all()


def test_pack_every_slot_alone(device):
    """copies=topk: a row for each slot, as the deduplicated form of topk_ids [num_tokens * topk, 1]."""
    ids, offsets = make_world(WORLDS[2], "dropped", device)
    num_tokens, topk = ids.shape
    hidden = make_rows(num_tokens, 40, dtype=torch.float32, device=device)
    slots = ids.reshape(-1, 1)
    plan = moe_ext.a2a_plan(slots, offsets)
    packed = moe_ext.a2a_pack_rows(hidden, slots, None, plan, copies=topk)
    twin = reference.a2a_pack_rows(hidden, slots, None, plan, copies=topk)
    assert torch.equal(packed.cpu(), twin.cpu()) and plan.send_counts.sum() == (ids >= 0).logical_and(ids < 11).sum()


@pytest.mark.parametrize("payload, hidden_size", [("fp8", 4104), ("native", 1028), ("native", 1024)])
def test_pack_rows_past_the_caches(payload, hidden_size, device):
    """16 MiB of rows and more are streamed; their ends are no multiple of a vector or whole cache lines, and some hold
    no token."""
    ids = make_topk_ids(2100, 8, 2, "uniform", device)
    offsets = torch.tensor([0, 5, 8], dtype=torch.int32, device=device)
    plan = moe_ext.a2a_plan(ids, offsets)
    hidden = make_rows(2100, hidden_size, dtype=torch.float32, device=device)
    packed = moe_ext.a2a_pack_rows(hidden, ids, None, plan, payload=payload)
    assert packed.numel() >= 16 << 20 and (plan.send_to_slot < 0).any()
    assert torch.equal(packed.cpu(), reference.a2a_pack_rows(hidden, ids, None, plan, payload=payload).cpu())
    unpack = {"hidden_size": hidden_size, "topk": 2, "dtype": torch.float32, "payload": payload, "weighted": False}
    pairs = zip(moe_ext.a2a_unpack_rows(packed, **unpack), reference.a2a_unpack_rows(packed, **unpack), strict=True)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def test_fp8_of_special_values(device):
    """Every e4m3 number comes back, ties go to even, NaN and infinity spread over their block and no further."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    between = (numbers[:-1] + numbers[1:]) / 2
    between = torch.cat([between, torch.nextafter(between, torch.tensor(1e9)), torch.nextafter(between, -between)])
    tiny = torch.tensor([1e-45, -3e-41, 1e-38, 0.0, -0.0])
    rows = torch.zeros(16, 256)
    for row, values in enumerate([numbers[:127], numbers[127:], *between.split(120), tiny, tiny * 1e30]):
        rows[row, : len(values)] = values
        rows[row, 127] = 448.0 if row < 12 and values is not tiny else 0.0
    rows[-1, 3], rows[-2, 3] = torch.nan, torch.inf
    ids = torch.zeros(16, 1, dtype=torch.int32, device=device)
    plan = moe_ext.a2a_plan(ids, torch.tensor([0, 1], dtype=torch.int32, device=device))
    packed = moe_ext.a2a_pack_rows(rows.to(device), ids, None, plan, payload="fp8")
    assert torch.equal(packed.cpu(), reference.a2a_pack_rows(rows, ids.cpu(), None, on("cpu", plan), payload="fp8"))
    back = moe_ext.a2a_unpack_rows(packed, 256, 1, torch.float32, payload="fp8", weighted=False)[0].cpu()
    assert torch.equal(back[0, :127], numbers[:127]) and torch.equal(back[1, :127], numbers[127:])
    assert back[-2:, :128].isnan()[:, 3].all() and (back[-2:, 128:] == 0).all() and back[:-2].isfinite().all()


def exchange(blocks: list[list[Tensor]]) -> list[Tensor]:
    """all_to_all_single without a network: blocks[source][destination] -> what each destination receives."""
    return [torch.cat([row[destination] for row in blocks]) for destination in range(len(blocks))]


def expert_parallel_layer(hidden, ids, weights, experts, offsets) -> tuple[list[Tensor], int]:
    """Every rank's share of an expert-parallel layer over virtual ranks, and how many rows travelled.

    hidden, ids, weights: lists, one entry per rank. experts: [num_experts, H, H], rank r holds offsets[r]:offsets[r+1].
    """
    num_ranks = len(hidden)
    bounds = offsets.tolist()
    plans = [moe_ext.a2a_plan(i, offsets) for i in ids]
    splits = [plan.send_counts.tolist() for plan in plans]
    packed = [
        [t[: sum(s)].split(s) for t in moe_ext.a2a_pack(h, i, w, p)]
        for h, i, w, p, s in zip(hidden, ids, weights, plans, splits, strict=True)
    ]
    received = [exchange([rank[part] for rank in packed]) for part in range(3)]
    back = []
    for rank, (rows, local_ids, local_weights) in enumerate(zip(*received, strict=True)):
        num_local = max(1, bounds[rank + 1] - bounds[rank])
        permuted, plan = moe_ext.a2a_unpack(rows, local_ids, num_local)
        starts = plan.expert_offsets.tolist()
        parts = [permuted[a:b] @ experts[bounds[rank] + e] for e, (a, b) in enumerate(itertools.pairwise(starts))
                 if bounds[rank] + e < bounds[rank + 1]]  # fmt: skip
        computed = torch.cat([*parts, permuted[starts[-1] :]])
        maps = (plan.permuted_to_slot, plan.slot_to_permuted, local_ids.shape[1])
        back.append(moe_ext.unpermute(computed, *maps, local_weights).split([s[rank] for s in splits]))
    outputs = []
    for rank, returned in enumerate(exchange(back)):
        tail = returned.new_zeros(plans[rank].send_to_slot.numel() - returned.shape[0], returned.shape[1])
        outputs.append(moe_ext.a2a_combine(torch.cat([returned, tail]), plans[rank]))
    assert num_ranks == len(outputs)
    return outputs, sum(map(sum, splits))


def dense_layer(hidden: Tensor, ids: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    here = (ids >= 0) & (ids < experts.shape[0])
    chosen = experts[torch.where(here, ids, 0).long()]
    return torch.einsum("th,tkhd,tk->td", hidden, chosen, weights * here)


@pytest.mark.cpu
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "bounds", [[0, 9], [0, 4, 9], [0, 2, 2, 9], [0, 3, 5, 7, 9], [0, 1, 2, 3, 4, 5, 6, 8, 9]], ids=str
)
def test_virtual_ranks_equal_the_dense_layer(bounds, routing):
    num_ranks, num_experts, topk, width = len(bounds) - 1, 9, 4, 6
    tokens = [0 if rank == 1 else 5 + 3 * rank for rank in range(num_ranks)]  # rank 1 has no tokens
    ids = make_topk_ids(sum(tokens), num_experts, topk, routing)
    hidden = make_rows(sum(tokens), width, dtype=torch.float64).requires_grad_()
    weights = make_topk_weights(sum(tokens), topk, dtype=torch.float64).requires_grad_()
    experts = make_rows(num_experts, width, width, dtype=torch.float64, seed=4).requires_grad_()
    offsets = torch.tensor(bounds, dtype=torch.int32)
    outputs, rows = expert_parallel_layer(
        hidden.split(tokens), ids.split(tokens), weights.split(tokens), experts, offsets
    )
    expected = dense_layer(hidden, ids, weights, experts)
    assert relative_error(torch.cat(outputs), expected) <= 1e-12
    grad = make_rows(sum(tokens), width, dtype=torch.float64, seed=9)
    inputs = (hidden, weights, experts)
    ours = torch.autograd.grad(torch.cat(outputs), inputs, grad)
    for mine, exact in zip(ours, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert relative_error(mine, exact) <= 1e-12
    rank_of = torch.bucketize(ids, offsets, right=True) - 1
    pairs = {(t, r) for t, row in enumerate(rank_of.tolist()) for r in row if 0 <= r < num_ranks}
    assert rows == len(pairs)


def test_rows_saved_by_sending_a_token_once(device):
    """On average D(R) = R (1 - C(E - E/R, K) / C(E, K)) ranks per token, instead of K experts."""
    num_experts, num_ranks, topk, num_tokens = 256, 8, 8, 4000
    ids = make_topk_ids(num_tokens, num_experts, topk, "uniform", device)
    plan = moe_ext.a2a_plan(ids, moe_ext.even_rank_expert_offsets(num_experts, num_ranks, device))
    expected = num_ranks * (1 - comb(num_experts - num_experts // num_ranks, topk) / comb(num_experts, topk))
    assert abs(expected - 5.295) < 1e-3
    assert abs(plan.send_counts.sum().item() / num_tokens - expected) < 0.05


@pytest.mark.parametrize("seed", range(20))
def test_fuzz(seed, device):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(1, high, (), generator=generator))  # noqa: E731
    num_tokens, num_experts, num_ranks = draw(80), draw(40), draw(12)
    topk = draw(min(num_experts, 9) + 1)
    ids = make_topk_ids(num_tokens, num_experts, topk, ROUTINGS[seed % len(ROUTINGS)], seed=seed)
    cuts = torch.randint(0, num_experts + 1, (num_ranks - 1,), generator=generator).sort().values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([num_experts])]).int()
    plan = moe_ext.a2a_plan(ids.to(device), offsets.to(device))
    for got, wanted in zip(plan, reference.a2a_plan(ids, offsets), strict=True):
        assert got == wanted if isinstance(got, int) else torch.equal(got.cpu(), wanted)


def test_malformed_owners_touch_no_memory(device):
    ids = make_topk_ids(30, 8, 3, "uniform", device)
    owners = torch.tensor([5, -100, 2**31 - 1, 3, 0], dtype=torch.int32, device=device)
    plan = moe_ext.a2a_plan(ids, owners)
    hidden, weights = make_rows(30, 8, dtype=torch.float32, device=device), make_topk_weights(30, 3, device)
    send_hidden, send_ids, _ = moe_ext.a2a_pack(hidden, ids, weights, plan)
    assert send_hidden.isfinite().all() and send_ids.shape == (90, 3)


@pytest.mark.cpu
def test_gradcheck():
    ids, offsets = make_world(WORLDS[2], "dropped", "cpu")
    ids = ids[:5]
    plan = moe_ext.a2a_plan(ids, offsets)
    hidden = make_rows(5, 3, dtype=torch.float64).requires_grad_()
    weights = make_topk_weights(5, 3, dtype=torch.float64).requires_grad_()
    rows = make_rows(plan.send_to_slot.numel(), 3, dtype=torch.float64, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: moe_ext.a2a_pack(h, ids, w, plan)[::2], (hidden, weights))
    assert torch.autograd.gradcheck(lambda h: moe_ext.a2a_unpack(h, ids, 11, row_alignment=2)[0], (hidden,))
    assert torch.autograd.gradcheck(lambda r: moe_ext.a2a_combine(r, plan), (rows,))


def test_opcheck(device):
    ops = torch.ops.moe_ext
    ids, offsets = make_world((6, 8, 3, [0, 3, 8]), "dropped", device)
    plan = moe_ext.a2a_plan(ids, offsets)
    maps = (plan.send_offsets, plan.send_to_slot, plan.slot_to_send)
    hidden, weights = make_rows(6, 8, dtype=torch.float32, device=device), make_topk_weights(6, 3, device)
    torch.library.opcheck(ops.a2a_plan.default, (ids, offsets))
    for needs_grad in (False, True):
        h, w = hidden.clone().requires_grad_(needs_grad), weights.clone().requires_grad_(needs_grad)
        torch.library.opcheck(ops.a2a_pack.default, (h, ids, w, offsets, *maps))
        torch.library.opcheck(ops.a2a_unpack.default, (h, ids, 8, 4))
        rows = moe_ext.a2a_pack(hidden, ids, weights, plan)[0].requires_grad_(needs_grad)
        torch.library.opcheck(ops.a2a_combine.default, (rows, *maps[1:], plan.slots_per_token))
    for payload in ("native", "fp8"):
        packed = moe_ext.a2a_pack_rows(hidden, ids, weights, plan, payload=payload)
        torch.library.opcheck(ops.a2a_pack_rows.default, (hidden, ids, weights, offsets, *maps, payload, 1))
        torch.library.opcheck(ops.a2a_unpack_rows.default, (packed, 8, 3, torch.float32, payload, True))
    grads = (make_rows(12, 8, dtype=torch.float32, device=device), make_rows(12, 3, dtype=torch.float32, device=device))
    torch.library.opcheck(ops.a2a_pack_backward.default, (*grads, ids, offsets, *maps))


def bad(device: str, pack=moe_ext.a2a_pack, **changes):
    """A good set of arguments of a2a_pack, or of a2a_pack_rows, some of them replaced."""
    ids, offsets = make_world((6, 8, 3, [0, 3, 8]), "uniform", device)
    arguments = {
        "hidden": make_rows(6, 8, dtype=torch.float32, device=device),
        "topk_ids": ids,
        "topk_weights": make_topk_weights(6, 3, device),
        "plan": moe_ext.a2a_plan(ids, offsets),
    }
    return pack(**{**arguments, **changes})


def ids_on(device: str) -> Tensor:
    return make_topk_ids(6, 8, 3, "uniform", device)


def owners_on(device: str) -> Tensor:
    return moe_ext.even_rank_expert_offsets(8, 2, device)


BAD_CALLS = [
    ("plan: float ids", lambda d: moe_ext.a2a_plan(ids_on(d).float(), owners_on(d)), r"topk_ids: expected int32 or int64 \[num_tokens, topk\], got float32 \[6, 3\]"),
    ("plan: no columns", lambda d: moe_ext.a2a_plan(ids_on(d)[:, :0], owners_on(d)), r"topk, the columns of topk_ids: expected an integer >= 1, got 0"),
    ("plan: int64 owners", lambda d: moe_ext.a2a_plan(ids_on(d), owners_on(d).long()), r"rank_expert_offsets: expected int32 \[num_ranks \+ 1\], got int64 \[3\]"),
    ("plan: no rank", lambda d: moe_ext.a2a_plan(ids_on(d), owners_on(d)[:1]), r"rank_expert_offsets: expected \[num_ranks \+ 1\] with at least one rank, got int32 \[1\]"),
    ("pack: integer rows", lambda d: bad(d, hidden=torch.zeros(6, 8, device=d).int()), r"hidden: expected float32, .* got int32 \[6, 8\]"),
    ("pack: rows of other tokens", lambda d: bad(d, hidden=torch.zeros(5, 8, device=d)), r"hidden: expected size 6 \(num_tokens, as in topk_ids\)"),
    ("pack: half weights", lambda d: bad(d, topk_weights=torch.zeros(6, 3, device=d).half()), r"topk_weights: expected float32 \[num_tokens, topk\], got float16 \[6, 3\]"),
    ("pack: a plan of other tokens", lambda d: bad(d, plan=moe_ext.a2a_plan(ids_on(d)[:4], owners_on(d))), r"slot_to_send: expected num_tokens \* min\(topk, num_ranks\) = 12 entries, got 8"),
    ("pack_rows: an unknown payload", lambda d: bad(d, moe_ext.a2a_pack_rows, payload="int4"), r"payload: expected native or fp8, got int4"),
    ("pack_rows: copies of other rows", lambda d: bad(d, moe_ext.a2a_pack_rows, copies=2), r"hidden: expected \[num_tokens, hidden_size\] with num_tokens \* 2 \(copies\) = 6"),
    ("pack_rows: half weights", lambda d: bad(d, moe_ext.a2a_pack_rows, topk_weights=torch.zeros(6, 3, device=d).half()), r"topk_weights: expected float32 \[num_tokens, topk\], got float16 \[6, 3\]"),
    ("unpack_rows: rows of another size", lambda d: moe_ext.a2a_unpack_rows(torch.zeros(2, 16, dtype=torch.uint8, device=d), 8, 3, torch.float32), r"rows: expected size 64 \(row_bytes, of this hidden_size, topk, dtype and payload\) in dimension 1"),
    ("unpack_rows: no rows of bytes", lambda d: moe_ext.a2a_unpack_rows(torch.zeros(2, 64, device=d), 8, 3, torch.float32), r"rows: expected uint8 \[num_received, row_bytes\], got float32 \[2, 64\]"),
    ("unpack: ids of other rows", lambda d: moe_ext.a2a_unpack(torch.zeros(5, 8, device=d), ids_on(d), 4), r"recv_ids: expected size 5 \(num_received, as in recv_hidden\)"),
    ("unpack: no experts", lambda d: moe_ext.a2a_unpack(torch.zeros(6, 8, device=d), ids_on(d), 0), r"num_experts: expected an integer >= 1, got 0"),
    ("combine: too few rows", lambda d: moe_ext.a2a_combine(torch.zeros(5, 8, device=d), moe_ext.a2a_plan(ids_on(d), owners_on(d))), r"recv_rows: expected size 12 \(num_rows, the length of send_to_slot\)"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", [pytest.param(*rest, id=name) for name, *rest in BAD_CALLS])
def test_bad_calls(call, message, device):
    with pytest.raises(RuntimeError, match=message):
        call(device)
