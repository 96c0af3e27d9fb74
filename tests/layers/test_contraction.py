"""Every equation as one matrix product, against NumPy's own einsum."""

import dataclasses

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_vera.layers._contraction import dense_contraction
from keras_vera.layers._contraction import einsum_contraction

pytestmark = pytest.mark.members_in_turn

# The equations of KerasHub's layers, by where the kernel is contracted.
FIRST = [
    "abc,cd->abd",
    "abc,cde->abde",
    "abc,cdef->abdef",
    "abcd,cde->abe",
    "bqm,muh->bquh",
    "bkm,mvh->bkvh",
    "bquh,uhm->bqm",
    "bqm,mnh->bqnh",
    "bkm,mnh->bknh",
    "btm,mnh->btnh",
    "bsm,mnh->bsnh",
    "btd,dnh->btnh",
    "bsd,dkh->bskh",
    "btnh,nhd->btd",
    "btd,df->btf",
    "btf,fd->btd",
]
NOT_FIRST = [
    "btd,ndh->btnh",
    "bsd,kdh->bskh",
    "bsd,qdh->bsqh",
    "ibnd,hnd->ibh",
]
OTHERS = [
    "ab,bc->ca",
    "abcd,cbe->aed",
    "abcd,edfb->face",
    # Keras takes axes that are summed only, and kernels without one kind.
    "abc,cd->ad",
    "abcd,ec->ae",
    "ab,b->a",
    "ab,c->ac",
]
ELIDED = [
    ("...x,xy->...y", 1),
    ("...x,xy->...y", 4),
    ("...xy,zyx->...z", 3),
    ("...ab,abcd->...dc", 4),
    ("...ab,bc->...ac", 4),
    ("ab...,bc->ac...", 2),
    ("ab...,bc->ac...", 4),
    ("abc...,dcb->ad...", 4),
    ("abc...,ceb->ae...", 5),
]


def integers(rng, shape):
    # Small integers are exact in float32, so that all bits are compared.
    return rng.integers(-4, 5, shape).astype("float32")


def shapes_of(equation, input_ndim, dims):
    """Returns the shapes of input and kernel; elided axes have size 3."""
    inputs, kernel = equation.split("->")[0].split(",")
    before, dots, after = inputs.partition("...")
    elided = [3] * (input_ndim - len(before) - len(after))
    assert dots or not elided
    shape = [dims[x] for x in before] + elided + [dims[x] for x in after]
    return tuple(shape), tuple(dims[x] for x in kernel)


def check(equation, input_ndim, dims, seed=0):
    """Checks that the matrix form computes the equation."""
    rng = np.random.default_rng(seed)
    shape, kernel_shape = shapes_of(equation, input_ndim, dims)
    x, kernel = integers(rng, shape), integers(rng, kernel_shape)
    contraction = einsum_contraction(equation, input_ndim, kernel_shape)
    matrix = contraction.kernel_matrix(ops.convert_to_tensor(kernel))
    assert tuple(matrix.shape) == (contraction.m, contraction.n)
    rows = contraction.input_matrix(ops.convert_to_tensor(x))
    assert tuple(rows.shape) == (contraction.tokens(shape), contraction.m)
    y = contraction.output_tensor(ops.matmul(rows, matrix), shape)
    expected = np.einsum(equation, x.astype("float64"), kernel)
    assert tuple(y.shape) == expected.shape
    np.testing.assert_array_equal(ops.convert_to_numpy(y), expected)
    own = contraction.product(
        ops.convert_to_tensor(x), ops.convert_to_tensor(kernel)
    )
    np.testing.assert_array_equal(ops.convert_to_numpy(own), expected)
    check_adjoints(contraction, x, rows, expected)
    back = contraction.kernel_tensor(matrix)
    np.testing.assert_array_equal(ops.convert_to_numpy(back), kernel)
    return contraction


def check_adjoints(contraction, x, rows, y):
    """Checks the two ways back, as gradients take them.

    `output_matrix` undoes `output_tensor`. `input_tensor` is the transpose of
    the linear `input_matrix`: <input_matrix(x), r> = <x, input_tensor(r)>.
    """
    shape = x.shape
    y = ops.convert_to_tensor(y.astype("float32"))
    there = contraction.output_tensor(contraction.output_matrix(y), shape)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(there), ops.convert_to_numpy(y)
    )
    r = integers(np.random.default_rng(1), rows.shape)
    back = contraction.input_tensor(ops.convert_to_tensor(r), shape)
    assert tuple(back.shape) == shape
    assert np.sum(ops.convert_to_numpy(rows) * r) == np.sum(
        x * ops.convert_to_numpy(back)
    )


def different_dims(equation):
    # Of different sizes, so that no wrong order of axes passes.
    letters = sorted({x for x in equation if x.isalpha()})
    return {letter: 2 + i for i, letter in enumerate(letters)}


@pytest.mark.parametrize("equation", FIRST + NOT_FIRST)
def test_equations_of_kerashub(equation):
    ndim = equation.index(",")
    contraction = check(equation, ndim, different_dims(equation))
    # None of them moves data around a product, and most not the kernel.
    assert contraction.input_permutation is None
    assert contraction.output_permutation is None
    assert (contraction.kernel_permutation is None) == (equation in FIRST)


@pytest.mark.parametrize("equation", OTHERS)
def test_other_equations(equation):
    check(equation, equation.index(","), different_dims(equation))


