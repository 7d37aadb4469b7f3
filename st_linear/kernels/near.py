"""Exact attention to near blocks, forward and backward, in Triton: the near part of near/far attention.

One input form for padded and packed batches: query, key, value (N, H, D), and text t is the rows ``starts[t]`` to
``starts[t] + lengths[t] - 1``. Rows of no text are never read. Tokens of a text fall into blocks of ``window``,
counted from its start, and ``near(i)`` is the tokens of i's own text whose block is i's or a neighbour of it.

Cost per token and head, with w = window, e bytes per element of the inputs and 4 per element of the results. A token
has 3·w near tokens (fewer at both ends of a text):

========  ==============================  =====================================================
pass      floor                           these kernels
========  ==============================  =====================================================
forward   3·e·D bytes read                the same; k and v come K/BLOCK times from the cache
          4·D + 4 bytes written           4 more, as lse is filled first
          12·w·D operations, 3·w exp      4·K·D operations, K exp
backward  3·e·D + 8·D + 4 bytes read      6·e·D + 12·D + 12, with grad_output in float32
          12·D bytes written              4 more
          30·w·D operations, 3·w exp      14·K·D operations, 2·K exp
========  ==============================  =====================================================

K is the keys that a tile of BLOCK rows looks at, all blocks from those near its first row to those near its last:
``3·w`` where BLOCK divides w, ``2·w + BLOCK`` where w divides BLOCK, below ``4·w + BLOCK`` in all other cases; then
rounded up to whole tiles. Most of a tile is masked where w is far below BLOCK.

At w = D = 64 in bfloat16 the forward floor is 49 k operations over 644 bytes, 76 per byte: a quarter of what it takes
for an H100's tensor cores, not its memory, to be the limit. The backward recomputes the weights in two kernels, one
for queries and one for keys, and spends 7 products where a single kernel would spend 5. That one would add up the
gradients of one side with atomics, in an order that changes from run to run.

References:
    - FlashAttention-2, the online softmax and the two sides of the backward: https://arxiv.org/abs/2307.08691
    - Ring Attention, a part's gradient from the whole's log-sum-exp: https://arxiv.org/abs/2310.01889
"""

# Triton gives the arguments of its functions their types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

LOG2_E = 1.4426950408889634
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 128
VARYING = ["max_length", "num_texts", "num_rows", "lse_head_stride", "delta_head_stride"]
"""Arguments that differ from batch to batch: Triton would compile again for multiples of 16."""


