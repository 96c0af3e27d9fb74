"""The rule that picks how an adapted layer is computed."""

import itertools

import pytest

from keras_vera.product.plan import Plan
from keras_vera.product.plan import choose_plan
from keras_vera.product.structure import Blocks
from keras_vera.product.structure import Dense

# tokens, m, n, rank, blocks: folded, kept, M from the kernel.
TABLE = [
    # One token of decoding, of BERT-base and of Llama-7B.
    (1, 768, 768, 256, 1, False, False, False),
    (1, 4096, 11008, 1024, 1, False, False, False),
    # A batch of the benchmark, 32 x 128 tokens: attention, feed-forward.
    (4096, 768, 768, 256, 1, True, True, False),
    (4096, 768, 768, 1024, 1, True, True, True),
    (4096, 768, 3072, 256, 1, True, True, False),
    (4096, 768, 3072, 1024, 1, True, True, True),
    (4096, 3072, 768, 256, 1, True, True, False),
    (4096, 3072, 768, 1024, 1, True, True, True),
    # Blocks fold earlier, and never need the gradient of the kernel.
    (4096, 768, 768, 256, 16, True, True, False),
    (4096, 768, 768, 1024, 16, True, True, False),
    (4096, 768, 3072, 1024, 16, True, True, False),
    # A large model with few tokens keeps no folded kernel.
    (4095, 4096, 4096, 256, 1, True, False, False),
    (2048, 4096, 11008, 1024, 1, False, False, False),
    (8192, 4096, 11008, 1024, 1, True, False, False),
    # An empty batch.
    (0, 768, 768, 256, 1, False, False, False),
]


def structure_of(m, n, rank, blocks):
    return Dense(m, n, rank) if blocks == 1 else Blocks(m, n, rank, blocks)


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_table(row):
    tokens, *shape, folded, kept, m_from_kernel = row
    plan = choose_plan(tokens, structure_of(*shape))
    assert plan == Plan(folded, kept, m_from_kernel)


def test_names_force_the_form():
    structure = Dense(768, 768, 256)
    for tokens in (1, 4096):
        for name, folded, kept in (
            ("additive", False, False),
            ("folded", True, False),
            ("folded-kept", True, True),
        ):
            plan = choose_plan(tokens, structure, plan=name)
            assert (plan.folded, plan.kept) == (folded, kept)
            auto = choose_plan(tokens, structure)
            assert plan.m_from_kernel == auto.m_from_kernel


# m, n, rank, blocks: the tokens from which on it folds, in float32 and in
# 16 bits, where the same bytes are the time of more flops.
FOLDS_FROM = [
    (768, 768, 16, 1, 649, 692),
    (768, 768, 256, 1, 418, 441),
    # Here what counts is the [T, r] of the additive form.
    (768, 768, 1024, 1, 380, 376),
    (768, 768, 256, 16, 548, 634),
    (768, 768, 1024, 16, 301, 418),
    (4096, 4096, 64, 1, 2819, 3159),
    (4096, 11008, 1024, 1, 3030, 3070),
]


@pytest.mark.parametrize("row", FOLDS_FROM, ids=str)
def test_dtype_decides_where_folding_starts(row):
    *shape, in_float32, in_16_bits = row
    structure = structure_of(*shape)
    for dtype, least in (
        ("float32", in_float32),
        ("float64", in_float32),
        ("float16", in_16_bits),
        ("bfloat16", in_16_bits),
    ):
        assert not choose_plan(least - 1, structure, dtype).folded
        assert choose_plan(least, structure, dtype).folded


@pytest.mark.parametrize("blocks", [1, 4, 16])
@pytest.mark.parametrize("rank", [256, 1024])
def test_more_tokens_never_unfold(blocks, rank):
    structure = structure_of(768, 768, rank, blocks)
    folded = [choose_plan(2**k, structure).folded for k in range(18)]
    assert folded == sorted(folded)
    assert folded[-1] and not folded[0]


def test_choice_follows_the_flops_where_they_differ_much():
    # 2mnr against 2Tr(m + n), and 2Tr(m + n) against 2Tmn + 2mnr.
    sizes = [256, 1024, 4096]
    for m, n, r in itertools.product(sizes, sizes, [64, 256, 1024]):
        for tokens in (8, 64, 512, 4096, 32768):
            plan = choose_plan(tokens, Dense(m, n, r))
            fold, add = m * n * r, tokens * r * (m + n)
            if fold > 2 * add:
                assert not plan.folded
            if 8 * fold < add and r >= 256:
                assert plan.folded
            of_kernel = m * n * (tokens + r)
            if of_kernel > 2 * add:
                assert not plan.m_from_kernel
            if 4 * of_kernel < add:
                assert plan.m_from_kernel