@pytest.mark.parametrize("equation, ndim", ELIDED)
def test_elided_axes(equation, ndim):
    check(equation, ndim, different_dims(equation))


@st.composite
def products(draw):
    """Draws an equation of random letters and orders, and sizes."""

    def shuffled(axes):
        return "".join(draw(st.permutations(axes)))

    letters = iter(draw(st.permutations("abcdefghXYZ")))

    def take(least, most):
        return [next(letters) for _ in range(draw(st.integers(least, most)))]

    contracted, new = take(1, 2), take(1, 2)
    kept, summed = take(0, 3), take(0, 1)
    inputs = shuffled(kept + contracted + summed)
    kernel = shuffled(contracted + new)
    outputs = shuffled(kept + new)
    elided = draw(st.sampled_from([None, "left", "right"]))
    ndim = len(inputs)
    if elided is not None:
        ndim += draw(st.integers(0, 2))
    if elided == "left":
        inputs, outputs = f"...{inputs}", f"...{outputs}"
    elif elided == "right":
        inputs, outputs = f"{inputs}...", f"{outputs}..."
    axes = contracted + new + kept + summed
    # 1 is in the list: it is where a lost axis is easily overlooked.
    dims = {axis: draw(st.sampled_from([1, 2, 3])) for axis in axes}
    return f"{inputs},{kernel}->{outputs}", ndim, dims


@given(product=products(), seed=st.integers(0, 9))
def test_random_equations(product, seed):
    check(*product, seed=seed)


def test_matrix_has_the_axes_in_the_order_of_the_kernel():
    # The order decides which entry of d and b belongs to which index, so it
    # may never change: adapter files depend on it.
    kernel = np.arange(2 * 3 * 4 * 5, dtype="float32").reshape(2, 3, 4, 5)
    contraction = einsum_contraction("wyxt,xayb->wbat", 4, kernel.shape)
    assert (contraction.input_dims, contraction.output_dims) == ((2, 4), (3, 5))
    matrix = contraction.kernel_matrix(ops.convert_to_tensor(kernel))
    expected = np.einsum("xayb->xyab", kernel).reshape(8, 15)
    np.testing.assert_array_equal(ops.convert_to_numpy(matrix), expected)


def test_spaces_are_ignored():
    assert einsum_contraction("abc, cd -> abd", 3, (4, 5)) == (
        einsum_contraction("abc,cd->abd", 3, (4, 5))
    )


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3), (0, 3)])
def test_dense(rng, shape):
    x, kernel = integers(rng, shape), integers(rng, (3, 5))
    contraction = dense_contraction(kernel.shape)
    assert (contraction.m, contraction.n) == (3, 5)
    matrix = contraction.kernel_matrix(ops.convert_to_tensor(kernel))
    np.testing.assert_array_equal(ops.convert_to_numpy(matrix), kernel)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(contraction.kernel_tensor(matrix)), kernel
    )
    rows = contraction.input_matrix(ops.convert_to_tensor(x))
    y = contraction.output_tensor(ops.matmul(rows, matrix), shape)
    np.testing.assert_array_equal(ops.convert_to_numpy(y), x @ kernel)
    # A dense layer is the equation that says the same.
    equation = "...x,xy->...y"
    same = einsum_contraction(equation, len(shape), (3, 5))
    assert dataclasses.replace(contraction, equation=equation) == same


def test_unknown_sizes_stay_unknown():
    contraction = einsum_contraction("btnh,nhde->bted", 4, (2, 3, 4, 5))
    shape = (None, None, 2, 3)
    x = contraction.input_matrix(keras.KerasTensor(shape))
    assert x.shape == (None, 6)
    y = contraction.output_tensor(keras.KerasTensor((None, 20)), (2, 7, 2, 3))
    assert y.shape == (2, 7, 5, 4)
    # Unknown axes count as 32.
    assert contraction.tokens(shape) == 32 * 32
    assert contraction.tokens((2, 7, 2, 3)) == 14


@pytest.mark.parametrize(
    "equation, shape, axes",
    [
        ("abc,bcd->abd", (3, 4, 5), ["b"]),
        ("ab,b->ab", (3,), ["b"]),
        ("aecb,bced->aecd", (4, 5, 3, 6), ["c", "e"]),
        ("...ab,bca->...ac", (4, 5, 3), ["a"]),
    ],
)
def test_axis_in_all_operands_is_refused(equation, shape, axes):
    with pytest.raises(ValueError) as error:
        einsum_contraction(equation, equation.index(","), shape)
    assert f"the axes {axes} are shared by input, kernel" in str(error.value)
    assert f"'{equation}'" in str(error.value)


@pytest.mark.parametrize(
    "equation, shape, axes, operand",
    [
        ("abb,bc->ac", (4, 5), ["b"], "abb"),
        ("ab,bcc->ac", (4, 5, 5), ["c"], "bcc"),
        ("ab,bc->acc", (4, 5), ["c"], "acc"),
        ("...aba,bc->...c", (4, 5), ["a"], "...aba"),
    ],
)
def test_axis_twice_in_an_operand_is_refused(equation, shape, axes, operand):
    with pytest.raises(ValueError) as error:
        einsum_contraction(equation, equation.index(","), shape)
    assert f"the axes {axes} occur twice in '{operand}'" in str(error.value)
    assert f"'{equation}'" in str(error.value)