def near_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    max_length: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every token to its own block of its text and to both neighbours.

    ``output_i = Σ_j exp(s_ij) v_j / Σ_j exp(s_ij)`` and ``lse_i = log Σ_j exp(s_ij)`` over j in near(i), with
    ``s_ij = scale · q_i·k_j``. Time O(N·window·D), memory O(N·D). No gradient is recorded: the caller joins this and
    :func:`near_attention_backward`.

    Args:
        query: (N, H, D), float32, bfloat16 or float16, D at most 128, any strides of which the last is 1.
        key: As query.
        value: As query.
        starts: (B,) int32, first row of each text.
        lengths: (B,) int32, rows of each text; 0 for an empty one. Texts do not overlap.
        max_length: At least the largest of ``lengths``; a longer text counts as cut there.
        window: Block length in tokens, at least 1. Each value is compiled once.
        scale: Factor of the logits.

    Returns:
        Output (N, H, D) and lse (H, N), both float32, to be merged with the far part; 0 and -inf in rows of no text.

    Raises:
        ValueError: If shapes, dtypes, strides or ``window`` do not fit.
    """
    _check(query, key, value, starts, lengths, window)
    N, H, _ = query.shape
    (output,) = _zeros_beside_texts(1, query, starts, lengths, max_length)
    lse = query.new_full((H, N), float("-inf"), dtype=torch.float32)
    if output.numel() == 0 or len(starts) * max_length == 0:
        return output, lse
    options = _options(query, window)
    with torch.cuda.device_of(query):
        _forward_kernel[(len(starts) * triton.cdiv(max_length, options["BLOCK"]), H)](
            query,
            key,
            value,
            output,
            lse,
            starts,
            lengths,
            *(stride for x in (query, key, value, output) for stride in x.stride()[:2]),
            lse.stride(0),
            max_length,
            scale * LOG2_E,
            **options,
        )
    return output, lse


def near_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    max_length: int,
    window: int,
    scale: float,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`near_attention`, or of the near part of a sum with a larger normaliser.

    With ``P_ij = exp(s_ij - lse_i)`` and ``dS_ij = P_ij (grad_output_i·(v_j - output_i) + grad_lse_i)`` over j in
    near(i): ``dq_i = scale · Σ_j dS_ij k_j``, ``dk_j = scale · Σ_i dS_ij q_i``, ``dv_j = Σ_i P_ij grad_output_i``.
    Where near and far are merged, ``output`` and ``lse`` are those of the merged sum, and the far part gets its own
    gradients from the same two. Time O(N·window·D), memory O(N·D); the same bits at every run.

    Args:
        grad_output: (N, H, D), any floating dtype, last stride 1. Rounded to the dtype of ``query`` where it meets
            the tensor cores, so float16 takes gradients that float16 can hold.
        query: (N, H, D), as in :func:`near_attention`.
        key: As query.
        value: As query.
        output: (N, H, D), any floating dtype, last stride 1.
        lse: (H, N) float32, any strides, finite in rows of a text.
        starts: (B,) int32, first row of each text.
        lengths: (B,) int32, rows of each text.
        max_length: As in :func:`near_attention`.
        window: As in :func:`near_attention`.
        scale: Factor of the logits.
        grad_lse: (H, N), the gradient of lse; none by default.

    Returns:
        Gradients of query, key and value, (N, H, D) in float32 whatever the inputs are, as the far part's are added
        to them; 0 in rows of no text.

    Raises:
        ValueError: If shapes, dtypes, strides or ``window`` do not fit.
    """
    _check(query, key, value, starts, lengths, window)
    for name, x in (("grad_output", grad_output), ("output", output)):
        if x.shape != query.shape or x.stride(-1) != 1 or not x.is_floating_point():
            expected = f"{tuple(query.shape)}, floating point, with last stride 1"
            raise ValueError(f"{name} must be (N, H, D) = {expected}, got {tuple(x.shape)}, {x.dtype}, {x.stride()}")
    N, H, _ = query.shape
    if lse.shape != (H, N) or lse.dtype != torch.float32:
        raise ValueError(f"lse must be (H, N) = {(H, N)} in float32, got {tuple(lse.shape)} in {lse.dtype}")
    grad_query, grad_key, grad_value = _zeros_beside_texts(3, query, starts, lengths, max_length)
    if grad_query.numel() == 0 or len(starts) * max_length == 0:
        return grad_query, grad_key, grad_value
    options = _options(query, window)
    grid = (len(starts) * triton.cdiv(max_length, options["BLOCK"]), H)
    delta = torch.zeros(H, N, dtype=torch.float32, device=query.device)
    if grad_lse is not None:
        delta.copy_(grad_lse)
    with torch.cuda.device_of(query):
        _query_gradient_kernel[grid](
            grad_output,
            query,
            key,
            value,
            output,
            lse,
            delta,
            grad_query,
            starts,
            lengths,
            *(stride for x in (grad_output, query, key, value, output, grad_query) for stride in x.stride()[:2]),
            *lse.stride(),
            delta.stride(0),
            max_length,
            scale,
            scale * LOG2_E,
            **options,
        )
        # Reads the delta that the kernel before it wrote.
        _key_value_gradient_kernel[grid](
            grad_output,
            query,
            key,
            value,
            lse,
            delta,
            grad_key,
            grad_value,
            starts,
            lengths,
            *(stride for x in (grad_output, query, key, value, grad_key) for stride in x.stride()[:2]),
            *lse.stride(),
            delta.stride(0),
            max_length,
            scale,
            scale * LOG2_E,
            **options,
        )
    return grad_query, grad_key, grad_value


