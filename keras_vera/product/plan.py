"""The rule that picks the cheapest way to compute an adapted layer."""

from dataclasses import dataclass

PLANS = ("auto", "folded", "folded-kept", "additive")

# How many flops cost as much as moving one byte.
_FLOPS_PER_BYTE = {"float32": 10, "float64": 5}
_FLOPS_PER_BYTE_16_BIT = 40


@dataclass(frozen=True)
class Plan:
    """How one adapted layer is computed.

    Attributes:
        folded: Whether the kernel `W + (A * d) B * b` is made, once for all
            tokens; otherwise `b * ((x A * d) B)` is added to `x W`.
        kept: Whether the folded kernel is kept for the backward pass;
            otherwise it is made again there.
        m_from_kernel: Whether M, from which the gradients of d and b are
            read, is `A^T (x^T g)`; otherwise it is `(x A)^T g`.
    """

    folded: bool
    kept: bool
    m_from_kernel: bool


def choose_plan(tokens, structure, dtype="float32", plan="auto", inputs=None):
    """Returns the `Plan` of a layer, by counted flops and bytes.

    With T tokens, a kernel of m x n and rank r, folding costs 2mnr flops and
    the additive form 2Tr(m + n); M costs 2Tr(m + n) from the tokens and
    2Tmn + 2mnr from the kernel. Structured pairs divide all that carries r.
    A layer does not know which others read its x, so that x A counts in full:
    where query and value share it, ranks somewhat above m / 2 would do better
    from the tokens (BERT-base, 4096 tokens: ranks 432 to 576, by at most 2 %
    of a step).

    The folded kernel is kept for the backward pass where it is not larger
    than the input, which is kept anyway; Keras' LoRA always keeps its own.

    Args:
        tokens: Integer, the rows of the layer's input seen as a matrix.
        structure: `Dense` or `Blocks`, with the layer's m, n and rank.
        dtype: String, the compute dtype.
        plan: String, one of `PLANS`, to force a form of the forward pass.
        inputs: Integer, the inputs that `x A` multiplies for each token.
            Defaults to m; a lookup multiplies none.

    Returns:
        A `Plan`.
    """
    m, n = structure.m, structure.n
    inputs = m if inputs is None else inputs
    itemsize = {"float32": 4, "float64": 8}.get(dtype, 2)
    balance = _FLOPS_PER_BYTE.get(dtype, _FLOPS_PER_BYTE_16_BIT) * itemsize
    # Both matrices are [tokens, width] x [width, .] for tokens, and sum over
    # `depth` channels for each entry of the kernel.
    width, depth = structure.width, structure.depth
    # The numbers written, and read again, beside those of the base layer.
    fold = 2 * m * n * depth + balance * 4 * m * n
    add = 2 * tokens * width * (inputs + n)
    add += balance * 4 * tokens * (width + n)
    of_tokens = 2 * tokens * width * (m + n) + balance * 2 * tokens * width
    of_kernel = 2 * m * n * (tokens + depth) + balance * 2 * m * n
    folded = fold < add if plan == "auto" else plan != "additive"
    kept = n <= tokens if plan == "auto" else plan == "folded-kept"
    return Plan(folded, folded and kept, of_kernel < of_tokens)
