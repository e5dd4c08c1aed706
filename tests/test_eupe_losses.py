"""Losses of Eq. 3 to 7: hand-computed values, both interpolation directions, where gradients go."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eupe.encoders import Encoder, Features
from eupe.heads import AdapterHead, DistillationModel
from eupe.losses import cosine_loss, match_grids, teacher_loss, total_loss
from eupe.spec import EncoderSpec, TeacherSpec
from eupe.teachers import Teacher

EXACT = {"rtol": 1e-6, "atol": 1e-7}  # one float32 rounding of a hand-computed number
PARITY = {"rtol": 1e-5, "atol": 1e-6}  # float32, the same sum in another order
TINY_VIT = EncoderSpec(
    architecture="vit_tiny_patch16_dinov3_qkvb", model_arguments={"depth": 2, "init_values": 1.0}
)
TINY_CNN = EncoderSpec(
    architecture="convnext_atto", summary="average_pool", model_arguments={"ls_init_value": 1.0}
)


def features(summary, patches):
    """Summary [B, D] and patches [B, H, W, D] of nested lists."""
    return Features(torch.tensor(summary), torch.tensor(patches))


# One row: summary cosine 24/25; of two patch tokens one agrees and one is orthogonal.
PREDICTION = features([[3.0, 4.0]], [[[[1.0, 0.0], [0.0, 2.0]]]])
TARGET = features([[4.0, 3.0]], [[[[1.0, 0.0], [2.0, 0.0]]]])
ALL = torch.tensor([True])


@pytest.mark.parametrize(
    ("prediction", "target", "loss"),
    [
        ([3.0, 4.0], [4.0, 3.0], 1 - 24 / 25),
        ([1.0, 0.0], [0.0, 5.0], 1.0),
        ([2.0, 0.0], [-1.0, 0.0], 2.0),
        ([1.0, 1.0], [7.0, 7.0], 0.0),
        ([1.0, 0.0], [1.0, 1.0], 1 - math.sqrt(0.5)),
    ],
)
def test_cosine_loss_is_one_minus_cosine(prediction, target, loss):
    value = cosine_loss(torch.tensor(prediction), torch.tensor(target))
    torch.testing.assert_close(value, torch.tensor(loss), **EXACT)


def test_eq4_and_eq5_term_by_term():
    loss = teacher_loss(PREDICTION, TARGET, ALL)
    assert loss.summary.item() == pytest.approx(0.04)
    assert loss.patch_cosine.item() == pytest.approx((0 + 1) / 2)
    # Differences 0, 0, -2, 2: |d| - 1/2 beyond beta = 1.
    assert loss.patch_smooth_l1.item() == pytest.approx((0 + 0 + 1.5 + 1.5) / 4)
    assert loss.total.item() == pytest.approx(0.04 + 0.9 * 0.5 + 0.1 * 0.75)


def test_smooth_l1_is_squared_below_its_beta():
    target = features([[4.0, 3.0]], [[[[1.5, 0.0], [0.0, 2.0]]]])
    assert teacher_loss(PREDICTION, target, ALL).patch_smooth_l1.item() == pytest.approx(
        0.5 * 0.5**2 / 4
    )
    # Below beta: d^2 / (2 beta); beyond: |d| - beta / 2.
    wide = teacher_loss(PREDICTION, target, ALL, smooth_l1_beta=2.0)
    assert wide.patch_smooth_l1.item() == pytest.approx(0.5**2 / 4 / 4)
    narrow = teacher_loss(PREDICTION, target, ALL, smooth_l1_beta=0.25)
    assert narrow.patch_smooth_l1.item() == pytest.approx((0.5 - 0.125) / 4)


def test_alpha_and_beta_weigh_the_patch_terms():
    loss = teacher_loss(PREDICTION, TARGET, ALL, alpha=0.25, beta=2.0)
    assert loss.total.item() == pytest.approx(0.04 + 0.25 * 0.5 + 2 * 0.75)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_eq7_gamma_multiplies_the_patch_term_only(gamma):
    loss = teacher_loss(PREDICTION, TARGET, ALL, gamma=gamma)
    assert loss.total.item() == pytest.approx(0.04 + gamma * (0.9 * 0.5 + 0.1 * 0.75))
    assert loss.patch_cosine.item() == pytest.approx(0.5)


def test_eq6_sums_over_teachers():
    one = teacher_loss(PREDICTION, TARGET, ALL)
    two = teacher_loss(PREDICTION, PREDICTION, ALL)
    assert total_loss([one, two]).item() == pytest.approx(0.565)
    assert total_loss([one, one, one]).item() == pytest.approx(3 * 0.565)


# PyTorch's bicubic kernel (A = -3/4) from 2 to 4 samples, edges repeated: at source coordinate
# -1/4 only one tap, at distance 5/4, falls on the far sample; at 1/4 the taps at 3/4 and 7/4 do.
FAR = -0.75 * 1.25**3 + 3.75 * 1.25**2 - 6 * 1.25 + 3
NEAR = (1.25 * 0.75**3 - 2.25 * 0.75**2 + 1) + (-0.75 * 1.75**3 + 3.75 * 1.75**2 - 6 * 1.75 + 3)
RAMP = [FAR, NEAR, 1 - NEAR, 1 - FAR]


def test_the_kernel_by_hand():
    assert (FAR, NEAR) == (-0.10546875, 0.2265625)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("smaller_first", [True, False])
def test_the_smaller_grid_is_resized_bicubic(axis, smaller_first):
    shape = [1, 1, 1, 1]
    shape[axis] = 2
    small = torch.tensor([0.0, 1.0]).view(shape).expand(1, 2, 2, 1).contiguous()
    shape[axis] = 4
    expected = torch.tensor(RAMP).view(shape).expand(1, 4, 4, 1)
    large = torch.rand(1, 4, 4, 1, generator=torch.Generator().manual_seed(0))
    pair = (small, large) if smaller_first else (large, small)
    resized = match_grids(*pair)
    torch.testing.assert_close(resized[not smaller_first], expected, **EXACT)
    assert resized[smaller_first] is large


def test_both_directions_of_the_loss():
    """A student of 2 x 2 and a teacher of 4 x 4, and the other way round, by hand."""
    small = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).view(1, 2, 2, 1)
    ones = torch.ones(1, 4, 4, 1)
    gaps = [abs(value - 1) for value in RAMP]
    expected = sum(gap - 0.5 if gap > 1 else 0.5 * gap**2 for gap in gaps) / 4
    for prediction, target in ((small, ones), (ones, small)):
        loss = teacher_loss(
            Features(torch.ones(1, 1), prediction), Features(torch.ones(1, 1), target), ALL
        )
        assert loss.patch_smooth_l1.item() == pytest.approx(expected, rel=1e-5)
        # One coordinate: the cosine is the sign, and only the first of four columns is negative.
        assert loss.patch_cosine.item() == pytest.approx(2 / 4)


def test_patch14_at_448_meets_patch16_at_256():
    student, teacher = torch.rand(2, 16, 16, 8), torch.rand(2, 32, 32, 8)
    a, b = match_grids(student, teacher)
    assert a.shape == b.shape == teacher.shape


def test_crossed_grids_are_refused():
    with pytest.raises(ValueError, match="4x2 and 2x4: neither holds the other"):
        match_grids(torch.zeros(1, 4, 2, 1), torch.zeros(1, 2, 4, 1))


@pytest.mark.parametrize("kind", ["summary", "patches"])
def test_another_width_is_refused(kind):
    wide = TARGET._replace(**{kind: torch.cat([getattr(TARGET, kind)] * 2, -1)})
    with pytest.raises(ValueError, match=f"{kind}: prediction is 2 wide, target 4"):
        teacher_loss(PREDICTION, wide, ALL)


def random_features(seed: int, rows: int, side: int = 3) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(
        torch.randn(rows, 5, generator=generator),
        torch.randn(rows, side, side, 4, generator=generator),
    )


def test_invalid_rows_count_for_nothing_even_when_nan():
    prediction, target = random_features(0, 4), random_features(1, 4)
    valid = torch.tensor([True, False, True, False])
    poisoned = Features(*(t.clone() for t in target))
    for tokens in poisoned:
        tokens[~valid] = math.nan
    leaves = Features(*(t.clone().requires_grad_() for t in prediction))
    loss = teacher_loss(leaves, poisoned, valid)
    kept = teacher_loss(
        *(Features(*(t[valid] for t in f)) for f in (prediction, target)), ALL.expand(2)
    )
    for ours, theirs in zip(loss, kept, strict=True):
        torch.testing.assert_close(ours, theirs, **PARITY)
    loss.total.backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[~valid] == 0).all()
        assert (leaf.grad[valid] != 0).any()


def test_a_batch_without_valid_rows_has_zero_loss_and_gradient():
    leaves = Features(*(t.requires_grad_() for t in random_features(0, 2)))
    target = Features(*(torch.full_like(t, math.nan) for t in leaves))
    loss = teacher_loss(leaves, target, torch.tensor([False, False]))
    loss.total.backward()
    assert [float(term.detach()) for term in loss] == [0, 0, 0, 0]
    assert all((leaf.grad == 0).all() for leaf in leaves)


@given(st.lists(st.booleans(), min_size=2, max_size=9), st.data())
def test_accumulated_micro_batches_equal_the_batch(valid, data):
    """Losses and gradients, however the rows are cut and whichever of them are valid."""
    rows = len(valid)
    mask = torch.tensor(valid)
    cut = data.draw(st.integers(1, rows - 1))
    target = random_features(1, rows, side=6)
    whole = Features(*(t.requires_grad_() for t in random_features(0, rows)))
    parts = Features(*(t.requires_grad_() for t in random_features(0, rows)))
    loss = teacher_loss(whole, target, mask)
    loss.total.backward()
    terms = torch.zeros(4)
    for piece in (slice(0, cut), slice(cut, rows)):
        part = teacher_loss(
            Features(*(t[piece] for t in parts)),
            Features(*(t[piece] for t in target)),
            mask[piece],
            count=float(mask.sum()),
        )
        part.total.backward()
        terms += torch.stack(list(part)).detach()
    torch.testing.assert_close(terms, torch.stack(list(loss)).detach(), **PARITY)
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **PARITY)


def test_losses_are_float32_of_bfloat16_predictions():
    prediction = Features(*(t.bfloat16() for t in random_features(0, 2)))
    loss = teacher_loss(prediction, random_features(1, 2), torch.tensor([True, True]))
    assert {term.dtype for term in loss} == {torch.float32}


# Eq. 3 and the whole flow.


def test_eq3_head_by_its_formula():
    head = AdapterHead(3, 7, 2)
    assert [tuple(p.shape) for p in head.parameters()] == [(7, 3), (7,), (7,), (2, 7)]
    first, norm, _, last = head
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
        x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1))
        hidden = x @ first.weight.T
        centred = hidden - hidden.mean(-1, keepdim=True)
        hidden = centred / (hidden.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        hidden = hidden * norm.weight + norm.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        torch.testing.assert_close(head(x), hidden @ last.weight.T, **PARITY)


@pytest.mark.parametrize("student", [TINY_VIT, TINY_CNN], ids=["vit", "convnext"])
def test_gradients_reach_every_weight_of_student_and_heads_and_none_of_the_teacher(student):
    teacher = Teacher(
        TeacherSpec(name="big.teacher", encoder=TINY_VIT, weights="0" * 64), Encoder(TINY_VIT, 5)
    )
    widths = teacher.encoder.summary_dim, teacher.encoder.patch_dim
    model = DistillationModel(Encoder(student, 1), {"big.teacher": widths}, hidden=16)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    target = teacher(pixels)
    assert not target.summary.requires_grad
    _, predicted = model(pixels)
    teacher_loss(predicted["big.teacher"], target, torch.tensor([True, True])).total.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_heads_are_drawn_from_their_seed_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    encoder = Encoder(TINY_VIT)
    a, b, c = (
        DistillationModel(encoder, {"t": (8, 8)}, hidden=8, seed=seed).heads.state_dict()
        for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    name = "t.summary.0.weight"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], c[name])