def _check(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, lengths: Tensor, window: int) -> None:
    if query.ndim != 3 or not query.shape == key.shape == value.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value must all be (N, H, D), got {shapes}")
    if query.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"query must have a head size D of at most {MAX_HEAD_DIM}, got {query.shape[-1]}")
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        dtypes = ", ".join(str(x.dtype) for x in (query, key, value))
        choices = ", ".join(map(str, DTYPES))
        raise ValueError(f"query, key and value must share one dtype out of {choices}, got {dtypes}")
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        strides = ", ".join(str(x.stride()) for x in (query, key, value))
        raise ValueError(f"query, key and value must have last stride 1, got strides {strides}")
    if starts.ndim != 1 or starts.shape != lengths.shape or not starts.dtype == lengths.dtype == torch.int32:
        found = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (starts, lengths))
        raise ValueError(f"starts and lengths must both be (B,) in torch.int32, got {found}")
    if not starts.is_contiguous() or not lengths.is_contiguous():
        raise ValueError(f"starts and lengths must be contiguous, got strides {starts.stride()}, {lengths.stride()}")
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")


def _options(query: Tensor, window: int) -> dict[str, int]:
    """Constants of a launch. A tile is the largest that ptxas keeps in registers on sm_80 and sm_90, or nearly so."""
    D = query.shape[-1]
    if query.element_size() == 2:
        block, num_warps, num_stages = 64, 4 if D <= 64 else 8, 2
    # Products in full float32 run outside the tensor cores, on operands held in registers.
    elif D <= 64:
        block, num_warps, num_stages = 32, 4 if D <= 32 else 8, 2 if D <= 32 else 1
    else:
        block, num_warps, num_stages = 16, 8, 1
    return {
        "D": D,
        "WINDOW": window,
        "BLOCK": block,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _zeros_beside_texts(count: int, query: Tensor, starts: Tensor, lengths: Tensor, max_length: int) -> Tensor:
    """(count, N, H, D) in float32: zeros in rows of no text, memory as it comes in those that kernels will write.

    Zeros everywhere would be written twice where texts lie, which is most of these tensors' traffic.
    """
    N, H, D = query.shape
    if query.numel() == 0 or len(starts) * max_length == 0:
        return query.new_zeros(count, N, H, D, dtype=torch.float32)
    results = torch.empty(count, N, H, D, dtype=torch.float32, device=query.device)
    gaps = len(starts) + 1
    # Every program looks for its gap among all texts, so the more gaps there are, the fewer share one.
    shares = min(triton.cdiv(query.numel(), 1 << 16), max(1, 512 // gaps))
    with torch.cuda.device_of(query):
        _clear_kernel[(gaps, shares)](
            results,
            starts,
            lengths,
            len(starts),
            N,
            max_length,
            COUNT=count,
            SIZE=H * D,
            BLOCK=4096,
            TEXTS=1024,
        )
    return results


@triton.jit
def _tile_of_text(lengths, max_length, BLOCK: tl.constexpr):
    """The text of a program, the first row of its tile, and the text's length."""
    tiles = tl.cdiv(max_length, BLOCK)
    text = tl.program_id(0) // tiles
    return text, (tl.program_id(0) % tiles) * BLOCK, tl.minimum(tl.load(lengths + text), max_length)


@triton.jit
def _near_range(first, length, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens near a tile of rows that starts at ``first``: the relation is symmetric, keys or queries alike."""
    last = tl.minimum(first + BLOCK, length) - 1
    begin = tl.maximum((first // WINDOW - 1) * WINDOW, 0)
    end = tl.minimum((last // WINDOW + 2) * WINDOW, length)
    return begin, end


@triton.jit
def _hide_far(logits, rows, columns, length, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """-inf where the column is not near the row or beyond the text."""
    visible = (columns < length)[None, :]
    # Where a tile of rows lies in one block, all of its range is near.
    if WINDOW % BLOCK != 0:
        visible &= tl.abs((rows // WINDOW)[:, None] - (columns // WINDOW)[None, :]) <= 1
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def _load(pointer, rows, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) of a text's rows, zeros beyond the text and beyond D."""
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None]
    if D < BLOCK_D:
        mask &= (columns < D)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, x, rows, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None]
    if D < BLOCK_D:
        mask &= (columns < D)[None, :]
    tl.store(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], x, mask=mask)


@triton.jit
def _dot(a, b):
    """Product with float32 sums; float32 operands are not rounded to tf32."""
    if INTERPRETED:
        # The interpreter multiplies the bit patterns of bfloat16.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=VARYING)
def _clear_kernel(
    results,
    starts,
    lengths,
    num_texts,
    num_rows,
    max_length,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TEXTS: tl.constexpr,
):
    """A program per gap and share of it. Gap t lies behind text t, and gap B before all texts."""
    text = tl.program_id(0)
    begin = tl.zeros([], tl.int32)
    length = tl.full([], 1, tl.int32)
    if text < num_texts:
        length = tl.minimum(tl.load(lengths + text), max_length)
        begin = tl.load(starts + text) + length
    # Texts come in any order: the gap ends where the next of them starts. An empty one has no gap and ends none.
    end = num_rows
    if length > 0:
        for other in range(0, num_texts, TEXTS):
            texts = other + tl.arange(0, TEXTS)
            size = tl.load(lengths + texts, mask=texts < num_texts, other=0)
            next_start = tl.load(starts + texts, mask=size > 0, other=num_rows)
            end = tl.minimum(end, tl.min(tl.where(next_start < begin, num_rows, next_start), 0))
        first = begin.to(tl.int64) * SIZE
        last = end.to(tl.int64) * SIZE
        for offset in range(first + tl.program_id(1) * BLOCK, last, tl.num_programs(1) * BLOCK):
            elements = offset + tl.arange(0, BLOCK)
            for result in tl.static_range(COUNT):
                shift = tl.full([], result * SIZE, tl.int64) * num_rows
                tl.store(results + shift + elements, 0.0, mask=elements < last)


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(
    query,
    key,
    value,
    output,
    lse,
    starts,
    lengths,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    output_stride,
    output_head_stride,
    lse_head_stride,
    max_length,
    log2_scale,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program per tile of queries and head."""
    text, first, length = _tile_of_text(lengths, max_length, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    if first < length:
        start = tl.load(starts + text).to(tl.int64)
        query += start * query_stride + head * query_head_stride
        key += start * key_stride + head * key_head_stride
        value += start * value_stride + head * value_head_stride
        output += start * output_stride + head * output_head_stride
        lse += start + head * lse_head_stride

        rows = first + tl.arange(0, BLOCK)
        q = _load(query, rows, length, query_stride, D, BLOCK_D)
        # Finite, so that a row whose first key tiles are all masked meets no inf - inf.
        maximum = tl.full([BLOCK], -3.0e38, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        accumulator = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        begin, end = _near_range(first, length, WINDOW, BLOCK)
        for tile in range(begin, end, BLOCK):
            columns = tile + tl.arange(0, BLOCK)
            k = _load(key, columns, length, key_stride, D, BLOCK_D)
            v = _load(value, columns, length, value_stride, D, BLOCK_D)
            logits = _hide_far(_dot(q, tl.trans(k)) * log2_scale, rows, columns, length, WINDOW, BLOCK)
            higher = tl.maximum(maximum, tl.max(logits, 1))
            weights = tl.exp2(logits - higher[:, None])
            shrink = tl.exp2(maximum - higher)
            total = total * shrink + tl.sum(weights, 1)
            accumulator = accumulator * shrink[:, None] + _dot(weights.to(v.dtype), v)
            maximum = higher
        # A row beyond the text may have met no key. It is not stored.
        total = tl.where(rows < length, total, 1.0)
        _store(output, accumulator / total[:, None], rows, length, output_stride, D, BLOCK_D)
        tl.store(lse + rows, (maximum + tl.log2(total)) / LOG2_E_CONSTEXPR, mask=rows < length)


@triton.jit(do_not_specialize=VARYING)
def _query_gradient_kernel(
    grad_output,
    query,
    key,
    value,
    output,
    lse,
    delta,
    grad_query,
    starts,
    lengths,
    grad_output_stride,
    grad_output_head_stride,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    output_stride,
    output_head_stride,
    grad_query_stride,
    grad_query_head_stride,
    lse_head_stride,
    lse_stride,
    delta_head_stride,
    max_length,
    scale,
    log2_scale,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program per tile of queries and head; writes ``delta_i = grad_output_i·output_i`` on the way."""
    text, first, length = _tile_of_text(lengths, max_length, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    if first < length:
        start = tl.load(starts + text).to(tl.int64)
        grad_output += start * grad_output_stride + head * grad_output_head_stride
        query += start * query_stride + head * query_head_stride
        key += start * key_stride + head * key_head_stride
        value += start * value_stride + head * value_head_stride
        output += start * output_stride + head * output_head_stride
        grad_query += start * grad_query_stride + head * grad_query_head_stride
        lse += start * lse_stride + head * lse_head_stride
        delta += start + head * delta_head_stride

        rows = first + tl.arange(0, BLOCK)
        q = _load(query, rows, length, query_stride, D, BLOCK_D)
        # Rounded before delta too: in grad_output·(v - output) the rounding then cancels where v - output does.
        do = _load(grad_output, rows, length, grad_output_stride, D, BLOCK_D).to(q.dtype)
        o = _load(output, rows, length, output_stride, D, BLOCK_D)
        # On entry delta holds the gradient of lse.
        row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1) - tl.load(delta + rows, rows < length, other=0.0)
        tl.store(delta + rows, row_delta, mask=rows < length)
        # inf makes all weights of a row beyond the text 0.
        row_lse = tl.load(lse + rows.to(tl.int64) * lse_stride, mask=rows < length, other=float("inf"))
        row_lse = row_lse * LOG2_E_CONSTEXPR
        accumulator = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        begin, end = _near_range(first, length, WINDOW, BLOCK)
        for tile in range(begin, end, BLOCK):
            columns = tile + tl.arange(0, BLOCK)
            k = _load(key, columns, length, key_stride, D, BLOCK_D)
            v = _load(value, columns, length, value_stride, D, BLOCK_D)
            logits = _hide_far(_dot(q, tl.trans(k)) * log2_scale, rows, columns, length, WINDOW, BLOCK)
            weights = tl.exp2(logits - row_lse[:, None])
            grad_logits = weights * (_dot(do, tl.trans(v)) - row_delta[:, None])
            accumulator += _dot(grad_logits.to(k.dtype), k)
        _store(grad_query, accumulator * scale, rows, length, grad_query_stride, D, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def _key_value_gradient_kernel(
    grad_output,
    query,
    key,
    value,
    lse,
    delta,
    grad_key,
    grad_value,
    starts,
    lengths,
    grad_output_stride,
    grad_output_head_stride,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    gradient_stride,
    gradient_head_stride,
    lse_head_stride,
    lse_stride,
    delta_head_stride,
    max_length,
    scale,
    log2_scale,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program per tile of keys and head. Weights are held transposed, (keys, queries), as the products want them."""
    text, first, length = _tile_of_text(lengths, max_length, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    if first < length:
        start = tl.load(starts + text).to(tl.int64)
        grad_output += start * grad_output_stride + head * grad_output_head_stride
        query += start * query_stride + head * query_head_stride
        key += start * key_stride + head * key_head_stride
        value += start * value_stride + head * value_head_stride
        grad_key += start * gradient_stride + head * gradient_head_stride
        grad_value += start * gradient_stride + head * gradient_head_stride
        lse += start * lse_stride + head * lse_head_stride
        delta += start + head * delta_head_stride

        rows = first + tl.arange(0, BLOCK)
        k = _load(key, rows, length, key_stride, D, BLOCK_D)
        v = _load(value, rows, length, value_stride, D, BLOCK_D)
        key_accumulator = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        value_accumulator = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        begin, end = _near_range(first, length, WINDOW, BLOCK)
        for tile in range(begin, end, BLOCK):
            columns = tile + tl.arange(0, BLOCK)
            q = _load(query, columns, length, query_stride, D, BLOCK_D)
            do = _load(grad_output, columns, length, grad_output_stride, D, BLOCK_D).to(q.dtype)
            column_lse = tl.load(lse + columns.to(tl.int64) * lse_stride, mask=columns < length, other=float("inf"))
            column_delta = tl.load(delta + columns, mask=columns < length, other=0.0)
            logits = _hide_far(_dot(k, tl.trans(q)) * log2_scale, rows, columns, length, WINDOW, BLOCK)
            weights = tl.exp2(logits - (column_lse * LOG2_E_CONSTEXPR)[None, :])
            value_accumulator += _dot(weights.to(do.dtype), do)
            grad_logits = weights * (_dot(v, tl.trans(do)) - column_delta[None, :])
            key_accumulator += _dot(grad_logits.to(q.dtype), q)
        _store(grad_key, key_accumulator * scale, rows, length, gradient_stride, D, BLOCK_D)
        _store(grad_value, value_accumulator, rows, length, gradient_stride, D, BLOCK_D)


LOG2_E_CONSTEXPR = tl.constexpr(LOG2_E)
INTERPRETED = tl.constexpr(isinstance(_dot, InterpretedFunction))
